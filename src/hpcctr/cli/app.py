"""The command line: one typer application, one place where errors are printed."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

import hpcctr
from hpcctr.cli import cleanup_cmd, doctor_cmd, engine_cmd, exec_cmd, gc_cmd, images_cmd, ps_cmd, run_cmd, share_cmd
from hpcctr.errors import HpcctrError

app = typer.Typer(
    name="hpcctr",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run programs in OCI containers on HPC nodes, as your own process.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hpcctr {hpcctr.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command("run", cls=run_cmd.RunCommand, context_settings={"allow_interspersed_args": False})(run_cmd.command())
app.command("exec", context_settings={"allow_interspersed_args": False})(exec_cmd.command())
app.command("pull")(images_cmd.pull)
app.command("images")(images_cmd.images)
app.command("inspect")(images_cmd.inspect)
app.command("rm")(images_cmd.rm)
app.command("gc")(gc_cmd.gc)
app.command("share")(share_cmd.share)
app.command("promote")(share_cmd.promote)
app.command("ps")(ps_cmd.ps)
app.command("cleanup")(cleanup_cmd.cleanup)
app.command("doctor")(doctor_cmd.doctor)
app.add_typer(engine_cmd.app, name="engine")


def run_command_line() -> int:
    """Run sys.argv and return the exit status: 0, the command's own, or that of an error, printed here."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # 1 or 2 is closed, and stays closed for what is executed: Python opens close-on-exec.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123
    try:
        app(prog_name="hpcctr")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except HpcctrError as error:
        sys.stdout.flush()
        error.tell()
        return error.exit_status
    except BrokenPipeError:
        # The reader of our output has enough: `hpcctr images | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    return 0
