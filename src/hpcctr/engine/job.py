"""The programs of one batch job that run in containers of hpcctr, and their end.

A process is a job's when the kernel's cgroups say so: Slurm's cgroup plug-ins make a directory ``job_ID`` in every
hierarchy they use (cgroup/v1: ``/slurm/uid_UID/job_ID/step_…``, cgroup/v2: ``…/slurmstepd.scope/job_ID/step_…``). A
variable of the environment is anybody's to set, and so is the name of a cgroup below one that was delegated to a user:
a directory counts only when it and all above it are root's, and none above it is a job's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import signal
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hpcctr.context import read_status
from hpcctr.engine.members import living_threads, root_upper
from hpcctr.mounttable import MountEntry, cgroup_hierarchies, read_mounts
from hpcctr.proc import read_lines
from hpcctr.wire import RUN_DIRECTORY

_JOB = re.compile(r"job_[1-9][0-9]*")
#: Seconds until the job's cgroups are read again while something in them has not ended.
_ROUND_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Program:
    """A process, as it was when it was looked at."""

    pid: int
    uid: int
    #: Its comm (proc(5)): 15 bytes that the program chooses.
    name: str
    #: One letter of proc(5); ``D`` waits in the kernel and cannot be interrupted.
    state: str


def end(job: int, *, seconds: float) -> tuple[list[Program], list[Program]]:
    """Kill the job's programs until none is left: (those that were sent SIGKILL, those that still live).

    ``seconds`` is what they may take to end. Raises OSError when the node's mounts cannot be read.
    """
    cgroups = JobCgroups.of(job, read_mounts())
    late = time.monotonic() + seconds
    killed: dict[tuple[int, str], Program] = {}
    while True:
        living: dict[int, Program] = {}
        is_quiet = True
        try:
            for pid in cgroups.pids():
                pidfd = _pidfd(pid)
                if pidfd is None:
                    # It was there a moment ago; what it has started meanwhile is not in this list.
                    is_quiet = False
                    continue
                program = _program(pid, pidfd, cgroups)
                if program is None:
                    os.close(pidfd)
                    continue
                living[pidfd] = program
                # At once, before it can start another.
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                killed.setdefault((pid, _start(pid)), program)
            _wait(living, min(_ROUND_SECONDS, late - time.monotonic()))
            survivors = [_now(program) for pidfd, program in living.items() if not _has_ended(pidfd)]
        finally:
            for pidfd in living:
                os.close(pidfd)
        if (not living and is_quiet) or time.monotonic() >= late:
            return list(killed.values()), survivors


@dataclass(frozen=True, kw_only=True)
class JobCgroups:
    """The cgroups of one job."""

    #: The job's directory in each hierarchy.
    directories: Sequence[str]
    #: Of :func:`hpcctr.mounttable.cgroup_hierarchies`.
    places: Mapping[str, str]

    @classmethod
    def of(cls, job: int, mounts: Sequence[MountEntry]) -> JobCgroups:
        """Find them below the hierarchies of a mount table."""
        places = cgroup_hierarchies(mounts)
        directories = [found for top in sorted(set(places.values())) for found in _find(top, f"job_{job}")]
        return cls(directories=directories, places=places)

    def pids(self) -> set[int]:
        """The processes in them, at the moment each is read."""
        found: set[int] = set()
        for top in self.directories:
            for directory in _directories_below(top):
                # Gone with its last process; or one of threads, whose processes are listed above it.
                with contextlib.suppress(OSError):
                    procs = os.open("cgroup.procs", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
                    with open(procs, encoding="ascii") as file:
                        found.update(map(int, file))
        return found

    def have(self, thread: int) -> bool:
        """Whether a thread is in one of them. Raises OSError when it has ended."""
        try:
            lines = read_lines(f"/proc/{thread}/cgroup")
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            # Deeper than a path can tell: then the cgroups have to.
            return int(read_status(thread)["Tgid"]) in self.pids()
        for line in lines:
            controllers, _, path = line.partition(":")[2].partition(":")
            place = self.places.get(controllers.split(",")[0], "") + path + "/"
            if any(place.startswith(directory + "/") for directory in self.directories):
                return True
        return False


def _directories_below(top: str) -> Iterator[int]:
    """A descriptor of each directory from ``top`` down, for as long as it is looked at.

    Users may nest theirs deeper than a path, Python's recursion and the descriptors of this process would reach.
    """
    step = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    waiting = [[top]]
    directory = os.open("/", step)
    try:
        while waiting:
            name = waiting[-1].pop() if waiting[-1] else ".."
            try:
                there = os.open(name, step, dir_fd=directory)
            except FileNotFoundError:
                # Gone meanwhile; a parent is there also for who is in a directory that has gone.
                continue
            os.close(directory)
            directory = there
            if name == "..":
                waiting.pop()
                continue
            yield directory
            waiting.append([])
            with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
                waiting[-1] += [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    finally:
        os.close(directory)


def _find(top: str, name: str) -> Iterator[str]:
    """The directories ``name`` in a hierarchy, through directories of root's that are no job's."""
    waiting = [top]
    while waiting:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False) or entry.stat(follow_symlinks=False).st_uid != 0:
                    continue
                if entry.name == name:
                    yield entry.path
                elif _JOB.fullmatch(entry.name) is None:
                    waiting.append(entry.path)


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def _program(pid: int, pidfd: int, cgroups: JobCgroups) -> Program | None:
    """The process ``pid`` if it is to be killed: alive, in the job's cgroups and in a container of this node."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        status = read_status(pid)
        # Last the pidfd: while the process lives its number is nobody else's, so all that was read is about it.
        if any(_is_inside(thread, cgroups) for thread in living_threads(pid)) and not _has_ended(pidfd):
            return _parse(pid, status)
    return None


def _is_inside(thread: int, cgroups: JobCgroups) -> bool:
    """Whether a thread is in the job's cgroups and has the root of a container of this node.

    It may have gone on to a mount namespace of its own making, and have the same root there.
    """
    with contextlib.suppress(OSError):
        return cgroups.have(thread) and (root_upper(thread) or "").startswith(RUN_DIRECTORY + "/")
    return False


def _parse(pid: int, status: Mapping[str, str]) -> Program:
    return Program(pid=pid, uid=int(status["Uid"].split()[0]), name=status["Name"], state=status["State"][:1])


def _now(program: Program) -> Program:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return _parse(program.pid, read_status(program.pid))
    return program


def _start(pid: int) -> str:
    """When a process started, in clock ticks since boot (proc_pid_stat(5)): tells two of the same number apart."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _wait(pidfds: Collection[int], seconds: float) -> None:
    """Until all have ended, or for so long."""
    late = time.monotonic() + seconds
    poll = select.poll()
    for pidfd in pidfds:
        poll.register(pidfd, select.POLLIN)
    remaining = len(pidfds)
    while remaining and (rest := late - time.monotonic()) > 0:
        for pidfd, _ in poll.poll(rest * 1000):
            poll.unregister(pidfd)
            remaining -= 1


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
