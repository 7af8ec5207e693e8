"""The full exec command reads its words as the short lane does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from hpcctr.cli import exec_cmd
from hpcctr.errors import HpcctrError
from hpcctr.request import EXEC_OPTIONS, ExecWords, NeedsFullParser


def _full(arguments: list[str]) -> ExecWords | None:
    """The words as typer reads them; None when it refuses."""
    seen: list[ExecWords] = []
    app = typer.Typer(rich_markup_mode=None)
    app.command("exec", context_settings={"allow_interspersed_args": False})(_capturing(seen))
    app.command("other")(lambda: None)
    result = CliRunner().invoke(app, ["exec", *arguments])
    return seen[0] if result.exit_code == 0 else None


def _capturing(seen: list[ExecWords]) -> Callable[..., None]:
    command = exec_cmd.command()

    def capture(**values: object) -> None:
        seen.append(exec_cmd.words_of(dict(values)))

    capture.__signature__ = command.__signature__  # type: ignore[attr-defined]
    capture.__annotations__ = command.__annotations__
    return capture


_word = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6)
_option = st.sampled_from([["-e", "A=1"], ["--env=B"], ["--clean-env"], ["-w", "/x"], ["--workdir=/y"], ["--help"]])


@given(
    st.lists(_option, max_size=4),
    st.integers(0, 5000000).map(str) | _word,
    st.lists(_word, max_size=4),
    st.booleans(),
)
def test_both_lanes_read_a_command_line_alike(
    options: list[list[str]], pid: str, command: list[str], dashes: bool
) -> None:
    arguments = [word for option in options for word in option] + [pid] + (["--"] if dashes else []) + command
    try:
        short = ExecWords.parse(arguments)
    except NeedsFullParser:
        return
    except HpcctrError:
        assert _full(arguments) is None
        return
    full = _full(arguments)
    assert full is not None
    assert all(getattr(short, name) == getattr(full, name) for name in ExecWords.__slots__)


def test_every_option_is_in_the_help() -> None:
    app = typer.Typer(rich_markup_mode=None)
    app.command("exec")(exec_cmd.command())
    text = CliRunner().invoke(app, ["--help"]).output
    for option in EXEC_OPTIONS:
        assert all(flag in text for flag in option.flags)


@pytest.mark.parametrize("pid", ["0", "01", "-1", "4194305", "x", "", "1.0", "१"])
def test_what_is_no_process_id_is_named(pid: str) -> None:
    with pytest.raises(HpcctrError, match="not a process id"):
        ExecWords(pid, [b"true"])
