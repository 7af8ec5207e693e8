"""Watching processes until they end."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcctr.engine.members import (
    Members,
    is_anchor,
    is_roots,
    living_threads,
    members_in_proc,
    root_upper,
    upper_in,
)
from hpcctr.mounttable import MountEntry
from tests.support.polling import wait_until
from tests.support.processes import ENDED_LEADER


@pytest.fixture
def members() -> Iterator[Members]:
    made = Members()
    yield made
    made.close()


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started = [subprocess.Popen(["sleep", "60"]) for _ in range(3)]
    yield started
    for process in started:
        process.kill()
        process.wait()


def _add(members: Members, container: str, process: subprocess.Popen[bytes]) -> None:
    members.add(container, pid=process.pid, pidfd=os.pidfd_open(process.pid))


def test_a_container_is_reported_when_a_member_ends(members: Members, processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        _add(members, "one" if process is processes[0] else "other", process)
    processes[1].kill()
    assert members.wait(10) == {"other"}
    assert members.pids("other") == (processes[2].pid,)
    assert members.pids("one") == (processes[0].pid,)
    assert members.wait(0) == set()


def test_a_zombie_has_ended(members: Members, processes: list[subprocess.Popen[bytes]]) -> None:
    processes[0].kill()
    os.waitid(os.P_PID, processes[0].pid, os.WEXITED | os.WNOWAIT)
    _add(members, "one", processes[0])
    assert members.wait(10) == {"one"}
    assert members.pids("one") == ()


def test_waiting_ends_after_its_time_or_with_the_bell(members: Members) -> None:
    before = time.monotonic()
    assert members.wait(0.05) == set()
    assert time.monotonic() - before >= 0.05
    ringing = threading.Timer(0.05, members.ring)
    ringing.start()
    assert members.wait(None) == set()
    ringing.join()
    assert members.wait(0) == set()


def test_who_joins_while_another_thread_waits_is_watched(
    members: Members, processes: list[subprocess.Popen[bytes]]
) -> None:
    seen: list[set[str]] = []
    waiter = threading.Thread(target=lambda: seen.append(members.wait(None)))
    waiter.start()
    _add(members, "one", processes[0])
    processes[0].kill()
    waiter.join(10)
    assert seen == [{"one"}]


def test_every_descriptor_is_closed(processes: list[subprocess.Popen[bytes]]) -> None:
    before = os.listdir("/proc/self/fd")
    members = Members()
    for process in processes:
        _add(members, "one", process)
    processes[0].kill()
    members.wait(10)
    members.close()
    assert os.listdir("/proc/self/fd") == before


def _entry(target: str, kind: str, *options: str) -> MountEntry:
    return MountEntry(
        target=target, options=frozenset(), super_options=options, propagation=(), kind=kind, source="overlay"
    )


def test_the_upper_layer_is_that_of_the_root_only() -> None:
    below = _entry("/mnt", "overlay", "rw", "upperdir=/below")
    assert upper_in([below, _entry("/", "overlay", "rw", "lowerdir=/l", "upperdir=/u", "workdir=/w")]) == "/u"
    assert upper_in([below, _entry("/", "ext4", "rw", "upperdir=/u")]) is None
    assert upper_in([_entry("/", "overlay", "ro", "lowerdir=/l")]) is None


def test_this_process_is_in_no_container() -> None:
    assert root_upper(os.getpid()) is None
    assert members_in_proc({"/nothing": os.getuid()}) == []
    assert not is_anchor(os.getpid())


def test_of_a_process_whose_leader_has_ended_the_other_threads_live() -> None:
    argv = [sys.executable, "-IS", "-c", ENDED_LEADER]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        wait_until(lambda: "Z (zombie)" in Path(f"/proc/{process.pid}/status").read_text())
        (thread,) = living_threads(process.pid)
        assert thread != process.pid and Path(f"/proc/{process.pid}/task/{thread}").exists()
        process.communicate()
        assert list(living_threads(process.pid)) == []
    assert list(living_threads(os.getpid())) == [os.getpid()]


_ROOT_LATE = """
set -e
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/new" "$1/mounts"
mount -t tmpfs tmpfs "$1/mounts"
long=$(printf %0200d 0)
i=0
while [ $i -lt 250 ]; do
    mkdir "$1/mounts/$long$i"
    mount -t tmpfs "upperdir=/of/a/source,$i" "$1/mounts/$long$i"
    i=$((i + 1))
done
mount -t overlay -o "lowerdir=/usr,upperdir=$1/upper,workdir=$1/work" overlay "$1/new"
mkdir "$1/new/old"
mount --move "$1/mounts" "$1/new/share"
cd "$1/new"
pivot_root . old
umount -l /old
echo
read line
"""


@pytest.mark.root
def test_a_root_behind_hundreds_of_mounts_is_found(tmp_path: Path) -> None:
    """The table's order is the kernel's: what is carried into a view is older than the view's root."""
    argv = ["unshare", "--mount", "--propagation", "private", "busybox", "sh", "-c", _ROOT_LATE, "sh", str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        lines = Path(f"/proc/{process.pid}/mountinfo").read_bytes().splitlines(keepends=True)
        place = next(number for number, line in enumerate(lines) if line.split()[4] == b"/")
        assert sum(map(len, lines[:place])) > 65536
        assert root_upper(process.pid) == f"{tmp_path}/upper"
        process.communicate()


def test_a_namespace_of_this_user_namespace_is_roots() -> None:
    namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    assert is_roots(namespace)
    os.close(namespace)


@pytest.mark.root
def test_a_namespace_of_a_user_namespace_is_not_roots() -> None:
    argv = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", "echo ready; exec sleep 60"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        namespace = os.open(f"/proc/{process.pid}/ns/mnt", os.O_RDONLY)
        assert not is_roots(namespace)
        os.close(namespace)
        process.kill()
