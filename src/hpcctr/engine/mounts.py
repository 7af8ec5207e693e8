"""Mounting as the kernel has it: mount(2), umount2(2), openat2(2).

Every path given to these functions is one of the engine's own state directory; none comes from a user or an image. What
does come from them, the names inside an image, goes through :func:`open_beneath` alone.
"""

from __future__ import annotations

import ctypes
import errno
import os

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
