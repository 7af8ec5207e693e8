"""``hpcctr ps``: programs running in containers, read from /proc: they are ordinary processes, and nobody keeps a
list.
"""

from __future__ import annotations

import contextlib
import os
import pwd
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from hpcctr.cli.table import Format, print_rows
from hpcctr.client.run import IMAGE_VARIABLE
from hpcctr.engine.members import is_anchor, root_upper
from hpcctr.wire import RUN_DIRECTORY


def ps(
    format: Annotated[Format, typer.Option("--format", help="How to print.")] = Format.TABLE,  # noqa: A002
    show_all: Annotated[
        bool, typer.Option("--all", "-a", help="Everybody's, as far as you may see them; root sees all.")
    ] = False,
) -> None:
    """List your programs that run in containers on this node.

    They are your own processes: end one with kill, look at it with top, attach with strace -p.
    """
    print_rows(
        list(_rows(None if show_all or os.getuid() == 0 else os.getuid())), ("pid", "user", "image", "command"), format
    )


def _rows(uid: int | None) -> Iterator[dict[str, object]]:
    for entry in sorted(Path("/proc").iterdir(), key=lambda path: int(path.name) if path.name.isdigit() else 0):
        if not entry.name.isdigit():
            continue
        # A process may end between any two looks at it, and others' may not be looked at.
        with contextlib.suppress(OSError, ValueError, StopIteration):
            owner = entry.stat().st_uid
            upper = root_upper(int(entry.name)) if uid in (None, owner) else None
            if upper is None or not upper.startswith(RUN_DIRECTORY + "/") or is_anchor(int(entry.name)):
                continue
            words = (entry / "cmdline").read_bytes().split(b"\0")[:-1]
            yield {
                "pid": int(entry.name),
                "user": _user_name(owner),
                "uid": owner,
                "image": _image_of(entry),
                "command": " ".join(os.fsdecode(word) for word in words).encode(errors="replace").decode(),
            }


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _image_of(process: Path) -> str:
    """The image's name, as the launch put it into the environment; what the program made of it since is its own
    affair.
    """
    prefix = IMAGE_VARIABLE + b"="
    for entry in (process / "environ").read_bytes().split(b"\0"):
        if entry.startswith(prefix):
            return entry.removeprefix(prefix).decode(errors="replace")
    return "?"
