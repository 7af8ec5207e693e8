"""Turns a plan into enter's argv and becomes enter. The plan's format is described in ``enter/README.md``."""

from __future__ import annotations

# The C half of signal, whose Python half imports enum.
import _signal  # type: ignore[import-not-found]
import os
import sys

from hpcctr.errors import EnterUnusable, NoCommand

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

    from hpcctr.client.carry import Mount

_PLAN_FORMAT = b"1"
_CANDIDATES_MAX = 256
#: Key of the -X option by which front (client/front.c) tells what this process was before Python started.
_FRONT_OPTION = "hpcctr-caller"
_SIGPIPE_IGNORED = 1
_SIGXFSZ_IGNORED = 2
_LAST_SIGNAL = 64


def candidates(command: bytes, path: bytes) -> list[bytes]:
    """The files execvp(3) would try for ``command``: itself when it has a slash, else one for each directory of
    ``path``.
    """
    if not command:
        raise NoCommand("the command is an empty word", hint="hpcctr run IMAGE -- CMD")
    if b"/" in command:
        return [command]
    return [(directory or b".") + b"/" + command for directory in path.split(b":")][:_CANDIDATES_MAX]


def plan(
    descriptor: int,
    mounts: Sequence[Mount],
    directory: bytes,
    command: Sequence[bytes],
    path: bytes,
    *,
    kernel_trees: Sequence[bytes],
) -> list[bytes]:
    """enter's argv."""
    tries = candidates(command[0], path)
    _, pdeathsig = told_by_front()
    words = [b"hpcctr-enter", _PLAN_FORMAT, b"%d" % descriptor, b"%d" % _personality(), b"%d" % pdeathsig]
    words.append(b"%d" % (len(kernel_trees) + len(mounts)))
    for tree in kernel_trees:
        words += [tree + b"/.", tree, b"rw"]
    for mount in mounts:
        words += [mount.source_word, mount.target, b"ro" if mount.read_only else b"rw"]
    return [*words, directory, b"%d" % len(tries), *tries, *command]


def become(program: bytes, argv: list[bytes], environment: dict[bytes, bytes] | None = None) -> NoReturn:
    """execve enter, with ``environment`` or this process's. Raises :class:`EnterUnusable` when that fails.

    Python ignores SIGPIPE and SIGXFSZ at its start; an ignored signal stays ignored over execve, so the caller's
    dispositions are put back.
    """
    ignored, _ = told_by_front()
    for number, bit in ((_signal.SIGPIPE, _SIGPIPE_IGNORED), (_signal.SIGXFSZ, _SIGXFSZ_IGNORED)):
        _signal.signal(number, _signal.SIG_IGN if ignored & bit else _signal.SIG_DFL)
    try:
        # Becoming enter is the point.
        if environment is None:
            os.execv(program, argv)  # noqa: S606
        else:
            os.execve(program, argv, environment)  # noqa: S606
    except OSError as error:
        raise EnterUnusable(
            f"{os.fsdecode(program)}: {error.strerror}", hint="an administrator runs: hpcctr engine install"
        ) from None


def _personality() -> int:
    """This process's personality(2): the kernel clears bits of it when a program with capabilities starts."""
    try:
        with open("/proc/self/personality", "rb") as file:
            return int(file.read(), 16)
    except OSError:
        return 0


def told_by_front() -> tuple[int, int]:
    """(which of SIGPIPE and SIGXFSZ the caller ignored, the parent death signal), as front found them.

    Python knows neither, and the kernel clears the parent death signal when a program with capabilities starts. Without
    front, behind pip's own start script: none ignored, none set.
    """
    told = sys._xoptions.get(_FRONT_OPTION, "")
    ignored, _, pdeathsig = told.partition(":") if isinstance(told, str) else ("", "", "")
    if not (ignored.isascii() and ignored.isdigit() and pdeathsig.isascii() and pdeathsig.isdigit()):
        return 0, 0
    return int(ignored), int(pdeathsig) if int(pdeathsig) <= _LAST_SIGNAL else 0
