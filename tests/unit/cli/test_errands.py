"""The user's half of an errand, where the engine or the storekeeper goes away in the middle."""

from __future__ import annotations

import socket
import time

import msgspec
import pytest

from hpcctr.cli import errands
from hpcctr.errand import Errand, Failed
from hpcctr.errors import EngineUnreachable, StoreUnusable

_ERRAND = Errand(task="images", image="", name="")


def test_an_engine_that_goes_before_it_is_asked_is_a_named_error() -> None:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    its.close()
    with ours, pytest.raises(EngineUnreachable):
        errands._introduced(ours, _ERRAND)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_storekeeper_that_has_its_last_word_while_it_is_sent_to_is_heard_and_nothing_else() -> None:
    ours, its = socket.socketpair()
    its.sendall(msgspec.json.encode(Failed.of(StoreUnusable("full"))) + b"\n")
    is_sent = []

    def send(peer: socket.socket) -> None:
        while peer.fileno() >= 0:
            time.sleep(0.01)
        is_sent.append(True)
        peer.sendall(b"more")

    with its:
        with ours, pytest.raises(StoreUnusable, match="full"):
            list(errands._talk(ours, send))
        while not is_sent:
            time.sleep(0.01)
        time.sleep(0.1)
