"""One launch, seen from the engine: a request in, a grant out, a namespace to enter and to nobody else.

Its verbs, by hand: ``run`` into a node container, ``exec`` to where a running process of the caller's is, ``store`` for
what the storekeeper does (:mod:`hpcctr.engine.errands`).

The same code serves the gateway (:mod:`hpcctr.engine.serve`, ordinary users) and a session in root's own command
(:mod:`hpcctr.cli.direct`). What differs is how the caller is known: :class:`Door`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hpcctr.context import CAP_SYS_ADMIN, CAP_SYS_CHROOT, Caller
from hpcctr.engine.errands import Errands
from hpcctr.engine.furnishing import covered
from hpcctr.engine.log import log
from hpcctr.engine.nodes import NodeContainers
from hpcctr.engine.overdue import Overdue
from hpcctr.enter.install import enter_problem
from hpcctr.errand import Errand
from hpcctr.errors import CallerRefused, DeadlinePassed, EnterUnusable, HpcctrError, ProtocolBroken
from hpcctr.launch import build, follow, prepare
from hpcctr.policy.grant import Grant
from hpcctr.request import ExecRequest, LaunchRequest
from hpcctr.site import Site
from hpcctr.wire import FRAME_MAX, Frame

#: Seconds for a connected client to send its request, and for enter to open the caller's directories (automounts) and
#: ask.
REQUEST_PATIENCE = 10.0
ENTER_PATIENCE = 120.0
#: Seconds until a caller is told that its launch is stuck; less than a client waits for its answer.
PREPARE_PATIENCE = 110.0
_ENTER_BYTE = b"E"
_UCRED = struct.Struct("iII")
#: Room for the sender's identity and nothing else: a descriptor that was sent never becomes one of the engine's.
_IDENTITY_SPACE = socket.CMSG_SPACE(_UCRED.size)


@dataclass(frozen=True, kw_only=True)
class Door:
    """One engine: its site, its containers, and who may come in through it."""

    site: Site
    nodes: NodeContainers
    #: None in root's own command, which is nobody's but root's.
    errands: Errands | None
    #: True for the gateway: the caller is whoever connected, an ordinary user. False: our own child, root.
    is_gateway: bool
    #: Answers callers whose session is stuck; None in root's own command, which its user can interrupt.
    overdue: Overdue | None = None


@dataclass(frozen=True, kw_only=True)
class _Way:
    """A way in that a caller was granted."""

    grant: Grant
    #: For the audit line: what happened, and in which container.
    outcome: str
    key: str
    namespace: int
    #: What has to be true, and done, at the moment the namespace is handed over. Raises :class:`HpcctrError`.
    go: Callable[[], None]


def serve(door: Door, peer: socket.socket, caller: Caller) -> None:
    """Serve one session to its end. Every :class:`HpcctrError` is answered to the peer; none leaves this function."""
    with contextlib.ExitStack() as held:
        try:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            peer.settimeout(REQUEST_PATIENCE)
            request = _receive_request(peer)
            if door.is_gateway:
                caller.require_gateway_caller()
            if isinstance(request, Errand):
                _run_errand(door, peer, caller, request)
                return
            with _in_time(door, peer, caller) as stage:
                granted = _granted(door, caller, request, held, stage)
            if isinstance(granted, Grant):
                peer.sendall(_explanation(granted, door.site).pack())
                _audit(door, "explained", caller, granted, key=granted.key)
                return
            way, enter = granted
            peer.sendall(_reply(way.grant, door.site).pack())
        except HpcctrError as error:
            refuse(door, peer, caller, error)
            return
        except OSError:
            # Gone, or too slow to say what it wants: there is nobody to answer.
            _audit(door, "left", caller)
            return
        _hand_over(door, peer, caller, way, enter)


def _granted(
    door: Door, caller: Caller, request: LaunchRequest | ExecRequest, held: contextlib.ExitStack, stage: _Stage
) -> Grant | tuple[_Way, os.stat_result]:
    """The way in that the caller may have, and the enter it has to be; the grant alone when that is all they want."""
    stage.text = "looking the image up in the store"
    if isinstance(request, ExecRequest):
        way = _way_to_process(door, request, caller, held)
        return way, _enter_of(door)
    grant = prepare(request, caller, door.site)
    enter = _enter_of(door)
    if request.explain:
        return grant
    stage.text = "building the container"
    return _way_to_container(door, grant, held), enter


@dataclass(kw_only=True)
class _Stage:
    """What a session is at."""

    text: str = ""


@contextlib.contextmanager
def _in_time(door: Door, peer: socket.socket, caller: Caller) -> Iterator[_Stage]:
    """A part of a session that may be stuck, for instance on a store whose file server is silent: its caller is told
    after a while. Raises :class:`DeadlinePassed` at the end when that has been so.
    """
    stage = _Stage()

    def overdue() -> DeadlinePassed:
        return DeadlinePassed(
            f"{stage.text} for uid {caller.uid}, pid {caller.pid} has taken more than {PREPARE_PATIENCE:.0f} s",
            hint=f"is the file server of {door.site.store} there, and containerd? hpcctr doctor",
        )

    if door.overdue is None:
        yield stage
        return
    watched = door.overdue.watch(peer, PREPARE_PATIENCE, overdue)
    try:
        yield stage
    finally:
        is_in_time = door.overdue.end(watched)
    if not is_in_time:
        raise overdue()


def _way_to_container(door: Door, grant: Grant, held: contextlib.ExitStack) -> _Way:
    """``run``: into the node container of the grant, found or built; ``held`` keeps its namespace."""
    container = held.enter_context(contextlib.closing(build(grant, door.site, door.nodes)))
    return _Way(
        grant=grant,
        outcome="granted",
        key=container.key,
        namespace=container.namespace,
        go=lambda: door.nodes.join(container, grant.caller),
    )


def _way_to_process(door: Door, request: ExecRequest, caller: Caller, held: contextlib.ExitStack) -> _Way:
    """``exec``: to where a running process of the caller's is; ``held`` keeps hold of that process."""
    view = held.enter_context(door.nodes.view(request.pid, caller))

    def go() -> None:
        view.require_unchanged(caller)
        door.nodes.join(view.place, caller)

    return _Way(
        grant=follow(request, view, caller, door.site),
        outcome="joined",
        key=view.place.key,
        namespace=view.namespace,
        go=go,
    )


