"""What a launch will be, from words and the engine's grant."""

from __future__ import annotations

import pytest

from hpcctr.client.environment import of_this_process
from hpcctr.client.run import Launch
from hpcctr.errors import NoCommand
from hpcctr.request import RunWords
from hpcctr.wire import Frame

GRANTED = Frame(
    "granted",
    [
        ("name", b"img:1"),
        ("digest", b"sha256:0"),
        ("entrypoint", b"/ep"),
        ("entrypoint", b"-e"),
        ("command", b"cmd"),
        ("env", b"PATH=/i/bin"),
    ],
)


def _command(words: RunWords, granted: Frame = GRANTED) -> list[bytes]:
    return Launch(words, granted, of_this_process()).command


def test_without_command_the_images_entrypoint_and_command_run() -> None:
    assert _command(RunWords("img", [])) == [b"/ep", b"-e", b"cmd"]


def test_a_command_is_exactly_that_command() -> None:
    assert _command(RunWords("img", [b"x", b"y"])) == [b"x", b"y"]


def test_an_entrypoint_of_the_callers_takes_the_command_as_arguments() -> None:
    assert _command(RunWords("img", [b"x"], entrypoint=b"/mine")) == [b"/mine", b"x"]
    assert _command(RunWords("img", [], entrypoint=b"/mine")) == [b"/mine"]


def test_an_image_without_a_command_needs_one() -> None:
    with pytest.raises(NoCommand, match="img"):
        _command(RunWords("img", []), Frame("granted", GRANTED.fields[:2]))


def test_the_images_path_is_the_commands_path() -> None:
    assert Launch(RunWords("img", [b"x"]), GRANTED, of_this_process()).variables[b"PATH"].value == b"/i/bin"


def test_the_program_is_told_its_image() -> None:
    variables = Launch(RunWords("img", [b"x"]), GRANTED, of_this_process()).variables
    assert variables[b"HPCCTR_IMAGE"].value == b"img:1"
    assert variables[b"HPCCTR_IMAGE_DIGEST"].value == b"sha256:0"
