"""``hpcctr run`` as a full command: help, ``--explain``, root's direct mode, and whatever the short lane leaves to
it.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import typer
from typer.core import TyperCommand

from hpcctr.client.run import prepare, run
from hpcctr.errors import ImageNotInStore
from hpcctr.request import RUN_OPTIONS, Option, RunWords, spelled_out

HELP = """Run CMD in a container of IMAGE, as this very process.

The program keeps your identity, limits, cgroup, terminal and descriptors; only the root filesystem is the image's. Your
working directory, home and /tmp are where they are outside.

  hpcctr run debian:12 -- cat /etc/os-release

  mpirun -n 8 hpcctr run my/solver:1.2 -- solver input.dat

  srun -n 64 hpcctr run -v /data:/data:ro my/solver:1.2 -- solver /data/input.dat

Without CMD the image's own entrypoint and command run. hpcctr's own failures end with 125, a refusal or a program that
cannot be executed with 126, a program that is not found with 127; anything else is the program's own end.
"""


class RunCommand(TyperCommand):
    """``run`` reads an option without its value as the short lane does."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - click's, which typer hides
        return super().parse_args(ctx, spelled_out(args, RUN_OPTIONS))


def parameter(option: Option) -> inspect.Parameter:
    """An option as typer wants it: a parameter of a function's signature."""
    annotation: Any
    default: Any
    if not option.metavar:
        annotation, default = bool, False
    elif option.repeated:
        annotation, default = list[str] | None, None
    else:
        annotation, default = str | None, None
    declared = typer.Option(default, *option.flags, help=option.help, metavar=option.metavar or None)
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=declared, annotation=annotation)


def command() -> Callable[..., None]:
    """The function behind ``run``, with a signature made from :data:`RUN_OPTIONS`."""
    image = typer.Argument(..., metavar="IMAGE", help="A name or digest as hpcctr images prints it.")
    words = typer.Argument(None, metavar="[--] [CMD [ARG...]]", help="What to run; default: what the image says.")
    return made_of("image", image, words, RUN_OPTIONS, lambda values: launch(words_of(values)), HELP)


def made_of(
    name: str,
    argument: Any,  # noqa: ANN401 - typer's own declarations have no type
    words: Any,  # noqa: ANN401
    options: Sequence[Option],
    run: Callable[[dict[str, Any]], int],
    help: str,  # noqa: A002
) -> Callable[..., None]:
    """A function for typer: one ``argument`` of that name, the ``words`` of a command, and ``options``; ends with what
    ``run`` makes of their values.
    """

    def function(**values: Any) -> None:  # noqa: ANN401 - typer fills it in from the signature below
        raise SystemExit(run(values))

    def positional(name: str, declared: Any, annotation: Any) -> inspect.Parameter:  # noqa: ANN401
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=declared, annotation=annotation)

    parameters = [
        positional(name, argument, str),
        positional("command", words, list[str] | None),
        *map(parameter, options),
    ]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {one.name: one.annotation for one in parameters}
    function.__doc__ = help
    return function


def words_of(values: dict[str, Any]) -> RunWords:
    """The words typer has parsed, as the short lane would have read them."""
    return RunWords(values["image"], command_of(values), **options_of(values, RUN_OPTIONS))


def command_of(values: dict[str, Any]) -> list[bytes]:
    """CMD and its arguments, without the ``--`` before them."""
    command = list(values["command"] or ())
    if command[:1] == ["--"]:
        command.pop(0)
    return [os.fsencode(word) for word in command]


def options_of(values: dict[str, Any], known: Sequence[Option]) -> dict[str, Any]:
    """The options that were given, with values as the short lane would have read them."""
    options: dict[str, Any] = {}
    for option in known:
        value = values[option.name]
        if value is None or value is False:
            continue
        if option.repeated:
            options[option.name] = tuple(map(os.fsencode, value))
        else:
            options[option.name] = os.fsencode(value) if option.name in ("workdir", "entrypoint") else value
    return options


def launch(words: RunWords) -> int:
    """Run or explain. Returns only in root's direct mode and after ``--explain``."""
    words = words.settled()
    if os.getuid() == 0:
        from hpcctr.cli import direct

        return direct.run(words)
    from hpcctr.cli.bringing import bring_for

    if words.pull == "always":
        bring_for(words)
    if words.explain:
        from hpcctr.cli.explain import show

        _, planned = prepare(words)
        show(planned)
        return 0
    try:
        run(words)
    except ImageNotInStore as error:
        if words.pull == "never":
            raise
        missing = error
    bring_for(words, missing)
    return run(words)