def _run_errand(door: Door, peer: socket.socket, caller: Caller, errand: Errand) -> None:
    """``store``: the storekeeper does it, and talks to the caller itself."""
    if door.errands is None:
        raise ProtocolBroken("errands are the gateway's")
    with _in_time(door, peer, caller) as stage:
        stage.text = "looking at the store"
        rule = door.errands.may(errand, caller)
    words = f"task={errand.task} image={errand.image!r} name={errand.name!r} rule={rule!r}"
    _audit(door, "errand", caller, words=words)
    door.errands.serve(errand, caller, peer)


def refuse(door: Door, peer: socket.socket, caller: Caller, error: HpcctrError) -> None:
    """Answer a request with an error."""
    _audit(door, "refused", caller, error=error)
    _try_to_send(peer, Frame.of_error(error).pack())


def _hand_over(door: Door, peer: socket.socket, caller: Caller, way: _Way, enter: os.stat_result) -> None:
    """Reply 2: the namespace, once the caller has become enter and has asked for it."""
    try:
        peer.settimeout(ENTER_PATIENCE)
        _require_enter_asks(peer, caller)
        if door.is_gateway:
            caller.require_gateway_caller()
        caller.require_enter(enter, permitted=CAP_SYS_ADMIN | CAP_SYS_CHROOT)
        way.go()
        socket.send_fds(peer, [b"\0"], [way.namespace])
        _audit(door, way.outcome, caller, way.grant, key=way.key)
    except HpcctrError as error:
        _audit(door, "refused", caller, way.grant, key=way.key, error=error)
        _try_to_send(peer, bytes([error.exit_status]) + os.fsencode(error.for_stderr())[:4000])
    except OSError:
        _audit(door, "left", caller, way.grant, key=way.key)


def _receive_request(peer: socket.socket) -> LaunchRequest | ExecRequest | Errand:
    """The first packet, parsed. Descriptors that come with it are let go by the kernel: there is room for the sender's
    identity alone (unix(7), SCM_CREDENTIALS).
    """
    untrusted_packet, _, flags, _ = peer.recvmsg(FRAME_MAX + 1, _IDENTITY_SPACE)
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        raise ProtocolBroken("a request with descriptors, or over the limit of a frame")
    if not untrusted_packet:
        raise ConnectionAbortedError  # somebody looked whether there is an engine
    frame = Frame.unpack(untrusted_packet)
    if frame.verb == LaunchRequest.VERB:
        return LaunchRequest.of_frame(frame)
    if frame.verb == ExecRequest.VERB:
        return ExecRequest.of_frame(frame)
    if frame.verb == Errand.VERB:
        return Errand.of_frame(frame)
    raise ProtocolBroken(f"the engine has no verb {frame.verb}", hint="client and engine must be of the same version")


def _require_enter_asks(peer: socket.socket, caller: Caller) -> None:
    """One byte, sent by the very process that connected: the kernel states the sender (unix(7), SCM_CREDENTIALS)."""
    data, ancillary, flags, _ = peer.recvmsg(2, _IDENTITY_SPACE)
    senders = [_UCRED.unpack(value) for _, kind, value in ancillary if kind == socket.SCM_CREDENTIALS]
    if not data:
        raise CallerRefused(f"pid {caller.pid} left before it asked for its namespace")
    if data != _ENTER_BYTE or flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        raise ProtocolBroken("enter asks with one byte, and sends no descriptor")
    if [sender[:2] for sender in senders] != [(caller.pid, caller.uid)]:
        raise CallerRefused("the namespace was asked for by another process than the one that connected")


