"""scripts/cluster: a cluster for people, which leaves nothing."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.by_hand import ACCOUNTS, STATE, State
from tests.support.mountinfo import read_mountinfo
from tests.support.polling import wait_until
from tests.support.processes import processes
from tests.support.scratch import PLACE

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.timeout(120, func_only=True)]

ROOT = Path(__file__).parents[2]


def _script(*arguments: str, check: bool = True, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """What scripts/cluster starts, once it has looked after the machine's packages."""
    argv = [sys.executable, "-m", "tests.cluster.by_hand", *arguments]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=check, timeout=timeout)


def _traces() -> set[str]:
    """What a cluster could leave on the machine, by name."""
    found = {f"mount {mount}" for mount in read_mountinfo() if "by-hand" in f"{mount.source}{mount.target}"}
    found |= {f"process {process}" for process in processes() if f"{PLACE}/by-hand" in process.command}
    found |= {f"directory {directory}" for directory in PLACE.glob("by-hand.*")}
    found |= {f"cgroup {directory}" for directory in Path("/sys/fs/cgroup").glob("*/slurm_h*")}
    names = {entry.pw_name for entry in pwd.getpwall()}
    found |= {f"account {name}" for name in ACCOUNTS.values() if name in names}
    for device in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            found |= {f"loop {text}" for text in [device.read_text()] if "by-hand" in text}
        except OSError:
            continue
    return found | ({f"state {STATE}"} if STATE.exists() else set())


@pytest.fixture
def nothing_is_up() -> Iterator[None]:
    if STATE.exists():
        pytest.skip("somebody has a cluster up by hand")
    yield
    if STATE.exists():
        _script("down", check=False)


# Not the names of the cluster the other tests share.
UP = ("up", "--nodes", "2", "--prefix", "h")


@pytest.mark.usefixtures("nothing_is_up")
def test_a_cluster_by_hand_comes_up_is_used_and_leaves_nothing(busybox_image: str) -> None:
    assert not _traces()
    assert "nodes h1, h2" in _script(*UP).stdout
    second = _script(*UP, check=False)
    assert second.returncode == 1
    assert second.stderr == "cluster: one is up already, with nodes h1, h2: scripts/cluster down\n"
    assert _script("shell", "h1", "--", "hpcctr", "pull", busybox_image).returncode == 0
    inside = ["srun", "-N2", "hpcctr", "run", busybox_image, "--", "sh", "-c", 'hostname; echo "it\'s $(id -un)"']
    shown = _script("shell", "h2", "--user", "alice", "--", *inside).stdout
    assert sorted(shown.splitlines()) == ["h1", "h2", *2 * [f"it's {ACCOUNTS['alice']}"]]
    wrong = _script("shell", "h3", check=False)
    assert wrong.stderr == "cluster: no node h3; there are h1, h2\n"
    _script("down")
    assert not _traces()
    assert _script("down", check=False).stderr == "cluster: none is up\n"


@pytest.mark.usefixtures("nothing_is_up")
def test_down_leaves_nothing_when_the_holder_was_killed(busybox_image: str) -> None:
    _script(*UP)
    _script("shell", "h1", "--", "hpcctr", "pull", busybox_image)
    step = ["srun", "-N2", "hpcctr", "run", busybox_image, "--", "sh", "-c", "echo started; exec sleep 600"]
    argv = [sys.executable, "-m", "tests.cluster.by_hand", "shell", "h1", "--user", "bob", "--", *step]
    user = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
    assert user.stdout is not None and user.stdout.readline() == b"started\n"
    state = State.read()
    assert state is not None
    os.kill(state.pid, signal.SIGKILL)
    wait_until(lambda: not state.is_held(), what="the holder's end")
    _script("down")
    user.stdout.close()
    user.wait(10)
    assert not _traces()
