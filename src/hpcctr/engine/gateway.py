"""Who of those who have connected is served when.

A session has a thread, and a user has so many of them; what a user connects beyond that waits in a line of that user's
own. Users do not wait for each other: whoever has no session under way gets one, however many others have.

A connection is counted before anything else is done with it and until it is closed, for closing one can take as long
as its user likes: descriptors that were sent and not taken are closed with it, and that waits for the linger time of a
socket (socket(7), SO_LINGER) or for a file server. Linux 6.16 can refuse such descriptors (:func:`refuse_descriptors`);
before that they cost their user a thread, and nobody else anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import socket
import struct
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass, field

from hpcctr.context import Caller
from hpcctr.engine import session
from hpcctr.engine.errands import Errands
from hpcctr.engine.log import log
from hpcctr.engine.nodes import NodeContainers
from hpcctr.engine.overdue import Overdue, Watched
from hpcctr.engine.pace import Pace
from hpcctr.errors import EngineBusy, HpcctrError
from hpcctr.site import Site
from hpcctr.wire import Frame

#: Seconds until the next attempt when no session can begin.
_RELIEF_SECONDS = 0.1
#: Launches a user may begin at once before ``launches-per-second`` counts: the ranks of a large node, several times.
_BURST = 1024
#: Seconds in the line; less than a client waits for its answer.
_LINE_SECONDS = 90.0
#: Since Linux 6.16 (include/uapi/asm-generic/socket.h); Python's socket module does not know it.
_SO_PASSRIGHTS = 83


@dataclass(frozen=True, kw_only=True, eq=False)
class _Connection:
    """Somebody who has connected; ``watched`` while they wait in line."""

    peer: socket.socket
    watched: Watched | None = None


@dataclass(kw_only=True, eq=False)
class _User:
    """What one uid has here; everything under the gateway's lock."""

    uid: int
    threads: int = 0
    line: deque[_Connection] = field(default_factory=deque)
    #: Connections beyond the line, to be refused by a thread.
    surplus: deque[socket.socket] = field(default_factory=deque)
    is_refusing: bool = False


