"""Cgroups as Slurm's plug-ins make them for a job, without a Slurm: what tells whose job a process is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.support.mountinfo import read_mountinfo
from tests.support.polling import wait_until
from tests.support.users import User

#: Hierarchies: cgroup/v1 uses several, one is enough for a process to be the job's.
Version = Literal["v1", "v2"]
VERSIONS: tuple[Version, ...] = ("v1", "v2")


def has(version: Version) -> bool:
    """Whether this machine shows such a hierarchy."""
    return _place(version) is not None


def _place(version: Version) -> Path | None:
    for mount in read_mountinfo():
        if version == "v2" and mount.kind == "cgroup2":
            return Path(mount.target)
        if version == "v1" and mount.kind == "cgroup" and Path(mount.target).name == "pids":
            return Path(mount.target)
    return None


@dataclass(frozen=True, kw_only=True)
class JobCgroup:
    """The cgroup of one task of a job."""

    job: int
    directory: Path
    #: Above it, of root's, and no job's.
    top: Path

    def take(self, pid: int) -> None:
        """Move a process in, as slurmstepd does before it starts a task."""
        (self.directory / "cgroup.procs").write_text(str(pid))

    def delegated(self, user: User, name: str) -> JobCgroup:
        """A cgroup of the user's making below this one, which was given to them."""
        for path in (self.directory / "cgroup.procs", self.directory):
            os.chown(path, user.uid, user.gid)
        below = self.directory / name
        below.mkdir()
        for path in (below, below / "cgroup.procs"):
            os.chown(path, user.uid, user.gid)
        return JobCgroup(job=self.job, directory=below, top=self.top)

    def session(self, user: User, name: str) -> JobCgroup:
        """A cgroup of the user's making that is not below the job's: in one that was given to them as a login's."""
        directory = self.top / "session"
        directory.mkdir()
        return JobCgroup(job=0, directory=directory, top=self.top).delegated(user, name)


@contextlib.contextmanager
def job_cgroup(user: User, job: int, *, version: Version = "v1") -> Iterator[JobCgroup]:
    """Make the cgroup of job ``job``; whatever is in it at the end is killed."""
    place = _place(version)
    assert place is not None, f"no cgroup hierarchy of {version}"
    top = place / f"hpcctr-test.{os.getpid()}.{job}"
    below = f"uid_{user.uid}/job_{job}/step_0" if version == "v1" else f"slurmstepd.scope/job_{job}/step_0/user/task_0"
    directory = top / below
    directory.mkdir(parents=True)
    try:
        yield JobCgroup(job=job, directory=directory, top=top)
    finally:
        wait_until(lambda: _is_removed(top), what=lambda: f"the end of what is in {top}")


def _is_removed(top: Path) -> bool:
    for directory, _, _ in os.walk(top, topdown=False):
        for line in (Path(directory) / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(line), 9)
        with contextlib.suppress(OSError):
            Path(directory).rmdir()
    return not top.exists()
