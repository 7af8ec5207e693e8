"""Mounting as the kernel has it: mount(2), umount2(2), openat2(2) and the mount table.

Every path given to these functions is one of the engine's own state directory; none comes from a user or an image. What
does come from them, the names inside an image, goes through :func:`open_beneath` alone.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from hpcctr.proc import read_lines

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
_MNT_DETACH = 0x2
_UMOUNT_NOFOLLOW = 0x8
#: The same number on every architecture: system calls added since Linux 5.1 are numbered alike.
_SYS_OPENAT2 = 437
_RESOLVE_NO_XDEV = 0x01
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_IN_ROOT = 0x10
_RESOLVE = _RESOLVE_IN_ROOT | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS
_OCTAL = re.compile(r"\\([0-7]{3})")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.mount.restype = ctypes.c_int
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.umount2.restype = ctypes.c_int
_libc.syscall.restype = ctypes.c_long


class _OpenHow(ctypes.Structure):
    """struct open_how of linux/openat2.h."""

    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]  # noqa: RUF012


def mount(source: str, target: str, kind: str, *, flags: int, data: str = "") -> None:
    """mount(2) of a new filesystem. Raises OSError."""
    if _libc.mount(os.fsencode(source), os.fsencode(target), kind.encode(), flags, data.encode()) != 0:
        _raise(target)


def unmount(target: str) -> None:
    """Take the topmost mount off ``target``, at once or, when something uses it, as soon as nothing does.

    A directory that carries no mount, or does not exist, is fine. Raises OSError for anything else.
    """
    for flags in (_UMOUNT_NOFOLLOW, _UMOUNT_NOFOLLOW | _MNT_DETACH):
        if _libc.umount2(os.fsencode(target), flags) == 0:
            return
        if ctypes.get_errno() != errno.EBUSY:
            break
    if ctypes.get_errno() not in (errno.EINVAL, errno.ENOENT):
        _raise(target)


def open_beneath(
    directory: int, untrusted_name: bytes, *, is_link_opened: bool = False, is_mount_crossed: bool = False
) -> int:
    """An O_PATH descriptor of ``untrusted_name`` below ``directory``, on the same mount and through no symbolic link.

    With ``is_link_opened`` a name that is a link itself is opened as what it is. Raises OSError: ELOOP for a link,
    EXDEV for a mount unless ``is_mount_crossed``, ENOENT for nothing, ENOTDIR for a file on the way.
    """
    flags = os.O_PATH | os.O_CLOEXEC | (os.O_NOFOLLOW if is_link_opened else 0)
    how = _OpenHow(flags, 0, _RESOLVE | (0 if is_mount_crossed else _RESOLVE_NO_XDEV))
    descriptor = _libc.syscall(
        ctypes.c_long(_SYS_OPENAT2),
        ctypes.c_int(directory),
        ctypes.c_char_p(untrusted_name),
        ctypes.byref(how),
        ctypes.c_size_t(ctypes.sizeof(how)),
    )
    if descriptor < 0:
        _raise(os.fsdecode(untrusted_name))
    return int(descriptor)


def _raise(path: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), path)


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
