"""Puts the programs `enter`, with its file capabilities, and `front` where ordinary users start them, and finds what is
wrong there.

Whoever can replace one of the files, or a directory above it, owns every user's launch: all of them must be root's
alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import struct
import tempfile
from pathlib import Path

from hpcctr.errors import EnterUnusable

MODE = 0o711
"""Nobody but root reads it, so the kernel also keeps a running one closed to its user (ptrace(2), dumpable)."""

FRONT_MODE = 0o755
"""Nothing about it is secret, and it has no privilege."""

_XATTR = "security.capability"
_VFS_CAP_REVISION_2 = 0x02000000
_CAP_SYS_CHROOT = 18
_CAP_SYS_ADMIN = 21
CAPABILITIES = struct.pack("<IIIII", _VFS_CAP_REVISION_2, 1 << _CAP_SYS_CHROOT | 1 << _CAP_SYS_ADMIN, 0, 0, 0)
"""struct vfs_cap_data of linux/capability.h: permitted only. Without the effective bit the program starts with no
capability in force, and raises one where it needs it."""


def _require_untamperable_directories(target: Path) -> None:
    if problem := _directory_problem(target):
        reason, remedy = problem
        raise EnterUnusable(f"{target} cannot be installed: {reason}", hint=remedy)


def _directory_problem(target: Path) -> tuple[str, str] | None:
    """What is wrong with the directories above `target`: each must be root's, a directory and writable by root alone.

    A symbolic link among them is refused: its target could lie below directories that are not looked at.
    """
    if not target.is_absolute() or ".." in target.parts:
        return f"{target} is not an absolute path without ..", "give the full path"
    for directory in reversed(target.parents):
        try:
            status = directory.lstat()
        except OSError as error:
            return f"{directory}: {error.strerror}", f"install -d -m 755 {directory}"
        if not stat.S_ISDIR(status.st_mode):
            return f"{directory} is not a directory", f"use a path without symbolic links: {_resolved(target)}"
        if status.st_uid != 0:
            return f"{directory} belongs to uid {status.st_uid}, not to root", f"chown root {directory}"
        if status.st_mode & 0o022:
            return f"{directory} may be written by others than root", f"chmod go-w {directory}"
    return None


def _resolved(target: Path) -> Path:
    return Path(os.path.realpath(target.parent)) / target.name


def install_enter(built: Path, target: Path) -> None:
    """Copy `built` to `target`: root:root, mode 0711, capabilities SYS_ADMIN and SYS_CHROOT permitted. Root only.

    The new file appears complete, by rename; running ones go on with the old. Raises EnterUnusable.
    """
    _install(built, target, MODE, CAPABILITIES)
    if problem := enter_problem(target):
        reason, remedy = problem
        raise EnterUnusable(f"{target} is installed, but unusable: {reason}", hint=remedy)


def install_front(built: Path, target: Path) -> None:
    """Copy `built` to `target`: root:root, mode 0755. Root only; otherwise like :func:`install_enter`."""
    _install(built, target, FRONT_MODE, None)
    if problem := front_problem(target):
        reason, remedy = problem
        raise EnterUnusable(f"{target} is installed, but unusable: {reason}", hint=remedy)


def _install(built: Path, target: Path, mode: int, capabilities: bytes | None) -> None:
    if os.geteuid() != 0:
        raise EnterUnusable(f"{target} cannot be installed: only root may", hint="start it as root")
    _require_untamperable_directories(target)
    # A launch that is under way is refused when its enter is no longer the installed one.
    if _file_problem(target, mode) is None and _has(target, built, capabilities):
        return
    # A name nobody else has, mode 0600 until it is complete.
    temporary_fd, temporary_name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    temporary = Path(temporary_name)
    try:
        with built.open("rb") as source, os.fdopen(temporary_fd, "wb") as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            os.fchown(temporary_fd, 0, 0)
            os.fchmod(temporary_fd, mode)
            # Last: a change of owner removes capabilities.
            if capabilities is not None:
                os.setxattr(temporary_fd, _XATTR, capabilities)
            os.fsync(temporary_fd)
        temporary.replace(target)
        _sync_directory(target.parent)
    except OSError as error:
        hint = "choose a local filesystem that keeps file capabilities" if error.errno == errno.ENOTSUP else ""
        raise EnterUnusable(f"{target} cannot be installed: {error.strerror}", hint=hint) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _has(target: Path, built: Path, capabilities: bytes | None) -> bool:
    """Whether `target` is the program `built` already, with these capabilities."""
    try:
        if capabilities is not None and os.getxattr(target, _XATTR, follow_symlinks=False) != capabilities:
            return False
        return target.read_bytes() == built.read_bytes()
    except OSError:
        return False


def _sync_directory(directory: Path) -> None:
    directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory_fd)
    finally:
        os.close(directory_fd)


def _file_problem(target: Path, mode: int) -> tuple[str, str] | None:
    """What is wrong with the file itself or the directories above it."""
    reinstall = "hpcctr engine install"
    if problem := _directory_problem(target):
        return problem
    try:
        status = target.lstat()
    except FileNotFoundError:
        return "it is not there", reinstall
    except OSError as error:
        return str(error.strerror), reinstall
    if not stat.S_ISREG(status.st_mode):
        return "it is not a regular file", reinstall
    if (status.st_uid, status.st_gid) != (0, 0):
        return f"it belongs to {status.st_uid}:{status.st_gid}, not to root", reinstall
    if stat.S_IMODE(status.st_mode) != mode:
        return f"its mode is {stat.S_IMODE(status.st_mode):04o}, not {mode:04o}", reinstall
    return None


def enter_problem(target: Path) -> tuple[str, str] | None:
    """Why `target` cannot serve as enter, and the remedy; None when it can. Needs no privilege, changes nothing."""
    reinstall = "hpcctr engine install"
    if problem := _file_problem(target, MODE):
        return problem
    try:
        capabilities = os.getxattr(target, _XATTR, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return "its filesystem keeps no file capabilities", "install it on a local filesystem"
        return "it has no file capabilities", reinstall
    if capabilities != CAPABILITIES:
        return "its file capabilities are not cap_sys_admin,cap_sys_chroot=p", reinstall
    if os.statvfs(target).f_flag & os.ST_NOSUID:
        return "its filesystem is mounted nosuid", "install it where file capabilities count: findmnt -T FILE"
    return None


def front_problem(target: Path) -> tuple[str, str] | None:
    """Why `target` cannot serve as front, as :func:`enter_problem` does for enter."""
    if problem := _file_problem(target, FRONT_MODE):
        return problem
    if os.statvfs(target).f_flag & os.ST_NOEXEC:
        return "its filesystem is mounted noexec", "install it where programs may run: findmnt -T FILE"
    return None
