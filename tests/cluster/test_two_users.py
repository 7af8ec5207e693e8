"""Two users' jobs on one node: in containers they have no more of each other than natively."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.support.processes import Process
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.timeout(120, func_only=True)]


@dataclass(frozen=True, kw_only=True)
class Running:
    """A step of a user's on n1: the pid of its program, and that of a native process of the same user."""

    user: User
    pid: int
    native_pid: int


@contextlib.contextmanager
def _running(cluster: Cluster, user: User, image: str) -> Iterator[Running]:
    wait = ["sh", "-c", "echo $$; exec sleep 600"]
    steps = [
        cluster.popen(
            ["srun", "--quiet", "-w", "n1", "-n1", "--mem=50", *words],
            user=user,
            stdout=subprocess.PIPE,
        )
        for words in (cluster.inside(image, *wait), wait)
    ]
    try:
        pids = []
        for step in steps:
            assert step.stdout is not None
            pids.append(int(step.stdout.readline()))
        yield Running(user=user, pid=pids[0], native_pid=pids[1])
    finally:
        cluster.run(["scancel", f"--user={user.name}"], user=user)
        for step in steps:
            step.wait(30)


@pytest.fixture(scope="module")
def both(shared_cluster: Cluster, alice: User, bob: User, busybox: str) -> Iterator[tuple[Running, Running]]:
    with _running(shared_cluster, alice, busybox) as first, _running(shared_cluster, bob, busybox) as second:
        yield first, second
    shared_cluster.wait_until_idle()


def test_each_has_a_node_container_of_their_own(
    shared_cluster: Cluster, both: tuple[Running, Running], busybox: str
) -> None:
    views = [Process.read(running.pid).mount_namespace for running in both]
    assert len(set(views)) == 2
    uppers = {re.findall(r" / / .*upperdir=(\S+?)/upper", _mounts(running.pid))[0] for running in both}
    assert len(uppers) == 2
    # Of one user: one, whatever the job.
    show = shared_cluster.inside(busybox, "cat", "/proc/self/mountinfo")
    mine = shared_cluster.srun("-w", "n1", "-n1", "--mem=50", *show, user=both[0].user)
    assert re.findall(r" / / .*upperdir=(\S+?)/upper", mine.stdout.decode())[0] in uppers


def _mounts(pid: int) -> str:
    return Path(f"/proc/{pid}/mountinfo").read_text()


# Each is tried on a program in a container and on a native process of the other user, from within and without.
_ATTEMPTS = {
    "signal": "kill -USR1 {pid}",
    "read its environment": "cat /proc/{pid}/environ",
    "walk its root": "ls /proc/{pid}/root/",
    "read its working directory": "ls /proc/{pid}/cwd/",
    "open its descriptors": "ls /proc/{pid}/fd/",
    "read its memory": "head -c 1 /proc/{pid}/mem",
    "open its mount namespace": "readlink /proc/{pid}/ns/mnt",
    "raise its limits": "echo 0 > /proc/{pid}/oom_score_adj",
}


@pytest.mark.parametrize("attempt", _ATTEMPTS)
def test_neither_can_do_to_the_others_program_what_it_cannot_do_natively(
    shared_cluster: Cluster, both: tuple[Running, Running], busybox: str, attempt: str
) -> None:
    for one, other in (both, both[::-1]):
        results = {}
        for pid in (other.native_pid, other.pid):
            words = _ATTEMPTS[attempt].format(pid=pid)
            attack = ["sh", "-c", f"({words}) > /dev/null 2>&1 && echo done || echo refused"]
            for where in (attack, shared_cluster.inside(busybox, *attack)):
                done = shared_cluster.srun("-w", "n1", "-n1", "--mem=50", *where, user=one.user)
                results[pid, where[0]] = done.stdout
        assert set(results.values()) == {b"refused\n"}, results


def test_neither_can_join_the_others_program(shared_cluster: Cluster, both: tuple[Running, Running]) -> None:
    for one, other in (both, both[::-1]):
        words = ["hpcctr", "exec", str(other.pid), "--", "id"]
        done = shared_cluster.srun("-w", "n1", "-n1", "--mem=50", *words, user=one.user, check=False)
        assert done.returncode == 126 and done.stdout == b""
        # srun says of its own that the task has ended, before or after.
        assert b"hpcctr: error[not-your-program]: " in done.stderr, done.stderr


def test_neither_sees_the_others_containers(shared_cluster: Cluster, both: tuple[Running, Running]) -> None:
    for one, other in (both, both[::-1]):
        words = ["hpcctr", "ps", "--format", "json"]
        shown = shared_cluster.srun("-w", "n1", "-n1", "--mem=50", *words, user=one.user).stdout.decode()
        assert str(one.pid) in shown
        assert str(other.pid) not in shown and other.user.name not in shown and str(other.user.uid) not in shown


def test_neither_reaches_what_the_engine_keeps_for_the_other(
    shared_cluster: Cluster, both: tuple[Running, Running], busybox: str
) -> None:
    reach = ["sh", "-c", "ls /run/hpcctr/state /run/hpcctr/state/containers 2>/dev/null; true"]
    for one in both:
        for words in (reach, shared_cluster.inside(busybox, *reach)):
            assert shared_cluster.srun("-w", "n1", "-n1", "--mem=50", *words, user=one.user).stdout == b""


def test_both_programs_are_alive_after_all_that(both: tuple[Running, Running]) -> None:
    for running in both:
        for pid in (running.pid, running.native_pid):
            assert Process.read(pid).uid == running.user.uid
            os.kill(pid, 0)
