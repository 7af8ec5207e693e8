"""Turns a plan into enter's argv and becomes enter. The plan's format is described in ``enter/README.md``."""

from __future__ import annotations

# The C half of signal, whose Python half imports enum.
import _signal  # type: ignore[import-not-found]
import os

from hpcctr.errors import EnterUnusable, NoCommand

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

    from hpcctr.client.carry import Mount

_PLAN_FORMAT = b"1"
_CANDIDATES_MAX = 256
_PR_GET_PDEATHSIG = 2


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
    words = [b"hpcctr-enter", _PLAN_FORMAT, b"%d" % descriptor, b"%d" % _personality(), b"%d" % _parent_death_signal()]
    words.append(b"%d" % (len(kernel_trees) + len(mounts)))
    for tree in kernel_trees:
        words += [tree + b"/.", tree, b"rw"]
    for mount in mounts:
        words += [mount.source_word, mount.target, b"ro" if mount.read_only else b"rw"]
    return [*words, directory, b"%d" % len(tries), *tries, *command]


def become(program: bytes, argv: list[bytes], environment: dict[bytes, bytes]) -> NoReturn:
    """execve enter. Raises :class:`EnterUnusable` when that fails.

    Python ignores SIGPIPE and SIGXFSZ at its start; an ignored signal stays ignored over execve, so both are put back.
    """
    for number in (_signal.SIGPIPE, _signal.SIGXFSZ):
        _signal.signal(number, _signal.SIG_DFL)
    try:
        os.execve(  # noqa: S606 - becoming enter is the point
            program, argv, environment
        )
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


def _parent_death_signal() -> int:
    """This process's PR_GET_PDEATHSIG, which the kernel clears when a program with capabilities starts; 0 when none is
    set.

    ``_ctypes`` is the only part of the standard library that reaches prctl(2).
    """
    try:
        import _ctypes

        prctl = _ctypes.dlsym(_ctypes.dlopen(None, 0), "prctl")  # type: ignore[arg-type]  # None: this very process
        value = bytes(bytearray(4))
        _ctypes.call_function(prctl, (_PR_GET_PDEATHSIG, value))
    except (ImportError, OSError):
        return 0
    number = int.from_bytes(value, "little")
    return number if 0 <= number <= 64 else 0