class Gateway:
    """Accepts, counts and serves."""

    def __init__(self, site: Site, nodes: NodeContainers) -> None:
        self._overdue = Overdue()
        self._errands = Errands(site)
        self._door = session.Door(site=site, nodes=nodes, errands=self._errands, is_gateway=True, overdue=self._overdue)
        self._pace = Pace(burst=_BURST)
        self._lock = threading.Lock()
        self._users: dict[int, _User] = {}
        self._threads = 0
        self._is_over = threading.Event()
        self._has_emptied = threading.Condition(self._lock)

    def settle(self, site: Site) -> None:
        """From now on serve by ``site``; sessions under way end by what they began with."""
        self._errands.settle(site)
        self._door = dataclasses.replace(self._door, site=site)
        with self._lock:
            self._serve_lines()

    def accept(self, listener: socket.socket, bell: int) -> None:
        """Serve until the descriptor ``bell`` can be read. The listener stays open: it may be systemd's."""
        listener.setblocking(False)
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        poll.register(bell, select.POLLIN)
        while bell not in (ready := dict(poll.poll())):
            if listener.fileno() not in ready:
                continue
            try:
                peer, _ = listener.accept()
            except BlockingIOError:
                continue
            except OSError as error:
                # Out of descriptors or memory: sessions that end give some back.
                log(f"no session can begin: {error.strerror}")
                time.sleep(_RELIEF_SECONDS)
                continue
            self._admit(peer)

    def drain(self, seconds: float) -> int:
        """Wait until everybody who has connected is served, at most ``seconds``; how many sessions are left."""
        self._is_over.set()
        with self._lock:
            self._has_emptied.wait_for(lambda: not self._threads, timeout=seconds)
            return self._threads

    def _admit(self, peer: socket.socket) -> None:
        """Give somebody who has connected a thread, a place in line, or a refusal; none of it waits for them."""
        # What a session reads and writes has a deadline from the first byte on.
        peer.settimeout(session.REQUEST_PATIENCE)
        uid = _uid_of(peer)
        site = self._door.site
        with self._lock:
            user = self._users.setdefault(uid, _User(uid=uid))
            if len(user.line) < site.limits.waiting_per_uid:
                watched = None
                if user.line or not self._may_begin(user):
                    watched = self._overdue.watch(peer, _LINE_SECONDS, lambda: self._busy(user))
                user.line.append(_Connection(peer=peer, watched=watched))
                self._serve_lines()
                return
            user.surplus.append(peer)
            if not user.is_refusing:
                user.is_refusing = _starts(threading.Thread(target=self._refuse, args=(user,), daemon=True))

    # under the lock

    def _may_begin(self, user: _User) -> bool:
        limits = self._door.site.limits
        return user.threads < limits.sessions_per_uid and (self._threads < limits.sessions or not user.threads)

    def _serve_lines(self) -> None:
        """Threads for those in line, as far as the limits let them."""
        for user in self._users.values():
            while user.line and self._may_begin(user):
                connection = user.line.popleft()
                if not _starts(threading.Thread(target=self._work, args=(user, connection), daemon=True)):
                    # They go on waiting, for a thread that ends or for whoever connects next.
                    user.line.appendleft(connection)
                    log("no session can begin: out of threads")
                    return
                self._count(user, 1)

    def _next(self, user: _User) -> tuple[_User, _Connection] | None:
        """Whom the thread that has served one of ``user``'s serves now: another of the same, or of somebody who waits
        because everybody together has too many.
        """
        self._count(user, -1)
        for candidate in (user, *self._users.values()):
            if candidate.line and self._may_begin(candidate):
                self._count(candidate, 1)
                connection = candidate.line.popleft()
                self._forget(user)
                return candidate, connection
        self._forget(user)
        return None

    def _count(self, user: _User, more: int) -> None:
        user.threads += more
        self._threads += more

    def _forget(self, user: _User) -> None:
        if not (user.threads or user.line or user.surplus or user.is_refusing):
            self._users.pop(user.uid, None)
        if not self._threads:
            self._has_emptied.notify_all()

    # in threads of their own

    def _work(self, user: _User, connection: _Connection) -> None:
        while True:
            with connection.peer:
                try:
                    self._serve(user, connection)
                except Exception:  # noqa: BLE001 - one session's trouble is not another's
                    traceback.print_exc()
            with self._lock:
                following = self._next(user)
            if following is None:
                return
            user, connection = following

    def _serve(self, user: _User, connection: _Connection) -> None:
        if connection.watched is not None and not self._overdue.end(connection.watched):
            return
        rate = self._door.site.limits.launches_per_second
        self._is_over.wait(self._pace.delay(user.uid, per_second=rate, now=time.monotonic()))
        try:
            caller = Caller.of_peer(connection.peer)
        except (HpcctrError, OSError):
            return
        try:
            session.serve(self._door, connection.peer, caller)
        finally:
            os.close(caller.pidfd)

    def _refuse(self, user: _User) -> None:
        refused = 0
        while True:
            with self._lock:
                if not user.surplus:
                    user.is_refusing = False
                    self._forget(user)
                    break
                peer = user.surplus.popleft()
            with peer, contextlib.suppress(OSError):
                peer.sendall(Frame.of_error(self._busy(user)).pack())
            refused += 1
        log(f"refused uid={user.uid} connections={refused} slug=engine-busy")

    def _busy(self, user: _User) -> EngineBusy:
        return EngineBusy(
            f"uid {user.uid} has {user.threads} launches under way on this node and {len(user.line)} in line",
            hint="try again when they have begun; the limits are [limits] of the site file",
        )


def refuse_descriptors(listener: socket.socket) -> None:
    """Have the kernel refuse descriptors that are sent to whoever connects to ``listener``, where it can."""
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)


def _uid_of(peer: socket.socket) -> int:
    _, uid, _ = struct.unpack("iII", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


def _starts(thread: threading.Thread) -> bool:
    """Start it; False when the system has no more threads."""
    try:
        thread.start()
    except RuntimeError:
        return False
    return True
