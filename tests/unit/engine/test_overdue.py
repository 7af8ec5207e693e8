"""Callers whose session is stuck are answered."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from hpcctr.engine.overdue import Overdue
from hpcctr.errors import DeadlinePassed
from hpcctr.wire import FRAME_MAX, Frame


@contextlib.contextmanager
def _pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """(the engine's end, the caller's end)."""
    engine, caller = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    engine.settimeout(10)
    caller.settimeout(20)
    with engine, caller:
        yield engine, caller


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with _pair() as made:
        yield made


def _require_answers(overdue: Overdue) -> None:
    """Somebody else who waits is told, and hung up on: so it has looked."""
    with _pair() as (engine, caller):
        overdue.watch(engine, 0.0, _late)
        assert caller.recv(FRAME_MAX)
        assert caller.recv(FRAME_MAX) == b""


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
    _require_answers(overdue)
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
    _require_answers(overdue)


def test_nothing_is_looked_at_while_nothing_is_watched() -> None:
    overdue = Overdue()
    _require_answers(overdue)
    with overdue._lock:
        assert not overdue._watched
    assert not overdue._something.is_set()
