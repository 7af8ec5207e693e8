"""State directories and their locks."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcctr.engine import state
from hpcctr.engine.mounts import MS_NODEV, mount
from hpcctr.engine.state import StateDirectory, dead_siblings, unmount_all
from hpcctr.errors import EngineBusy, HpcctrError
from hpcctr.mounttable import read_mounts
from tests.support.mount_namespace import ROOT, in_private_mounts
from tests.support.scratch import scratch


@pytest.fixture
def base() -> Iterator[Path]:
    with scratch("state") as directory:
        yield directory


def test_a_claimed_directory_is_closed_to_others(base: Path) -> None:
    before = os.umask(0)
    try:
        mine = StateDirectory(f"{base}/state")
        mine.claim()
    finally:
        os.umask(before)
    assert stat.S_IMODE((base / "state").stat().st_mode) == 0o700
    assert sorted(os.listdir(base / "state")) == ["containers", "images"]
    mine.release()


def test_a_living_engine_keeps_its_directory(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_CLAIM_SECONDS", 0.1)
    first, second = StateDirectory(f"{base}/state"), StateDirectory(f"{base}/state")
    first.claim()
    with pytest.raises(EngineBusy, match=f"another engine uses {base}/state"):
        second.claim()
    first.release()
    second.claim()
    second.release()


@pytest.mark.root
@pytest.mark.parametrize(("mode", "uid"), [(0o770, 0), (0o707, 0), (0o700, 1000)])
def test_a_directory_others_could_have_changed_is_refused(base: Path, mode: int, uid: int) -> None:
    (base / "state").mkdir()
    (base / "state").chmod(mode)
    os.chown(base / "state", uid, 0)
    with pytest.raises(HpcctrError, match="is not closed to other users"):
        StateDirectory(f"{base}/state").claim()


def test_a_link_in_its_place_is_refused(base: Path) -> None:
    (base / "elsewhere").mkdir(mode=0o700)
    (base / "state").symlink_to("elsewhere")
    with pytest.raises(OSError, match="Not a directory|Too many levels"):
        StateDirectory(f"{base}/state").claim()


@pytest.mark.parametrize("path", ["state", "/a,b", "/a:b", "/a b", "/a/../b", "/a/", "/a\\b", "/ä"])
def test_only_a_path_that_needs_no_escaping_can_be_one(path: str) -> None:
    with pytest.raises(HpcctrError, match="not a plain absolute path"):
        StateDirectory(path)


_ENGINE = """
import sys
from hpcctr.engine.state import StateDirectory
mine = StateDirectory(sys.argv[1])
mine.claim()
print("ready", flush=True)
sys.stdin.read()
"""


def _engine(path: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", _ENGINE, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": str(ROOT / "src")},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def test_only_direct_engines_that_died_are_dead(base: Path) -> None:
    mine = StateDirectory(f"{base}/state")
    mine.claim()
    with _engine(f"{base}/direct-1") as killed, _engine(f"{base}/direct-2") as alive:
        killed.kill()
        killed.wait()
        (base / "direct-x").mkdir(mode=0o700)
        (base / "other").mkdir(mode=0o700)
        assert list(dead_siblings(mine)) == [(f"{base}/direct-1", "direct-1")]
        alive.kill()
    mine.release()


def test_a_dead_engine_is_locked_while_it_is_cleared_away(base: Path) -> None:
    mine = StateDirectory(f"{base}/direct-1")
    (base / "direct-2").mkdir(mode=0o700)
    for path, _ in dead_siblings(mine):
        assert state._locked(path) is None
    descriptor = state._locked(f"{base}/direct-2")
    assert descriptor is not None
    os.close(descriptor)


def test_an_owner_without_a_directory_is_gone(base: Path) -> None:
    mine = StateDirectory(f"{base}/state")
    (base / "direct-5").mkdir()
    assert mine.is_gone("direct-6")
    assert not mine.is_gone("direct-5")
    assert not mine.is_gone("gateway")
    assert not mine.is_gone("../direct-6")


def clearing(base: str) -> list[str]:
    inner = f"{base}/state/containers/a"
    os.makedirs(inner)
    for path in (f"{base}/state/containers", inner, inner):
        os.makedirs(path, exist_ok=True)
        mount("hpcctr", path, "tmpfs", flags=MS_NODEV, data="size=64k")
        os.makedirs(inner, exist_ok=True)
    os.makedirs(f"{base}/state-of-another")
    mount("hpcctr", f"{base}/state-of-another", "tmpfs", flags=MS_NODEV, data="size=64k")
    unmount_all(f"{base}/state")
    return [entry.target for entry in read_mounts() if entry.target.startswith(base)] + sorted(os.listdir(base))


@pytest.mark.root
def test_clearing_takes_every_mount_of_one_engine_and_no_other(base: Path) -> None:
    assert in_private_mounts(clearing, base) == [f"{base}/state-of-another", "state-of-another"]
