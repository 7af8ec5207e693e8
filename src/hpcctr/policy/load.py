"""Reads ``policy.d``. Anything wrong with it denies everything and says which file: :class:`PolicyUnusable`.

It is read at every launch, so an edit counts from the next launch on. What was parsed is kept by the files' content:
no time stamp is trusted, so there is no edit that is not seen.
"""

from __future__ import annotations

import errno
import os
import stat
import threading

from hpcctr.errors import PolicyUnusable
from hpcctr.policy.rules import BUILT_IN, Rule
from hpcctr.policy.written import BYTES_MAX, parse

#: Files of a policy directory, and rules of all of them.
FILES_MAX = 200
RULES_MAX = 5000
#: Symbolic links on one path, as the kernel has it (path_resolution(7)).
_LINKS_MAX = 40
_WRITABLE = stat.S_IWGRP | stat.S_IWOTH

#: Parsing takes many times what reading does: of launches at once that find an edit, one parses it.
_parsing = threading.Lock()
#: The content of the policy directory that was read last, and its rules.
_last: tuple[str, list[tuple[str, bytes]], tuple[Rule, ...]] | None = None


def load(directory: str, *, root_owned: bool = True) -> tuple[Rule, ...]:
    """The rules of every ``*.toml`` in ``directory``; :data:`BUILT_IN` when the directory does not exist.

    Names that begin with a dot are no policy: editors make them. An existing directory without rules denies everything.
    Without ``root_owned`` it may be anybody's: for trying out what is to become policy. Raises :class:`PolicyUnusable`.
    """
    _require_plain(directory)
    if root_owned:
        require_only_roots_way(os.path.dirname(directory))
    contents = _contents(directory, root_owned=root_owned)
    if contents is None:
        return BUILT_IN
    with _parsing:
        return _rules_of(directory, contents)


def _rules_of(directory: str, contents: list[tuple[str, bytes]]) -> tuple[Rule, ...]:
    global _last  # noqa: PLW0603
    if _last is not None and _last[:2] == (directory, contents):
        return _last[2]
    rules = tuple(rule for name, raw in contents for rule in parse(raw, f"{directory}/{name}"))
    if len(rules) > RULES_MAX:
        raise PolicyUnusable(
            f"{directory}: {len(rules)} rules, {RULES_MAX} are possible", hint="several users or images in one rule"
        )
    _last = (directory, contents, rules)
    return rules


def load_file(path: str, *, root_owned: bool = True) -> tuple[Rule, ...]:
    """The rules of one file. Raises :class:`PolicyUnusable`."""
    path = os.path.abspath(path)
    directory, name = os.path.split(path)
    if root_owned:
        require_only_roots_way(directory)
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _unreadable(path, error) from None
    try:
        return parse(_read(descriptor, name, path, root_owned=root_owned), path)
    finally:
        os.close(descriptor)


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
            raise _unreadable(path, error) from None
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
        raise _unreadable(path, error) from None
    is_safe = not status.st_mode & _WRITABLE or status.st_mode & stat.S_ISVTX
    if status.st_uid != 0 or not is_safe:
        raise PolicyUnusable(
            f"{path} is not a directory that only root can write",
            hint=f"chown root:root {path} && chmod go-w {path}",
        )


def _require_plain(directory: str) -> None:
    if not directory.startswith("/") or os.path.normpath(directory) != directory or directory == "/":
        raise PolicyUnusable(
            f"policy-directory = {directory!r} is not a plain absolute path", hint="edit policy-directory of site.toml"
        )


def _contents(directory: str, *, root_owned: bool) -> list[tuple[str, bytes]] | None:
    """Name and content of every file, in order of name; None when there is no directory."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        if os.path.lexists(directory):
            raise _not_roots(directory, "directory") from None
        return None
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise _not_roots(directory, "directory") from None
        raise _unreadable(directory, error) from None
    try:
        status = os.fstat(descriptor)
        if root_owned and (status.st_uid != 0 or status.st_mode & _WRITABLE):
            raise _not_roots(directory, "directory")
        names = sorted(name for name in os.listdir(descriptor) if name.endswith(".toml") and name[0] != ".")
        if len(names) > FILES_MAX:
            raise PolicyUnusable(
                f"{directory}: {len(names)} files, {FILES_MAX} are possible", hint="put rules together"
            )
        return [(name, _read(descriptor, name, f"{directory}/{name}", root_owned=root_owned)) for name in names]
    except OSError as error:
        raise _unreadable(directory, error) from None
    finally:
        os.close(descriptor)


def _read(directory: int, name: str, path: str, *, root_owned: bool) -> bytes:
    """The content of a file, at most one byte more than one may have."""
    try:
        # Looked at first: opening a device can do something. Looked at again once it is open: that file is read.
        if not stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            raise _not_roots(path, "file")
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        try:
            before = os.fstat(file)
            if not stat.S_ISREG(before.st_mode) or (root_owned and (before.st_uid != 0 or before.st_mode & _WRITABLE)):
                raise _not_roots(path, "file")
            content = _whole(file, before.st_size)
            after = os.fstat(file)
        finally:
            os.close(file)
    except OSError as error:
        raise _unreadable(path, error) from None
    if len(content) <= BYTES_MAX and (len(content), before.st_ctime_ns) != (after.st_size, after.st_ctime_ns):
        raise PolicyUnusable(f"{path} has changed while it was read", hint="write a new file, and rename it into place")
    return content


def _whole(file: int, size: int) -> bytes:
    """What a file has, at most a byte more than it may have; ``size`` is what it is said to have."""
    wanted = min(size, BYTES_MAX) + 1
    content = os.read(file, wanted)
    # A read that gives less than it is asked for may be at the end (read(2)).
    while len(content) not in (size, wanted) and (more := os.read(file, wanted - len(content))):
        content += more
    return content


def _not_roots(path: str, kind: str) -> PolicyUnusable:
    return PolicyUnusable(
        f"{path} is not a {kind} that only root can write", hint=f"chown root:root {path} && chmod go-w {path}"
    )


def _unreadable(path: str, error: OSError) -> PolicyUnusable:
    return PolicyUnusable(f"{path}: {error.strerror}", hint=f"ls -l {path}")
