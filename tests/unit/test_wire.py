"""Frames of the engine's socket."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcctr.errors import DeadlinePassed, ProtocolBroken
from hpcctr.wire import FRAME_MAX, Frame

KEYS = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=12)
VALUES = st.binary(max_size=60).map(lambda value: value.replace(b"\0", b""))


@given(KEYS, st.lists(st.tuples(KEYS, VALUES), max_size=20))
def test_a_frame_comes_out_as_it_went_in(verb: str, fields: list[tuple[str, bytes]]) -> None:
    frame = Frame.unpack(Frame(verb, fields).pack())
    assert (frame.verb, frame.fields) == (verb, tuple(fields))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_a_named_error(untrusted: bytes) -> None:
    try:
        Frame.unpack(untrusted)
    except ProtocolBroken as error:
        assert error.message


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\0",
        b"hpcctr/1 run",
        b"hpcctr/2 run\0",
        b"hpcctr/01 run\0",
        b"hpcctr/1 \0",
        b"hpcctr/1 RUN\0",
        b"hpcctr/1 run\0image\0",
        b"hpcctr/1 run\0=x\0",
        b"hpcctr/1 run\0IMAGE=x\0",
        b"hpcctr/1 run\0\0",
        b"hpcctr/1 run\0" + b"a=" + b"x" * FRAME_MAX + b"\0",
    ],
)
def test_a_packet_that_is_no_frame_is_refused(packet: bytes) -> None:
    with pytest.raises(ProtocolBroken):
        Frame.unpack(packet)


def test_a_value_with_nul_is_not_sent() -> None:
    with pytest.raises(ProtocolBroken, match="NUL"):
        Frame("run", [("image", b"a\0b")]).pack()


def test_a_frame_over_the_limit_is_not_sent() -> None:
    with pytest.raises(ProtocolBroken, match="limit"):
        Frame("run", [("env", b"x" * FRAME_MAX)]).pack()


def test_a_key_outside_the_closed_set_is_refused() -> None:
    with pytest.raises(ProtocolBroken, match="uid"):
        Frame("run", [("image", b"x"), ("uid", b"0")]).require_keys(frozenset({"image"}))


def test_a_repeated_key_is_not_one_value() -> None:
    frame = Frame("run", [("image", b"a"), ("image", b"b")])
    with pytest.raises(ProtocolBroken):
        frame.one("image", b"default")
    assert frame.every("image") == [b"a", b"b"]


def test_any_error_becomes_an_answer() -> None:
    frame = Frame.of_error(DeadlinePassed("a\0b\ud800" + "x" * 9000, hint=""))
    assert Frame.unpack(frame.pack()).text("message").startswith("a?b?")
    assert (frame.verb, frame.text("slug")) == ("error", "deadline")
