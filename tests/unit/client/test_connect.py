"""The caller's end of the socket."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpcctr.client import connect as client
from hpcctr.errors import EngineBusy, EngineUnreachable, HpcctrError, ImageNotInStore, ProtocolBroken
from hpcctr.wire import Frame


def ask(path: str) -> Frame:
    """One question over a connection that is closed afterwards."""
    sock = client.connect(path)
    try:
        return client.ask(sock, Frame("run"))
    finally:
        sock.close()


Answering = Callable[[bytes | None], str]


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[Answering]:
    """answering(packet): a listener that answers one request with it (None: hangs up); its path."""
    threads: list[threading.Thread] = []

    def start(packet: bytes | None) -> str:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(tmp_path / "s"))
        listener.listen()

        def work() -> None:
            peer, _ = listener.accept()
            with peer, listener:
                peer.recv(65536)
                if packet is not None:
                    peer.sendall(packet)

        threads.append(threading.Thread(target=work))
        threads[-1].start()
        return str(tmp_path / "s")

    yield start
    for thread in threads:
        thread.join()


def test_no_engine_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(EngineUnreachable, match="No such file") as error:
        client.connect(str(tmp_path / "none"))
    assert "hpcctr engine serve" in error.value.hint


def test_a_grant_is_returned(answering: Answering) -> None:
    path = answering(Frame("granted", [("digest", b"d")]).pack())
    assert ask(path).one("digest") == b"d"


def test_the_engines_error_is_raised_as_the_class_it_is(answering: Answering) -> None:
    path = answering(Frame("error", [("slug", b"image-not-in-store"), ("message", b"m"), ("hint", b"h")]).pack())
    with pytest.raises(ImageNotInStore) as error:
        ask(path)
    assert (error.value.message, error.value.hint) == ("m", "h")


def test_an_error_this_version_does_not_know_keeps_its_slug(answering: Answering) -> None:
    path = answering(Frame("error", [("slug", b"newer"), ("message", b"m"), ("hint", b"")]).pack())
    with pytest.raises(HpcctrError) as error:
        ask(path)
    assert error.value.for_stderr() == "hpcctr: error[newer]: m\n"


@pytest.mark.parametrize("packet", [None, b"garbage", b"hpcctr/1 other\0"])
def test_an_answer_that_is_none_is_named(answering: Answering, packet: bytes | None) -> None:
    with pytest.raises((EngineUnreachable, ProtocolBroken)):
        ask(answering(packet))


def test_the_socket_stays_blocking_for_enter(answering: Answering) -> None:
    sock = client.connect(answering(None))
    assert sock.gettimeout() is None
    assert os.get_blocking(sock.fileno())
    sock.send(b"x")
    sock.close()


def test_an_answer_that_came_before_the_question_is_read(tmp_path: Path) -> None:
    refusal = Frame("error", [("slug", b"engine-busy"), ("message", b"m"), ("hint", b"")]).pack()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        sock = client.connect(str(tmp_path / "s"))
        peer, _ = listener.accept()
        with peer:
            peer.sendall(refusal)
    with pytest.raises(EngineBusy, match="m"):
        client.ask(sock, Frame("run"))
    sock.close()


def test_a_question_nobody_answered_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "s")
    questions: list[bytes] = []

    def serve_one(answer: Frame | None) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(path)
            listener.listen()
            bound.set()
            peer, _ = listener.accept()
            with peer:
                questions.append(peer.recv(65536))
                if answer is not None:
                    peer.sendall(answer.pack())

    def engine() -> None:
        # One that ends with a question unanswered, nobody for a while, and one that has started again.
        serve_one(None)
        paused.wait(20)
        os.unlink(path)
        serve_one(Frame("granted", [("digest", b"d")]))

    bound, paused = threading.Event(), threading.Event()
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        # The second question finds a socket with nobody behind it.
        pauses.append(seconds)
        if len(pauses) == 2:
            bound.clear()
            paused.set()
            assert bound.wait(20)

    monkeypatch.setattr(client, "sleep", pause)
    thread = threading.Thread(target=engine)
    thread.start()
    assert bound.wait(20)
    sock, answer = client.asked(Frame("run"), path=path)
    thread.join(20)
    sock.close()
    assert answer.one("digest") == b"d"
    assert questions == [Frame("run").pack()] * 2
    assert len(pauses) == 2


def test_an_engine_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
    pauses: list[float] = []
    monkeypatch.setattr(client, "sleep", pauses.append)
    with pytest.raises(EngineUnreachable, match="Connection refused"):
        client.asked(Frame("run"), path=path)
    assert 2 < sum(pauses) < 5


def test_an_error_is_an_answer_and_not_asked_again(answering: Answering) -> None:
    path = answering(Frame("error", [("slug", b"engine-busy"), ("message", b"m"), ("hint", b"h")]).pack())
    with pytest.raises(EngineBusy):
        client.asked(Frame("run"), path=path)
