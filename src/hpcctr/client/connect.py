"""The caller's end of the engine's socket. ``_socket`` is the standard library's C half: its Python half costs 5 ms."""

from __future__ import annotations

import _socket

from hpcctr.errors import EngineUnreachable, HpcctrError, ProtocolBroken, of_slug
from hpcctr.wire import ENGINE_SOCKET, FRAME_MAX, Frame

#: Seconds for a node container to be built by a busy node; the engine's own deadlines are shorter.
_PATIENCE = 120


def connect(path: str = ENGINE_SOCKET) -> _socket.socket:
    """A connected socket. Raises :class:`EngineUnreachable`."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        raise EngineUnreachable(
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
    except OSError as error:
        raise EngineUnreachable(f"the engine went away: {error.strerror}", hint="hpcctr doctor") from None
    if not packet:
        raise EngineUnreachable(
            "the engine closed the connection without an answer", hint="hpcctr doctor; the engine's log"
        )
    answer = Frame.unpack(packet)
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
