"""The start script of the command hpcctr: a few lines of Python behind a first line that names front.

It takes the place of the script pip makes, which imports re, lets PYTHONPATH decide what is imported, and starts Python
directly, so that nothing knows any more which signals the caller ignored.
"""

from __future__ import annotations

import os
from pathlib import Path

from hpcctr.errors import LauncherUnusable

FIRST_LINE_MAX = 255
"""Bytes of the first line with its ``#!``: the kernel looks at 256 (BINPRM_BUF_SIZE) and its end must be among them."""


def first_line(front: str, python: str) -> str:
    """``#!FRONT PYTHON``. Raises :class:`LauncherUnusable` for names that the kernel would cut or split (execve(2))."""
    line = f"#!{front} {python}"
    if len(os.fsencode(line)) > FIRST_LINE_MAX:
        raise LauncherUnusable(
            f"{line} is a first line of {len(os.fsencode(line))} bytes, and the kernel reads {FIRST_LINE_MAX}",
            hint="install hpcctr below a shorter path, or set a shorter one as enter in site.toml",
        )
    if any(mark in front for mark in " \t\n") or "\n" in python or python != python.strip(" \t"):
        raise LauncherUnusable(
            f"{line} cannot be the first line of a script: a name has blanks where the kernel splits it",
            hint="install hpcctr below a path without blanks, or set one as enter in site.toml",
        )
    return line


def write(path: Path, *, front: str, python: str, packages: Path) -> None:
    """Make `path` the start script of the hpcctr in `packages`; it appears complete, by rename."""
    text = (
        f"{first_line(front, python)}\n"
        f"import sys\nsys.path.insert(0, {str(packages)!r})\nfrom hpcctr.__main__ import main\nmain()\n"
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.chmod(0o755)
    temporary.replace(path)


def problem(path: Path, *, front: str) -> str | None:
    """Why `path` is not a start script as :func:`write` makes it; None when it is."""
    try:
        with path.open("rb") as file:
            found = os.fsdecode(file.readline(1024).rstrip(b"\n"))
    except OSError as error:
        return error.strerror or "it cannot be read"
    wanted = f"#!{front} "
    if not found.startswith(wanted):
        return f"it begins with {found!r}, not with {wanted.rstrip()!r}"
    python = found.removeprefix(wanted)
    return None if os.access(python, os.X_OK) else f"it names {python}, which cannot be started"
