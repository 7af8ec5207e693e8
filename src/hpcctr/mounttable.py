"""The mount table of a process as the kernel has it (proc(5), mountinfo), and who serves what is mounted."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from hpcctr.proc import read_lines

_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, kw_only=True)
class MountEntry:
    """One line of mountinfo (proc(5))."""

    target: str
    #: Flags of the mount, ``ro``, ``nosuid``, …, and of the filesystem with its own options.
    options: frozenset[str]
    super_options: tuple[str, ...]
    #: ``shared:N``, ``master:N``, …
    propagation: tuple[str, ...]
    kind: str
    source: str
    #: The kernel's number of it, while it is mounted.
    number: int = 0


def read_mounts(process: int | str = "self") -> list[MountEntry]:
    """The mount table a process sees, in the kernel's order. Raises OSError when the process has ended."""
    return [_entry(line) for line in read_lines(f"/proc/{process}/mountinfo") if line]


def cgroup_hierarchies(mounts: Iterable[MountEntry]) -> dict[str, str]:
    """Where hierarchies of cgroups are mounted, by what a line of /proc/PID/cgroup names: a controller or ``name=…``
    for version 1, nothing for version 2 (cgroups(7)). What something else is mounted over is none.
    """
    tops: dict[str, str] = {}
    for entry in mounts:
        if entry.kind in ("cgroup", "cgroup2") and os.path.exists(f"{entry.target}/cgroup.procs"):
            for name in entry.super_options if entry.kind == "cgroup" else ("",):
                tops[name] = entry.target
    return tops


def mounted_by(descriptor: int) -> int | None:
    """The uid on whose behalf the filesystem of an open file is served, where a program serves it (FUSE says so in its
    options); 0 for every other filesystem. None when the mount is in no table any more. Raises OSError.
    """
    number = mount_number(descriptor)
    line = next((line for line in read_lines("/proc/self/mountinfo") if line.startswith(f"{number} ")), None)
    return None if line is None else served_by(_entry(line))


def mount_number(descriptor: int) -> int:
    """The kernel's number of the mount an open file is on (proc_pid_fdinfo(5)). Raises OSError."""
    with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("mnt_id:"))


def served_by(entry: MountEntry) -> int | None:
    """The uid on whose behalf a filesystem is served, 0 for one that the kernel serves. None where that is not said."""
    if entry.kind not in ("fuse", "fuseblk") and not entry.kind.startswith("fuse."):
        return 0
    return next((int(one[8:]) for one in entry.super_options if re.fullmatch(r"user_id=[0-9]+", one)), None)


def _entry(line: str) -> MountEntry:
    before, _, after = line.partition(" - ")
    fields = before.split(" ")
    # An empty source leaves two spaces in a row, so the parts are counted and not collected.
    kind, source, super_options = after.split(" ", 2)
    return MountEntry(
        target=_plain(fields[4]),
        options=frozenset(fields[5].split(",")),
        super_options=tuple(super_options.split(",")),
        propagation=tuple(fields[6:]),
        kind=kind,
        source=_plain(source),
        number=int(fields[0]),
    )


def _plain(escaped: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), escaped)
