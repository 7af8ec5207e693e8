"""The engine's control socket: what root may ask of a running engine, apart from launches.

It lies in the state directory, which only root can enter, and answers only uid 0 by the kernel's word. Its verbs, by
hand:

    remove-idle    remove the containers without members now; answered ``removed`` with their ids

A connection is one question, one answer, and has a deadline for each.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpcctr.engine.log import log
from hpcctr.errors import CallerRefused, DeadlinePassed, EngineUnreachable, HpcctrError, ProtocolBroken, of_slug
from hpcctr.wire import FRAME_MAX, RUN_DIRECTORY, Frame

if TYPE_CHECKING:
    from hpcctr.engine.nodes import NodeContainers

STATE_DIRECTORY = f"{RUN_DIRECTORY}/state"
CONTROL_SOCKET = f"{STATE_DIRECTORY}/control.sock"
VERB_REMOVE_IDLE = "remove-idle"
_ANSWER = "removed"
#: Seconds for a question to arrive, for containers to be removed, and for an answer to a question.
_QUESTION_SECONDS = 10.0
_REMOVE_SECONDS = 15.0
ANSWER_SECONDS = 30.0
#: Seconds until the next attempt when the engine is out of descriptors.
_RELIEF_SECONDS = 0.1
#: Ids in one answer; of more only the number is told.
_IDS_MAX = 1000


@dataclass(frozen=True, kw_only=True)
class Removed:
    """What came of removing: container ids."""

    removed: Sequence[str]
    #: Not done in time; the engine goes on with them.
    unfinished: Sequence[str]


def serve(listener: socket.socket, nodes: NodeContainers) -> None:
    """Answer questions, in threads of their own, for as long as the process lives."""
    threading.Thread(target=_accept, args=(listener, nodes), name="control", daemon=True).start()


def _accept(listener: socket.socket, nodes: NodeContainers) -> None:
    while True:
        try:
            peer, _ = listener.accept()
        except OSError:
            if listener.fileno() < 0:
                return
            time.sleep(_RELIEF_SECONDS)
            continue
        try:
            threading.Thread(target=_answer, args=(peer, nodes), name="control", daemon=True).start()
        except RuntimeError:
            peer.close()  # whoever asked learns that nobody answers


def _answer(peer: socket.socket, nodes: NodeContainers) -> None:
    # Whoever asked may have gone: then there is nobody to tell.
    with peer, contextlib.suppress(OSError):
        peer.settimeout(_QUESTION_SECONDS)
        try:
            answer = _done(peer, nodes)
        except HpcctrError as error:
            answer = Frame.of_error(error)
        peer.sendall(answer.pack())


def _done(peer: socket.socket, nodes: NodeContainers) -> Frame:
    """Do what one question asks for. Raises :class:`HpcctrError` to be answered, OSError when nobody listens."""
    pid, uid, _ = struct.unpack("iII", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid != 0:
        raise CallerRefused(f"uid {uid} may not control the engine")
    untrusted_packet = peer.recv(FRAME_MAX + 1)
    if not untrusted_packet:
        raise ConnectionAbortedError  # somebody looked whether there is an engine
    frame = Frame.unpack(untrusted_packet)
    if frame.verb != VERB_REMOVE_IDLE:
        raise ProtocolBroken(f"the control socket has no verb {frame.verb}", hint="restart the engine after an upgrade")
    frame.require_keys(frozenset())
    removed, unfinished = nodes.remove_idle(seconds=_REMOVE_SECONDS)
    if removed or unfinished:
        log(f"removed {len(removed)} idle containers, {len(unfinished)} unfinished, for pid={pid}")
    return Frame(
        _ANSWER,
        [
            *(("removed", name.encode()) for name in removed[:_IDS_MAX]),
            *(("unfinished", name.encode()) for name in unfinished[:_IDS_MAX]),
        ],
    )


def remove_idle(path: str = CONTROL_SOCKET) -> Removed:
    """Ask the engine to remove its idle containers.

    Raises :class:`EngineUnreachable` when there is none, :class:`DeadlinePassed` when it is silent, and what it
    answers.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(ANSWER_SECONDS)
        try:
            sock.connect(path)
            sock.sendall(Frame(VERB_REMOVE_IDLE).pack())
            packet = sock.recv(FRAME_MAX + 1)
        except TimeoutError:
            raise DeadlinePassed(
                f"the engine did not answer within {ANSWER_SECONDS:.0f} s", hint="journalctl -u hpcctr-engine"
            ) from None
        except OSError as error:
            raise EngineUnreachable(
                f"no engine answers on {path}: {error.strerror}", hint="systemctl status hpcctr-engine"
            ) from None
    if not packet:
        raise EngineUnreachable(f"the engine behind {path} went away", hint="systemctl status hpcctr-engine")
    answer = Frame.unpack(packet)
    if answer.verb == "error":
        raise of_slug(answer.text("slug"))(answer.text("message"), hint=answer.text("hint", ""))
    if answer.verb != _ANSWER:
        raise ProtocolBroken(f"the engine answered {answer.verb}")
    return Removed(
        removed=[name.decode("ascii", "replace") for name in answer.every("removed")],
        unfinished=[name.decode("ascii", "replace") for name in answer.every("unfinished")],
    )
