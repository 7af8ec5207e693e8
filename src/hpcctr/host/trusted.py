"""Whose a file of the host's is: what goes into containers of everybody is what no user can write or put in place.

Everything is looked at by lstat(2), directory by directory, through symbolic links of root's as well. Sockets are the
exception in one respect: a daemon's account may own them and their directory (munge, nvidia-persistenced). Nothing of
a socket is loaded into a program.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field
from typing import Literal

from hpcctr.errors import FeatureUnusable
from hpcctr.mounttable import MountEntry, mount_number, read_mounts, served_by

#: Symbolic links on one path, as the kernel has it (path_resolution(7)).
_LINKS_MAX = 40
#: The accounts of daemons (login.defs(5), SYS_UID_MAX).
_DAEMON_UID_MAX = 999
_WRITABLE = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, kw_only=True)
class Trusted:
    """A file (or socket) or a directory of the host's, as it is now."""

    #: Absolute, without symbolic links.
    path: str
    kind: Literal["d", "f"]
    #: What :func:`identity_of` says of it.
    identity: str
    #: Flags of the mount it is on: ``ro``, ``noexec``, …
    options: frozenset[str] = frozenset()


def require_only_roots(path: str, *, origin: str = "") -> Trusted:
    """What ``path`` leads to, if only root can have put it there and only root can write it.

    ``origin`` is what names the path, for the text. Raises :class:`FeatureUnusable`.
    """
    return Look().require(path, origin=origin)


def identity_of(status: os.stat_result) -> str:
    """A text that is another one when a file has been replaced or written. What is in a directory may change."""
    if stat.S_ISDIR(status.st_mode):
        return f"{status.st_dev}:{status.st_ino}"
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


@dataclass(kw_only=True)
class Look:
    """One look at the host: what has been seen on the way to one file is not asked for again on the way to the next."""

    _seen: dict[str, tuple[os.stat_result, str]] = field(default_factory=dict)
    _mounts: list[MountEntry] = field(default_factory=list)

    def require(self, path: str, *, origin: str = "") -> Trusted:
        """As :func:`require_only_roots`."""
        said = f"{origin}: {path}" if origin else path
        if not path.startswith("/") or "\0" in path:
            raise FeatureUnusable(f"{said!r} is not an absolute path", hint="name it from the root directory")
        found = self._walk(path, said)
        status, options = self._opened(found, said)
        kind = status.st_mode
        if stat.S_ISDIR(kind):
            is_safe = _is_roots_directory(status)
        elif stat.S_ISREG(kind):
            is_safe = status.st_uid == 0 and not kind & _WRITABLE
        elif stat.S_ISSOCK(kind):
            is_safe = status.st_uid <= _DAEMON_UID_MAX
        else:
            raise FeatureUnusable(f"{said} is neither a file nor a directory nor a socket", hint=f"ls -l {path}")
        if not is_safe:
            raise _not_roots(said, found)
        return Trusted(
            path=found, kind="d" if stat.S_ISDIR(kind) else "f", identity=identity_of(status), options=options
        )

    def mounts(self) -> list[MountEntry]:
        """The host's mount table, as it was when it was needed first."""
        if not self._mounts:
            self._mounts = read_mounts()
        return self._mounts

    def _walk(self, path: str, said: str) -> str:
        here, waiting, links = "/", _parts(path), 0
        #: Directories of daemons on the way, which lead to sockets only.
        daemons = ""
        while True:
            status, _ = self._lstat(here, said)
            if not waiting:
                break
            if waiting[0] == "..":
                here = os.path.dirname(here)
                waiting.pop(0)
                continue
            if not stat.S_ISDIR(status.st_mode):
                raise FeatureUnusable(f"{said}: {here} is not a directory", hint=f"ls -l {here}")
            if not _is_roots_directory(status):
                is_daemons = 0 < status.st_uid <= _DAEMON_UID_MAX and not status.st_mode & stat.S_IWOTH
                if not is_daemons:
                    raise _not_roots(said, here)
                daemons = daemons or here
            step = os.path.join(here, waiting.pop(0))
            device = status.st_dev
            status, link = self._lstat(step, said)
            if not stat.S_ISLNK(status.st_mode):
                if status.st_dev != device:
                    # A link below it would be whatever who serves it likes it to be.
                    self._opened(step, said)
                here = step
                continue
            links += 1
            if status.st_uid != 0:
                raise _not_roots(said, step)
            if links > _LINKS_MAX:
                raise FeatureUnusable(f"{said}: {os.strerror(errno.ELOOP)}", hint=f"namei -l {path}")
            if link.startswith("/"):
                here = "/"
            waiting[:0] = _parts(link)
        if daemons and not stat.S_ISSOCK(status.st_mode):
            raise _not_roots(said, daemons)
        return here

    def _lstat(self, path: str, said: str) -> tuple[os.stat_result, str]:
        known = self._seen.get(path)
        if known is None:
            try:
                status = os.lstat(path)
                known = status, os.readlink(path) if stat.S_ISLNK(status.st_mode) else ""
            except OSError as error:
                raise FeatureUnusable(
                    f"{said}: {_reason(error)}",
                    hint=f"ls -l {path}; a driver that was updated or removed needs its files written anew",
                ) from None
            self._seen[path] = known
        return known

    def _opened(self, path: str, said: str) -> tuple[os.stat_result, frozenset[str]]:
        """What it is, and its mount's flags. A filesystem that a user's program serves answers everyone as it likes."""
        is_directory = stat.S_ISDIR(self._seen[path][0].st_mode)
        # Of a directory that is mounted when it is needed, what is mounted.
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_DIRECTORY if is_directory else 0)
        try:
            descriptor = os.open(path, flags)
        except OSError as error:
            raise FeatureUnusable(f"{said}: {_reason(error)}", hint="try again") from None
        try:
            entry = self._mount(mount_number(descriptor))
            if entry is None or served_by(entry) != 0:
                raise FeatureUnusable(
                    f"{said} is on a filesystem that a program of a user's serves (FUSE)", hint=f"findmnt -T {path}"
                )
            status = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        if not is_directory and identity_of(status) != identity_of(self._seen[path][0]):
            raise FeatureUnusable(f"{said} changed while it was looked at", hint="try again")
        return status, entry.options

    def _mount(self, number: int) -> MountEntry | None:
        for _ in range(2):
            entry = next((entry for entry in self.mounts() if entry.number == number), None)
            if entry is not None:
                return entry
            # Mounted since.
            self._mounts = []
        return None


def _is_roots_directory(status: os.stat_result) -> bool:
    """In a sticky directory nobody moves away what is root's (inode(7))."""
    return status.st_uid == 0 and (not status.st_mode & _WRITABLE or bool(status.st_mode & stat.S_ISVTX))


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _not_roots(said: str, path: str) -> FeatureUnusable:
    what = f"{said} is" if said.endswith(path) else f"{said}: {path} is"
    return FeatureUnusable(
        f"{what} not root's alone, and goes into containers of every user",
        hint=f"chown root:root {path} && chmod go-w {path}; namei -l {path}",
    )


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
