"""The full run command reads its words as the short lane does."""

from __future__ import annotations

from collections.abc import Callable

import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from hpcctr.cli import run_cmd
from hpcctr.request import RUN_OPTIONS, NeedsFullParser, RunWords


def _full(arguments: list[str]) -> RunWords | None:
    """The words as typer reads them; None when it refuses."""
    seen: list[RunWords] = []
    app = typer.Typer(rich_markup_mode=None)
    app.command("run", cls=run_cmd.RunCommand, context_settings={"allow_interspersed_args": False})(_capturing(seen))
    app.command("other")(lambda: None)
    result = CliRunner().invoke(app, ["run", *arguments])
    return seen[0] if result.exit_code == 0 else None


def _capturing(seen: list[RunWords]) -> Callable[..., None]:
    command = run_cmd.command()

    def capture(**values: object) -> None:
        seen.append(run_cmd.words_of(dict(values)))

    capture.__signature__ = command.__signature__  # type: ignore[attr-defined]
    capture.__annotations__ = command.__annotations__
    return capture


def _same(one: RunWords, other: RunWords) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in RunWords.__slots__)


_word = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6)
_plain = _word.filter(lambda word: not word.startswith("-"))
_option = st.one_of(
    *[
        st.just([flag]) if not option.metavar else st.builds(lambda flag, value: [flag, value], st.just(flag), _plain)
        for option in RUN_OPTIONS
        if not option.choices and not option.implied
        for flag in option.flags
    ],
    st.sampled_from(
        [
            ["--pull", "never"],
            ["--pull=always"],
            ["--env=A=1"],
            ["--volume=/a:/b:ro"],
            ["--gpu"],
            ["--gpu=0,1"],
            ["-e", "--gpu"],
        ]
    ),
)


@given(st.lists(_option, max_size=4), _plain.filter(bool), st.lists(_word, max_size=4), st.booleans())
def test_both_lanes_read_a_command_line_alike(
    options: list[list[str]], image: str, command: list[str], dashes: bool
) -> None:
    arguments = [word for option in options for word in option] + [image] + (["--"] if dashes else []) + command
    try:
        short = RunWords.parse(arguments)
    except NeedsFullParser:
        return
    full = _full(arguments)
    assert full is not None
    assert _same(short, full)


def test_every_option_is_in_the_help() -> None:
    app = typer.Typer(rich_markup_mode=None)
    app.command("run")(run_cmd.command())
    text = CliRunner().invoke(app, ["--help"]).output
    for option in RUN_OPTIONS:
        assert all(flag in text for flag in option.flags)
