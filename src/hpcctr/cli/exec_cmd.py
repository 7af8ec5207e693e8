"""``hpcctr exec`` as a full command: help, root's direct mode, and whatever the short lane leaves to it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import typer

from hpcctr.cli.run_cmd import command_of, options_of, parameter
from hpcctr.request import EXEC_OPTIONS, ExecWords

HELP = """Run CMD where the running program PID of yours is: in the same image, with the same directories.

The command is this very process, with your identity, limits, terminal and environment as for run; only what it sees as
files is what PID sees. It starts where PID stands. hpcctr ps lists your programs.

  hpcctr exec 4711 -- ls /data

  hpcctr exec 4711 -- gdb -p 4711
"""


def command() -> Callable[..., None]:
    """The function behind ``exec``, with a signature made from :data:`EXEC_OPTIONS`."""

    def exec_command(**values: Any) -> None:  # noqa: ANN401 - typer fills it in from the signature below
        raise SystemExit(launch(words_of(values)))

    positional = [
        inspect.Parameter(
            "pid",
            inspect.Parameter.KEYWORD_ONLY,
            default=typer.Argument(..., metavar="PID", help="A running program as hpcctr ps prints it."),
            annotation=str,
        ),
        inspect.Parameter(
            "command",
            inspect.Parameter.KEYWORD_ONLY,
            default=typer.Argument(None, metavar="[--] CMD [ARG...]", help="What to run."),
            annotation=list[str] | None,
        ),
    ]
    parameters = [*positional, *map(parameter, EXEC_OPTIONS)]
    exec_command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    exec_command.__annotations__ = {one.name: one.annotation for one in parameters}
    exec_command.__doc__ = HELP
    return exec_command


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
