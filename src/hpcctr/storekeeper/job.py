"""What a storekeeper is started with: decided by root, read by root's own child."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from hpcctr.errand import Errand
from hpcctr.errors import CallerRefused
from hpcctr.mounttable import cgroup_hierarchies, read_mounts
from hpcctr.proc import read_lines
from hpcctr.site import Site


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process is, as far as a child of another parent would have to be told."""

    #: ``cgroup.procs`` of its cgroup in every hierarchy.
    cgroups: tuple[str, ...]
    niceness: int
    processors: tuple[int, ...]

    @classmethod
    def of_process(cls, pid: int) -> Place:
        """The place of a process whose pidfd is held. Raises :class:`CallerRefused`."""
        try:
            return cls(
                cgroups=tuple(_procs_files(pid, read_lines(f"/proc/{pid}/cgroup"))),
                niceness=os.getpriority(os.PRIO_PROCESS, pid),
                processors=tuple(sorted(os.sched_getaffinity(pid))),
            )
        except OSError:
            raise CallerRefused(f"pid {pid} has ended") from None


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One storekeeper."""

    errand: Errand
    site: Site
    #: Whose errand: selects the part of the store. 0: the site's.
    uid: int
    #: Their groups, the primary one included: what is shared with those is shared with them.
    gids: tuple[int, ...] = ()
    #: The store's owner, who the storekeeper becomes.
    owner_uid: int
    owner_gid: int
    #: The caller's place; None where the storekeeper is a child of the caller's anyway.
    place: Place | None
    #: Descriptors: the socket to the user's command, and where the outcome is written for whoever started it.
    peer: int
    outcome: int


def _procs_files(pid: int, lines: list[str]) -> Iterator[str]:
    """``cgroup.procs`` for each line of /proc/PID/cgroup (cgroups(7): ``ID:CONTROLLERS:PATH``)."""
    tops = cgroup_hierarchies(read_mounts())
    for line in lines:
        _, controllers, path = line.split(":", 2)
        top = tops.get(controllers.split(",")[0])
        if top is None:
            continue  # nobody manages a hierarchy that is not mounted
        if ".." in path.split("/"):
            raise CallerRefused(
                f"pid {pid} is in a cgroup the engine cannot see: {path}", hint="start hpcctr outside that container"
            )
        yield f"{top}{path.rstrip('/')}/cgroup.procs"
