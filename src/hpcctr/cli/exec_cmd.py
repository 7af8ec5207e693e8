"""``hpcctr exec`` as a full command: help, root's direct mode, and whatever the short lane leaves to it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import typer

from hpcctr.cli.run_cmd import command_of, made_of, options_of
from hpcctr.request import EXEC_OPTIONS, ExecWords

HELP = """Run CMD where the running program PID of yours is: in the same image, with the same directories.

The command is this very process, with your identity, limits, terminal and environment as for run; only what it sees as
files is what PID sees. It starts where PID stands. hpcctr ps lists your programs.

  hpcctr exec 4711 -- ls /data

  hpcctr exec 4711 -- gdb -p 4711
"""


def command() -> Callable[..., None]:
    """The function behind ``exec``, with a signature made from :data:`EXEC_OPTIONS`."""
    pid = typer.Argument(..., metavar="PID", help="A running program as hpcctr ps prints it.")
    words = typer.Argument(None, metavar="[--] CMD [ARG...]", help="What to run.")
    return made_of("pid", pid, words, EXEC_OPTIONS, lambda values: launch(words_of(values)), HELP)


def words_of(values: dict[str, Any]) -> ExecWords:
    """The words typer has parsed, as the short lane would have read them."""
    return ExecWords(values["pid"], command_of(values), **options_of(values, EXEC_OPTIONS))


def launch(words: ExecWords) -> int:
    """Go there. Returns only in root's direct mode."""
    if os.getuid() == 0:
        from hpcctr.cli import direct

        return direct.join(words)
    from hpcctr.client import exec as client

    return client.join(words)
