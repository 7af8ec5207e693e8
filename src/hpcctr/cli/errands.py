"""The user's half of an errand: asks for a storekeeper, feeds it, and hears what it says.

Ordinary users ask the engine. Root, where the store has an owner of its own, starts the storekeeper itself.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator

import msgspec

from hpcctr.client import connect
from hpcctr.errand import LINE_MAX, Ended, Errand, Failed, Pulled, Said
from hpcctr.errors import EngineUnreachable, ProtocolBroken
from hpcctr.site import Site
from hpcctr.wire import FRAME_MAX, Frame

#: The engine's replies (:mod:`hpcctr.engine.errands`), without the engine.
_KEEPER, _WAITING, _DONE = "storekeeper", "waiting", "done"

Send = Callable[[socket.socket], None]


def run(errand: Errand, site: Site, *, send: Send | None = None) -> Iterator[Said]:
    """What the storekeeper says, to the end; nothing when another launch of this user's brought the image meanwhile.

    ``send`` writes the archive of an import to the socket. Raises the error the storekeeper or the engine ends with.
    """
    if os.getuid() == 0:
        from hpcctr.storekeeper.start import start

        keeper = start(errand, site=site, uid=0, place=None)
        os.close(keeper.outcome)
        try:
            yield from _talk(keeper.peer, send)
        finally:
            keeper.peer.close()
            keeper.process.wait()
        return
    # The connection stays open until the end: the engine ends an errand whose user has gone.
    engine, peer = connect.patiently(lambda: _begun(errand))
    with engine:
        if peer is not None:
            with peer:
                yield from _talk(peer, send)


def _begun(errand: Errand) -> tuple[socket.socket, socket.socket | None]:
    """The connection to the engine, and what :func:`_introduced` has from it."""
    engine = socket.socket(fileno=connect.connect().detach())
    try:
        return engine, _introduced(engine, errand)
    except BaseException:
        engine.close()
        raise


def _introduced(engine: socket.socket, errand: Errand) -> socket.socket | None:
    """The socket to the storekeeper; None when another launch's has done it."""
    try:
        engine.sendall(errand.frame().pack())
    except OSError as error:
        raise connect.Unanswered(f"the engine went away: {error.strerror}", hint="hpcctr doctor") from None
    engine.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, bytes(16))  # another launch's pull may take long
    while True:
        try:
            packet, descriptors, _, _ = socket.recv_fds(engine, FRAME_MAX + 1, 1)
        except OSError as error:
            raise connect.Unanswered(f"the engine went away: {error.strerror}", hint="hpcctr doctor") from None
        if not packet:
            raise connect.Unanswered("the engine closed the connection without an answer", hint="hpcctr doctor")
        answer = Frame.unpack(packet)
        if answer.verb == _KEEPER and descriptors:
            return socket.socket(fileno=descriptors[0])
        for descriptor in descriptors:
            os.close(descriptor)
        if answer.verb == "error":
            raise connect.of_answer(answer)
        if answer.verb == _DONE:
            return None
        if answer.verb != _WAITING:
            raise ProtocolBroken(f"the engine answered {answer.verb}")


def _talk(peer: socket.socket, send: Send | None) -> Iterator[Said]:
    failure: list[BaseException] = []
    sender = None
    if send is not None:

        def work() -> None:
            try:
                # A storekeeper that has had enough says why.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    send(peer)
                    peer.shutdown(socket.SHUT_WR)
            except BaseException as error:  # noqa: BLE001 - raised again below
                failure.append(error)
                # Closed already, when the storekeeper has had its last word meanwhile.
                with contextlib.suppress(OSError):
                    peer.shutdown(socket.SHUT_RDWR)

        sender = threading.Thread(target=work, daemon=True)
        sender.start()
    is_ended = False
    for line in _lines(peer):
        said: Said = msgspec.json.decode(line, type=Said)
        if isinstance(said, Failed):
            raise said.error()
        is_ended = isinstance(said, Ended | Pulled)
        if not isinstance(said, Ended):
            yield said
    if sender is not None:
        sender.join()
        if failure:
            raise failure[0]
    if not is_ended:
        raise EngineUnreachable("the storekeeper ended without a word", hint="the engine's log; hpcctr doctor")


def _lines(peer: socket.socket) -> Iterator[bytes]:
    rest = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := peer.recv(LINE_MAX):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines
            if len(rest) > LINE_MAX:
                raise ProtocolBroken("the storekeeper said too much at once")
