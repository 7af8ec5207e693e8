"""What a launch will be, from words and the engine's grant."""

from __future__ import annotations

import pytest

from hpcctr.client.environment import of_this_process
from hpcctr.client.run import Launch, Wishes
from hpcctr.errors import NoCommand, UsageWrong
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


def test_what_is_asked_of_the_node_comes_from_options_and_else_from_variables() -> None:
    said = {
        b"HPCCTR_GPU": b"1",
        b"HPCCTR_MPI": b"host",
        b"HPCCTR_DEVICE": b"a.b/c=d  a.b/c=e",
        b"HPCCTR_FEATURE": b"ib",
    }
    wishes = Wishes(RunWords("img", [b"x"]), said)
    assert (wishes.gpu, wishes.mpi, wishes.devices, wishes.features) == ("1", "host", ["a.b/c=d", "a.b/c=e"], ["ib"])
    words = RunWords("img", [b"x"], gpu="none", mpi="container", device=(b"x.y/z=0",), feature=(b"ucx",))
    wishes = Wishes(words, said)
    assert (wishes.gpu, wishes.mpi, wishes.devices, wishes.features) == ("", "container", ["x.y/z=0"], ["ucx"])


@pytest.mark.parametrize(("name", "value"), [(b"HPCCTR_GPU", b"0 1"), (b"HPCCTR_MPI", b"theirs")])
def test_a_variable_that_asks_for_nonsense_is_named(name: bytes, value: bytes) -> None:
    with pytest.raises(UsageWrong, match=f"{name.decode()}={value.decode()}"):
        Wishes(RunWords("img", [b"x"]), {name: value})
