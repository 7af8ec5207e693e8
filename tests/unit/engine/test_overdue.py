"""Callers whose session is stuck are answered."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from hpcctr.engine.overdue import Overdue, error_frame
from hpcctr.errors import DeadlinePassed
from hpcctr.wire import FRAME_MAX, Frame


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """(the engine's end, the caller's end)."""
    engine, caller = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    engine.settimeout(10)
    caller.settimeout(20)
    with engine, caller:
        yield engine, caller


def _late() -> DeadlinePassed:
    return DeadlinePassed("the store is silent", hint="look")


def test_a_caller_who_waits_too_long_is_told_and_hung_up_on(pair: tuple[socket.socket, socket.socket]) -> None:
    engine, caller = pair
    overdue = Overdue()
    watched = overdue.watch(engine, 0.1, _late)
    answer = Frame.unpack(caller.recv(FRAME_MAX))
    assert (answer.verb, answer.text("slug"), answer.text("message")) == ("error", "deadline", "the store is silent")
    assert caller.recv(FRAME_MAX) == b""
    assert not overdue.end(watched)


def test_a_session_that_ends_in_time_is_let_alone(pair: tuple[socket.socket, socket.socket]) -> None:
    engine, caller = pair
    overdue = Overdue()
    assert overdue.end(overdue.watch(engine, 0.0, _late))
    # The next one is answered, so the thread has looked since.
    other, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with other, its:
        other.settimeout(10)
        its.settimeout(20)
        overdue.watch(other, 0.0, _late)
        assert its.recv(FRAME_MAX)
    engine.sendall(b"reply")
    assert caller.recv(FRAME_MAX) == b"reply"


def test_a_caller_who_does_not_read_holds_nothing_up(pair: tuple[socket.socket, socket.socket]) -> None:
    engine, _ = pair
    engine.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            engine.send(b"x" * 1000)
    engine.settimeout(10)
    overdue = Overdue()
    overdue.watch(engine, 0.0, _late)
    other, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with other, its:
        other.settimeout(10)
        its.settimeout(20)
        overdue.watch(other, 0.0, _late)
        assert its.recv(FRAME_MAX)


def test_nothing_is_looked_at_while_nothing_is_watched() -> None:
    overdue = Overdue()
    assert threading.active_count() == threading.active_count()
    engine, caller = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with engine, caller:
        engine.settimeout(10)
        caller.settimeout(20)
        overdue.watch(engine, 0.0, _late)
        assert caller.recv(FRAME_MAX)
        caller.recv(FRAME_MAX)
    with overdue._lock:
        assert not overdue._watched
    assert not overdue._something.is_set()


def test_any_text_becomes_a_frame() -> None:
    frame = error_frame(DeadlinePassed("a\0b\ud800" + "x" * 9000, hint=""))
    assert Frame.unpack(frame.pack()).text("message").startswith("a?b?")
