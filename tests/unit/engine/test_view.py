"""Whose view somebody may have, as far as it can be seen without a container; the rest is in tests/attacks."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from hpcctr.context import Caller
from hpcctr.engine.view import View
from hpcctr.errors import ProcessOutOfReach
from tests.support.values import a_caller

pytestmark = pytest.mark.root

PLAIN = ["setpriv", "--reuid=61234", "--regid=61234", "--clear-groups", "--inh-caps=-all", "--no-new-privs"]


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def _start(started: list[subprocess.Popen[bytes]], *argv: str) -> int:
    process = subprocess.Popen([*argv, "sh", "-p", "-c", "echo; exec sleep 60"], stdout=subprocess.PIPE)
    started.append(process)
    assert process.stdout is not None
    process.stdout.readline()
    return process.pid


@pytest.fixture
def user() -> Caller:
    return a_caller(uid=61234, gid=61234)


def _refusal(pid: int, caller: Caller) -> str:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ProcessOutOfReach) as refused:
        View.of_process(pid, caller, {})
    assert len(os.listdir("/proc/self/fd")) == before
    return refused.value.message


def test_who_is_not_the_caller_is_nobody(started: list[subprocess.Popen[bytes]], user: Caller) -> None:
    other = _start(started, "setpriv", "--reuid=61235", "--regid=61234", "--clear-groups", "--no-new-privs")
    mixed = _start(started, "setpriv", "--ruid=61234", "--euid=61235", "--regid=61234", "--clear-groups")
    for pid in (1, os.getpid(), other, mixed, 4194304):
        assert _refusal(pid, user) == f"pid {pid} is not a living process of yours"


def test_a_process_on_the_node_itself_is_in_no_container(started: list[subprocess.Popen[bytes]], user: Caller) -> None:
    assert "in no container" in _refusal(_start(started, *PLAIN), user)
    # Enough to be refused by itself: enter leaves no program without it.
    assert "in no container" in _refusal(_start(started, *PLAIN[:-1]), user)


def test_a_namespace_of_roots_that_is_no_container_of_this_engine_is_refused(
    started: list[subprocess.Popen[bytes]], user: Caller
) -> None:
    assert "the engine of this node keeps" in _refusal(_start(started, "unshare", "--mount", *PLAIN), user)


def test_a_process_with_another_group_is_refused(started: list[subprocess.Popen[bytes]]) -> None:
    pid = _start(started, *PLAIN)
    assert "its group ids are" in _refusal(pid, a_caller(uid=61234, gid=61235))


def test_a_process_in_a_user_namespace_is_refused(started: list[subprocess.Popen[bytes]], user: Caller) -> None:
    pid = _start(started, *PLAIN, "unshare", "--user", "--map-root-user", "--mount")
    assert "user namespace of its own" in _refusal(pid, user)


def test_a_zombie_is_refused(started: list[subprocess.Popen[bytes]], user: Caller) -> None:
    pid = _start(started, *PLAIN)
    started[0].kill()
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert "not a living process" in _refusal(pid, user)
