"""Whose job a process is, by its cgroups; and that only what was looked at is killed."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from hpcctr.engine import job
from hpcctr.engine.job import JobCgroups
from hpcctr.mounttable import MountEntry, read_mounts
from tests.support.job_cgroup import VERSIONS, JobCgroup, Version, has, job_cgroup
from tests.support.polling import wait_until
from tests.support.users import User

pytestmark = pytest.mark.root


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> Version:
    chosen: Version = request.param
    if not has(chosen):
        pytest.skip(f"this machine shows no cgroup hierarchy of {chosen}")
    return chosen


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    started = subprocess.Popen(["sleep", "60"])
    yield started
    started.kill()
    started.wait()


def _take(cgroup: JobCgroup, process: subprocess.Popen[bytes]) -> None:
    cgroup.take(process.pid)


def test_a_process_is_of_the_job_whose_cgroup_it_is_in(
    alice: User, process: subprocess.Popen[bytes], version: Version
) -> None:
    with job_cgroup(alice, 77, version=version) as cgroup:
        _take(cgroup, process)
        found = JobCgroups.of(77, read_mounts())
        assert found.pids() == {process.pid} and found.have(process.pid)
        for other in (7, 777, 78):
            assert JobCgroups.of(other, read_mounts()).directories == []
            assert not JobCgroups.of(other, read_mounts()).have(process.pid)
    assert not JobCgroups.of(77, read_mounts()).have(os.getpid())


def test_a_cgroup_of_a_users_making_is_no_jobs_whatever_its_name(
    alice: User, process: subprocess.Popen[bytes], version: Version
) -> None:
    """Neither below their own job's, where it still is that job's, nor anywhere else."""
    with job_cgroup(alice, 77, version=version) as cgroup:
        _take(cgroup.delegated(alice, "job_12"), process)
        assert JobCgroups.of(12, read_mounts()).directories == []
        assert JobCgroups.of(77, read_mounts()).have(process.pid)
    with job_cgroup(alice, 78, version=version) as cgroup:
        _take(cgroup.session(alice, "job_12"), process)
        assert JobCgroups.of(12, read_mounts()).directories == []


def _nest(directory: Path, names: Sequence[str]) -> int:
    """Make directories one in another; a descriptor of the last."""
    here = os.open(directory, os.O_RDONLY)
    for name in names:
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    return here


def _remove_nest(here: int, names: Sequence[str]) -> None:
    for name in reversed(names):
        above = os.open("..", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = above
        wait_until(lambda name=name, here=here: _is_removed(name, here))  # type: ignore[misc]
    os.close(here)


def _is_removed(name: str, directory: int) -> bool:
    try:
        os.rmdir(name, dir_fd=directory)
    except OSError as error:
        assert error.errno == errno.EBUSY
        return False
    return True


@pytest.mark.parametrize("names", [["d"] * 1100, ["n" * 250] * 20], ids=["many levels", "long names"])
def test_no_cgroup_is_too_deep_to_be_a_jobs(
    alice: User, process: subprocess.Popen[bytes], version: Version, names: list[str]
) -> None:
    """In one that was given to them, a user may go deeper than recursion and paths of 4096 bytes reach."""
    with job_cgroup(alice, 81, version=version) as cgroup:
        here = _nest(cgroup.directory, names)
        procs = os.open("cgroup.procs", os.O_WRONLY, dir_fd=here)
        os.write(procs, str(process.pid).encode())
        os.close(procs)
        before = os.listdir("/proc/self/fd")
        found = JobCgroups.of(81, read_mounts())
        try:
            assert found.pids() == {process.pid}
            assert found.have(process.pid)
            assert not JobCgroups.of(8, read_mounts()).have(process.pid)
            assert os.listdir("/proc/self/fd") == before
        finally:
            process.kill()
            process.wait()
            _remove_nest(here, names)


def test_a_cgroup_whose_name_breaks_lines_makes_nobody_another_jobs(
    alice: User, bob: User, process: subprocess.Popen[bytes], version: Version
) -> None:
    """Names may have any character but a line feed; what one says of other cgroups counts for nothing."""
    with job_cgroup(alice, 82, version=version) as mine, job_cgroup(bob, 83, version=version) as theirs:
        top = next(
            place for place in JobCgroups.of(83, read_mounts()).places.values() if str(mine.top).startswith(place)
        )
        path = str(theirs.directory).removeprefix(top)
        for separator in ("\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028"):
            controllers = "" if version == "v2" else "pids"
            names = [f"x{separator}0:{controllers}:", *path.strip("/").split("/")]
            here = _nest(mine.directory, names)
            procs = os.open("cgroup.procs", os.O_WRONLY, dir_fd=here)
            os.write(procs, str(process.pid).encode())
            os.close(procs)
            assert not JobCgroups.of(83, read_mounts()).have(process.pid)
            assert JobCgroups.of(82, read_mounts()).have(process.pid)
            mine.take(process.pid)
            _remove_nest(here, names)


def test_hierarchies_are_found_by_controller_and_by_name_where_they_can_be_seen(tmp_path: Path) -> None:
    for name in ("unified", "cpu", "systemd", "again"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").touch()

    def entry(kind: str, name: str, *options: str) -> MountEntry:
        return MountEntry(
            target=f"{tmp_path}/{name}",
            options=frozenset(),
            super_options=options,
            propagation=(),
            kind=kind,
            source="x",
        )

    mounts = [
        entry("cgroup2", "unified", "rw"),
        entry("cgroup", "cpu", "rw", "cpu", "cpuacct"),
        entry("cgroup", "systemd", "rw", "name=systemd"),
        entry("cgroup", "hidden", "rw", "pids"),
        entry("tmpfs", "again", "rw", "size=1"),
        entry("cgroup2", "hidden", "rw"),
    ]
    places = JobCgroups.of(1, mounts).places
    assert places[""] == f"{tmp_path}/unified"
    assert places["cpuacct"] == f"{tmp_path}/cpu" and places["name=systemd"] == f"{tmp_path}/systemd"
    assert not {"size=1", "pids"} & set(places)
    # As on a node that was hybrid once and had version 2 mounted over it.
    assert JobCgroups.of(1, [*mounts, entry("cgroup2", "again")]).places[""] == f"{tmp_path}/again"


def test_a_process_outside_of_containers_is_never_killed(alice: User, process: subprocess.Popen[bytes]) -> None:
    with job_cgroup(alice, 79) as cgroup:
        _take(cgroup, process)
        assert job.end(79, seconds=5) == ([], [])
        assert process.poll() is None


def _start_as(pid: int) -> subprocess.Popen[bytes] | None:
    """A process with just that number, when nobody takes it first."""
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
    started = subprocess.Popen(["sleep", "60"])
    if started.pid == pid:
        return started
    started.kill()
    started.wait()
    return None


def test_a_number_that_changes_hands_while_it_is_looked_at_kills_nobody(
    alice: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    with job_cgroup(alice, 80) as cgroup:
        for _ in range(50):
            victim = subprocess.Popen(["sleep", "60"])
            cgroup.take(victim.pid)
            successors: list[subprocess.Popen[bytes]] = []

            def look(
                thread: int,
                _: JobCgroups,
                victim: subprocess.Popen[bytes] = victim,
                successors: list[subprocess.Popen[bytes]] = successors,
            ) -> bool:
                # The worst moment: all that was read was right, and then it is somebody else.
                if thread == victim.pid and victim.poll() is None:
                    victim.kill()
                    victim.wait()
                    with contextlib.suppress(OSError):
                        successor = _start_as(thread)
                        if successor is not None:
                            successors.append(successor)
                return True

            monkeypatch.setattr(job, "_is_inside", look)
            killed, _ = job.end(80, seconds=5)
            victim.kill()
            victim.wait()
            if successors:
                assert killed == []
                assert successors[0].poll() is None
                successors[0].send_signal(signal.SIGKILL)
                successors[0].wait()
                return
        pytest.fail("no process could be given the number of another")
