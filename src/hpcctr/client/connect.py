"""The caller's end of the engine's socket. ``_socket`` is the standard library's C half: its Python half costs 5 ms."""

from __future__ import annotations

import _socket
from time import sleep

from hpcctr.errors import EngineUnreachable, HpcctrError, ProtocolBroken, of_slug
from hpcctr.wire import ENGINE_SOCKET, FRAME_MAX, Frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    Answer = TypeVar("Answer")

#: Seconds for a node container to be built by a busy node; the engine's own deadlines are shorter.
_PATIENCE = 120
#: Seconds between questions while nobody answers: together longer than an engine takes to start again.
_PAUSES = (0.05, 0.1, 0.2, *(0.4,) * 11)


class Unanswered(EngineUnreachable):
    """Nobody answered a question: nothing has happened, and the engine may be starting again."""


def patiently(ask_once: Callable[[], Answer]) -> Answer:
    """What ``ask_once`` gives; it is called again for some seconds while it raises :class:`Unanswered`."""
    for pause in _PAUSES:
        try:
            return ask_once()
        except Unanswered:
            sleep(pause)
    return ask_once()


def asked(
    request: Frame, sock: _socket.socket | None = None, *, path: str = ENGINE_SOCKET
) -> tuple[_socket.socket, Frame]:
    """The engine's answer to ``request``, and the connection it came over: ``sock``, which leads to an engine of this
    session's (root), or one to the node's, which may be about to start again.

    Raises :class:`EngineUnreachable`, and what the engine answers with.
    """
    if sock is not None:
        return sock, ask(sock, request)

    def ask_once() -> tuple[_socket.socket, Frame]:
        sock = connect(path)
        try:
            return sock, ask(sock, request)
        except BaseException:
            sock.close()
            raise

    return patiently(ask_once)


def connect(path: str = ENGINE_SOCKET) -> _socket.socket:
    """A connected socket. Raises :class:`EngineUnreachable`, as :class:`Unanswered` when nobody listens on it now."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        cls = Unanswered if isinstance(error, ConnectionRefusedError) else EngineUnreachable
        raise cls(
            f"no engine answers on {path}: {error.strerror}",
            hint="an administrator starts it: systemctl start hpcctr-engine.socket, or hpcctr engine serve; "
            "see hpcctr doctor",
        ) from None
    # SO_RCVTIMEO instead of settimeout(): that would set O_NONBLOCK on the description enter takes over.
    wait = _PATIENCE.to_bytes(8, "little") + bytes(8)
    sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_RCVTIMEO, wait)
    return sock


def ask(sock: _socket.socket, request: Frame) -> Frame:
    """The engine's answer to ``request``. An error the engine answers with is raised as the class it is."""
    try:
        packet = _exchange(sock, request.pack())
    except ConnectionError as error:
        raise Unanswered(f"the engine went away: {error.strerror}", hint="hpcctr doctor") from None
    except OSError as error:
        raise EngineUnreachable(
            f"the engine has not answered within {_PATIENCE} s: {error.strerror}", hint="hpcctr doctor"
        ) from None
    if not packet:
        raise Unanswered("the engine closed the connection without an answer", hint="hpcctr doctor; the engine's log")
    return _granted(packet)


def _granted(untrusted_packet: bytes) -> Frame:
    answer = Frame.unpack(untrusted_packet)
    if answer.verb == "error":
        raise of_answer(answer)
    if answer.verb != "granted":
        raise ProtocolBroken(f"the engine answered {answer.verb}")
    return answer


def of_answer(answer: Frame) -> HpcctrError:
    """The error an ``error`` frame stands for."""
    cls = of_slug(answer.text("slug"))
    error = cls(answer.text("message"), hint=answer.text("hint", ""))
    if cls is HpcctrError:
        error.slug = answer.text("slug")
    return error


def _exchange(sock: _socket.socket, packet: bytes) -> bytes:
    """Send and receive.

    An engine that refuses may have answered and hung up before it was asked: its answer can still be read, after the
    error that tells of the end (ECONNRESET is reported once).
    """
    try:
        sock.sendall(packet)
        return sock.recv(FRAME_MAX + 1)
    except (BrokenPipeError, ConnectionResetError):
        try:
            return sock.recv(FRAME_MAX + 1)
        except ConnectionResetError:
            return sock.recv(FRAME_MAX + 1)
