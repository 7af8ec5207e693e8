"""What a user can make of `hpcctr cleanup`: nothing of another's, and no way to outlive their own job."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpcctr.engine.control import CONTROL_SOCKET
from tests.support.job_cgroup import JobCgroup, job_cgroup
from tests.support.node import Node, node
from tests.support.polling import wait_until
from tests.support.scratch import scratch
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]


@pytest.fixture(scope="module")
def lingering() -> Iterator[Node]:
    with scratch("control") as root, node(root, linger_seconds=3600) as made:
        yield made


@pytest.fixture(scope="module")
def image(lingering: Node, busybox_image: str) -> str:
    lingering.pull(busybox_image)
    return busybox_image


@pytest.fixture(scope="module")
def tools(lingering: Node, debian_tools_image: str) -> str:
    """An image with Python."""
    lingering.pull(debian_tools_image)
    return debian_tools_image


def _started(made: Node, image: str, user: User, *command: str, **options: Any) -> subprocess.Popen[bytes]:
    """A program that has printed a line and waits for another."""
    process = made.popen(
        "run", image, "--", *command, user=user, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options
    )
    assert process.stdout is not None
    assert process.stdout.readline() != b""
    return process


def _go(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"go\n")
    process.stdin.flush()
    assert process.stdout.readline() != b""


def _killed(made: Node, job: int, *, check: int = 0) -> set[int]:
    done = made.hpcctr("cleanup", "--job", str(job), "--format", "json", check=check)
    return {entry["pid"] for entry in json.loads(done.stdout)["killed"]}


SHELL = ("sh", "-c", "echo; read line; echo; exec sleep 600")


def test_an_ordinary_user_cannot_reach_the_control_socket(lingering: Node, image: str, alice: User) -> None:
    lingering.run(image, "true", user=alice)
    code = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET);print(s.connect_ex(sys.argv[1]))"
    )
    for path in (CONTROL_SOCKET, f"/proc/{lingering.engine.process.pid}/root{CONTROL_SOCKET}"):
        done = lingering.host.run(["/usr/bin/python3", "-c", code, path], user=alice)
        assert done.stdout == b"13\n", done  # EACCES
    # And it is one: root can.
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(str(lingering.host.path(CONTROL_SOCKET)))
    assert len(lingering.containerd.containers()) == 1


def test_the_control_socket_is_not_there_inside_a_container(lingering: Node, image: str, alice: User) -> None:
    flags = ("-v", "/run:/there")
    done = lingering.run(image, "ls", "/there/hpcctr/state", user=alice, flags=flags, check=False)
    assert done.returncode != 0 and b"ermission denied" in done.stderr


def test_a_process_of_another_job_that_calls_itself_so_is_not_killed(
    lingering: Node, image: str, alice: User, bob: User
) -> None:
    with job_cgroup(bob, 12) as victims, job_cgroup(alice, 13) as cgroup:
        victim = _started(lingering, image, bob, *SHELL)
        victims.take(victim.pid)
        liars = [
            # by its variables and its command line
            _started(lingering, image, alice, "env", "SLURM_JOB_ID=12", "SLURM_JOBID=12", *SHELL, "job_12"),
            # by a cgroup of its own making below its job's, and elsewhere
            _started(lingering, image, alice, *SHELL),
            _started(lingering, image, alice, *SHELL),
        ]
        cgroup.take(liars[0].pid)
        delegated: JobCgroup = cgroup.delegated(alice, "job_12")
        delegated.take(liars[1].pid)
        cgroup.session(alice, "job_12").take(liars[2].pid)
        assert _killed(lingering, 12) == {victim.pid}
        assert [liar.poll() for liar in liars] == [None] * 3
        # The second is of job 13, where its own job's end finds it.
        assert _killed(lingering, 13) == {liars[0].pid, liars[1].pid}
        for process in (victim, *liars):
            process.kill()
            process.communicate()


def test_a_program_whose_first_thread_has_ended_does_not_outlive_its_job(
    lingering: Node, tools: str, alice: User
) -> None:
    """Such a process looks like a zombie, and /proc tells neither its namespace nor, in version 1, its cgroup."""
    code = (
        "import ctypes, sys, threading, time; print(flush=True); sys.stdin.readline();"
        "threading.Thread(target=time.sleep, args=(600,)).start(); print(flush=True);"
        "ctypes.CDLL(None).syscall(60, 0)"
    )
    if os.uname().machine != "x86_64":
        pytest.skip("exit(2) has another number here")
    process = _started(lingering, tools, alice, "python3", "-c", code)
    with job_cgroup(alice, 14) as cgroup:
        cgroup.take(process.pid)
        _go(process)
        wait_until(lambda: "Z" in Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2], what="its end")
        assert process.poll() is None
        assert _killed(lingering, 14) == {process.pid}
        process.communicate(timeout=20)
        assert process.returncode == -9


def test_a_program_that_hides_from_proc_does_not_outlive_its_job(lingering: Node, tools: str, alice: User) -> None:
    """Not dumpable, and with the name of a thread of the kernel's."""
    code = (
        "import ctypes, os, sys; libc = ctypes.CDLL(None); print(flush=True); sys.stdin.readline();"
        "libc.prctl(4, 0, 0, 0, 0); libc.prctl(15, b'kworker/0:1', 0, 0, 0); os.chdir('/');"
        "print(flush=True); os.execvp('sleep', ['[kworker/0:1]', '600'])"
    )
    process = _started(lingering, tools, alice, "python3", "-c", code)
    with job_cgroup(alice, 15) as cgroup:
        cgroup.take(process.pid)
        _go(process)
        wait_until(lambda: Path(f"/proc/{process.pid}/cmdline").read_bytes()[:1] == b"[", what="its disguise")
        assert _killed(lingering, 15) == {process.pid}
        process.communicate(timeout=20)


def test_a_program_in_a_mount_namespace_of_its_own_does_not_outlive_its_job(
    lingering: Node, tools: str, alice: User
) -> None:
    process = _started(lingering, tools, alice, "sh", "-c", "echo; read line; echo; exec unshare -Urm sleep 600")
    with job_cgroup(alice, 16) as cgroup:
        cgroup.take(process.pid)
        _go(process)
        wait_until(lambda: "sleep" in Path(f"/proc/{process.pid}/comm").read_text(), seconds=5, what="its namespace")
        assert _killed(lingering, 16) == {process.pid}
        process.communicate(timeout=20)