def _enter_of(door: Door) -> os.stat_result:
    """Identity of the installed enter. Raises :class:`EnterUnusable` when users could not go in with it, before
    anything is built.
    """
    path = door.site.enter
    try:
        problem = enter_problem(Path(path)) if door.is_gateway else None
        if problem is None:
            return os.stat(path, follow_symlinks=False)
        reason = problem[0]
    except OSError as error:
        reason = error.strerror or "cannot be looked at"
    raise EnterUnusable(f"{path}: {reason}", hint="an administrator runs: hpcctr engine install")


def _explanation(grant: Grant, site: Site) -> Frame:
    """Reply 1 with what the host adds inside, as far as a frame has room for it."""
    reply = _reply(grant, site)
    edits = grant.edits
    lines = [
        *((edit.target, edit.source, "ro" if edit.is_read_only else "rw", edit.origin) for edit in edits.mounts),
        *((edit.path, f"-> {edit.target}", "link", edit.origin) for edit in edits.links),
        *((edit.path, f"{len(edit.content)} bytes", "generated", edit.origin) for edit in edits.files),
        *((edit.path, edit.soname, "found by ld.so", edit.origin) for edit in edits.cache),
        *((edit.path, edit.stage, "hook", edit.origin) for edit in edits.hooks),
    ]
    fields = [("note", _field(note)) for note in (*edits.notes, *covered(edits, grant.targets))]
    fields += [("env-origin", _field(f"{edit.name} {edit.origin}")) for edit in edits.env]
    room = FRAME_MAX - len(reply.pack()) - sum(len(key) + len(value) + 2 for key, value in fields) - 1024
    for number, line in enumerate(lines):
        value = _field("\t".join(line))
        room -= len(value) + len("edit=") + 1
        if room < 0:
            fields.append(("note", b"and %d more places of the host that do not fit here" % (len(lines) - number)))
            break
        fields.append(("edit", value))
    return Frame(reply.verb, (*reply.fields, *fields))


def _field(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def _reply(grant: Grant, site: Site) -> Frame:
    """Reply 1. What the image says of the launcher (USER, labels, working directory) is not part of it."""
    config = grant.image.record.config
    fields = [
        ("digest", grant.image.record.digest),
        ("name", grant.image.name),
        ("because", grant.image.because),
        ("rule", grant.rule),
        ("enter", site.enter),
        *(("env", entry) for entry in config.env),
        *(("entrypoint", word) for word in config.entrypoint),
        *(("command", word) for word in config.cmd),
        *(("carry", path) for path in site.carry),
        *(("host-env", f"{edit.name}={edit.value}") for edit in grant.edits.env),
        *(("host-glob", glob) for glob in site.env_of_the_host),
        *(("device", f"{edit.permissions} {edit.device} {edit.path}") for edit in grant.edits.devices),
        *(
            ("gpu", f"{edit.vendor} {edit.index} {edit.uuid or '-'} {edit.names} {edit.path}")
            for edit in grant.edits.gpus
        ),
        *(("need", f"{edit.what} {edit.least} {edit.origin}") for edit in grant.edits.needs),
        *([("mpi", grant.edits.mpi)] if grant.edits.mpi else []),
        *(("warning", text) for text in grant.edits.warnings),
    ]
    return Frame("granted", [(key, _field(value)) for key, value in fields])


def _try_to_send(peer: socket.socket, packet: bytes) -> None:
    # A caller that has gone is in the audit line already.
    with contextlib.suppress(OSError):
        peer.sendall(packet)


def _audit(
    door: Door,
    outcome: str,
    caller: Caller,
    grant: Grant | None = None,
    *,
    key: str = "",
    words: str = "",
    error: HpcctrError | None = None,
) -> None:
    """The gateway's line per decision on stderr (the journal). Words that a request could influence are quoted."""
    if not door.is_gateway:
        return
    who = f"uid={caller.uid} gid={caller.gid} pid={caller.pid} auid={_audit_id(caller)}"
    line = [f"{outcome} {who}", *filter(None, [words])]
    if grant is not None:
        line.append(
            f"image={grant.image.policy_name!r} digest={grant.image.record.digest} because={grant.image.because!r} "
            f"container={key} rule={grant.rule!r}"
        )
        if grant.asked:
            line.append(f"asked={','.join(grant.asked)!r}")
        if grant.image.name.startswith("@"):
            line.append(f"shared={grant.image.name!r}")
    if error is not None:
        line.append(f"slug={error.slug} reason={error.message!r}")
    log(" ".join(line))


def _audit_id(caller: Caller) -> str:
    """Whom the caller logged in as (pam_loginuid(8)), whoever they are by now; ``unset`` where nobody did."""
    try:
        with open(f"/proc/{caller.pid}/loginuid", encoding="ascii") as file:
            loginuid = file.read()
        caller.require_alive()
    except (OSError, HpcctrError):
        return "gone"
    return "unset" if loginuid == "4294967295" else loginuid
