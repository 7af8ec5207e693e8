"""Files that only root can have written, as policy and profiles are: each is looked at before it is opened, looked at
again on the descriptor that is read, and lies in directories of root's all the way.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

from hpcctr.errors import HpcctrError, PolicyUnusable

#: Symbolic links on one path, as the kernel has it (path_resolution(7)).
_LINKS_MAX = 40
_WRITABLE = stat.S_IWGRP | stat.S_IWOTH


def require_only_roots_way(directory: str) -> None:
    """Raise :class:`PolicyUnusable` when somebody but root can make ``directory`` lead elsewhere.

    Every directory on the way, through links of root's as well, is root's and written by nobody else, or sticky: there
    nobody moves away what is root's (inode(7)). What does not exist leads nowhere.
    """
    here, waiting, links = "/", _parts(directory), 0
    while True:
        _require_roots_directory(here)
        if not waiting:
            return
        path = os.path.join(here, waiting.pop(0))
        try:
            status = os.lstat(path)
            if not stat.S_ISLNK(status.st_mode):
                here = path
                continue
            target = os.readlink(path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise unreadable(path, error) from None
        links += 1
        if status.st_uid != 0:
            raise PolicyUnusable(f"{path} is a symbolic link of uid {status.st_uid}'s", hint=f"ls -l {path}")
        if links > _LINKS_MAX:
            raise PolicyUnusable(f"{path}: {os.strerror(errno.ELOOP)}", hint=f"namei -l {directory}")
        if target.startswith("/"):
            here = "/"
        waiting[:0] = _parts(target)


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _require_roots_directory(path: str) -> None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise unreadable(path, error) from None
    is_safe = not status.st_mode & _WRITABLE or status.st_mode & stat.S_ISVTX
    if status.st_uid != 0 or not is_safe:
        raise PolicyUnusable(
            f"{path} is not a directory that only root can write",
            hint=f"chown root:root {path} && chmod go-w {path}",
        )


def contents(
    directory: str, *, bytes_max: int, files_max: int, root_owned: bool, too_many: Callable[[str], HpcctrError]
) -> list[tuple[str, bytes]] | None:
    """Name and content of every ``*.toml`` in a directory, in order of name; None when there is no directory.

    Names that begin with a dot are none: editors make them. Of a file that is larger than ``bytes_max``, one byte more.
    Raises :class:`PolicyUnusable`, and for more than ``files_max`` what ``too_many`` makes of a text.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        if os.path.lexists(directory):
            raise _not_roots(directory, "directory") from None
        return None
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise _not_roots(directory, "directory") from None
        raise unreadable(directory, error) from None
    try:
        status = os.fstat(descriptor)
        if root_owned and (status.st_uid != 0 or status.st_mode & _WRITABLE):
            raise _not_roots(directory, "directory")
        names = sorted(name for name in os.listdir(descriptor) if name.endswith(".toml") and name[0] != ".")
        if len(names) > files_max:
            raise too_many(f"{directory}: {len(names)} files, {files_max} are possible")
        return [
            (name, content(descriptor, name, f"{directory}/{name}", bytes_max=bytes_max, root_owned=root_owned))
            for name in names
        ]
    except OSError as error:
        raise unreadable(directory, error) from None
    finally:
        os.close(descriptor)


def content(directory: int, name: str, path: str, *, bytes_max: int, root_owned: bool) -> bytes:
    """The content of a file, at most one byte more than one may have. Raises :class:`PolicyUnusable`."""
    try:
        # Looked at first: opening a device can do something. Looked at again once it is open: that file is read.
        if not stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            raise _not_roots(path, "file")
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        try:
            before = os.fstat(file)
            if not stat.S_ISREG(before.st_mode) or (root_owned and (before.st_uid != 0 or before.st_mode & _WRITABLE)):
                raise _not_roots(path, "file")
            found = _whole(file, before.st_size, bytes_max)
            after = os.fstat(file)
        finally:
            os.close(file)
    except OSError as error:
        raise unreadable(path, error) from None
    if len(found) <= bytes_max and (len(found), before.st_ctime_ns) != (after.st_size, after.st_ctime_ns):
        raise PolicyUnusable(f"{path} has changed while it was read", hint="write a new file, and rename it into place")
    return found


def _whole(file: int, size: int, bytes_max: int) -> bytes:
    """What a file has, at most a byte more than it may have; ``size`` is what it is said to have."""
    wanted = min(size, bytes_max) + 1
    content = os.read(file, wanted)
    # A read that gives less than it is asked for may be at the end (read(2)).
    while len(content) not in (size, wanted) and (more := os.read(file, wanted - len(content))):
        content += more
    return content


def _not_roots(path: str, kind: str) -> PolicyUnusable:
    return PolicyUnusable(
        f"{path} is not a {kind} that only root can write", hint=f"chown root:root {path} && chmod go-w {path}"
    )


def unreadable(path: str, error: OSError) -> PolicyUnusable:
    return PolicyUnusable(f"{path}: {error.strerror}", hint=f"ls -l {path}")
