"""The gateway: root, resident, one listening socket, a thread a session.

Started by systemd socket activation (sd_listen_fds(3)) or in the foreground; then it makes the socket itself.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import stat
import sys
import threading
import time
from collections import Counter

from hpcctr.containerd import Containerd
from hpcctr.context import Caller
from hpcctr.engine import control, session
from hpcctr.engine.errands import Errands
from hpcctr.engine.nodes import NodeContainers
from hpcctr.errors import CallerRefused, ContainerdUnavailable, EngineBusy, HpcctrError, StoreUnusable
from hpcctr.site import Site
from hpcctr.wire import ENGINE_SOCKET, RUN_DIRECTORY

STATE_DIRECTORY = control.STATE_DIRECTORY
_LISTEN_FDS_START = 3
_BACKLOG = 1024
#: Seconds until the next attempt when no session can begin.
_RELIEF_SECONDS = 0.1


class Gateway:
    """Accepts, counts and serves."""

    def __init__(self, site: Site, nodes: NodeContainers) -> None:
        self._door = session.Door(site=site, nodes=nodes, errands=Errands(site), is_gateway=True)
        self._lock = threading.Lock()
        self._sessions: Counter[int] = Counter()

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
                print(f"hpcctr-engine: no session can begin: {error.strerror}", file=sys.stderr, flush=True)
                time.sleep(_RELIEF_SECONDS)
                continue
            self._begin(peer)

    def _begin(self, peer: socket.socket) -> None:
        try:
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()
        except RuntimeError:
            # No thread can be made; the caller learns that nobody serves it.
            peer.close()
            print("hpcctr-engine: no session can begin: out of threads", file=sys.stderr, flush=True)

    def _serve(self, peer: socket.socket) -> None:
        with peer:
            try:
                caller = Caller.of_peer(peer)
            except (HpcctrError, OSError):
                return
            try:
                self.begin_session(caller.uid)
            except EngineBusy as error:
                session.refuse(self._door, peer, caller, error)
                os.close(caller.pidfd)
                return
            try:
                session.serve(self._door, peer, caller)
            finally:
                self.end_session(caller.uid)
                os.close(caller.pidfd)

    def begin_session(self, uid: int) -> None:
        """Count a session of ``uid``. Raises :class:`EngineBusy` at the site's limits."""
        limits = self._door.site.limits
        with self._lock:
            if self._sessions[uid] >= limits.sessions_per_uid or self._sessions.total() >= limits.sessions:
                raise EngineBusy(
                    f"{self._sessions.total()} launches are under way on this node, {self._sessions[uid]} yours",
                    hint="try again; the limits are [limits] of the site file",
                )
            self._sessions[uid] += 1

    def end_session(self, uid: int) -> None:
        """The session :meth:`begin_session` counted is over."""
        with self._lock:
            self._sessions[uid] -= 1
            if not self._sessions[uid]:
                del self._sessions[uid]


def serve(site: Site) -> int:
    """Run the gateway until SIGTERM or SIGINT; the exit status. Raises any :class:`HpcctrError` instead of starting."""
    if os.getuid() != 0:
        raise CallerRefused(
            "the engine runs as root", hint="sudo hpcctr engine serve, or systemctl start hpcctr-engine.socket"
        )
    os.umask(0o022)
    os.environ["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin"  # noqa: TID251
    make_run_directory()
    nodes = NodeContainers(
        site=site, containerd=Containerd(site.containerd.socket), state=STATE_DIRECTORY, owner="gateway"
    )
    _raise_descriptor_limit()
    try:
        nodes.adopt()
    except ContainerdUnavailable as error:
        # Boot order is nobody's promise; every launch tries again.
        print(f"hpcctr-engine: {error}; going on without it", file=sys.stderr, flush=True)
    listener = inherited_listener() or own_listener(ENGINE_SOCKET)
    control.serve(own_listener(control.CONTROL_SOCKET, mode=0o600), nodes)

    bell = _bell_of_signals()
    print(f"hpcctr-engine: listening on {ENGINE_SOCKET}, store {site.store}", file=sys.stderr, flush=True)
    Gateway(site, nodes).accept(listener, bell)
    listener.close()
    nodes.close(remove=False)
    return 0


def _bell_of_signals() -> int:
    """A descriptor that can be read once SIGTERM or SIGINT has come.

    Not by a handler of Python's: that runs when the main thread next comes back from a system call, and a signal that
    another thread took, or that came on the way into the call, does not end the call (signal.set_wakeup_fd).
    """
    bell, ringer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(ringer)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return bell


def _raise_descriptor_limit() -> None:
    """Every running program and container takes a descriptor; the soft limit of 1024 is for programs that select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def make_run_directory() -> None:
    """/run/hpcctr (0755) with the engine's own 0700 state below: root's, or the engine does not start."""
    for path, mode in ((RUN_DIRECTORY, 0o755), (STATE_DIRECTORY, 0o700)):
        try:
            os.mkdir(path, mode)
        except FileExistsError:
            status = os.lstat(path)
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != 0 or status.st_mode & 0o777 & ~mode:
                raise StoreUnusable(
                    f"{path} is not a directory of root's with mode {mode:o}",
                    hint=f"look at it and remove it: ls -ld {path}",
                ) from None


def inherited_listener() -> socket.socket | None:
    """The listening socket systemd passes, when there is one: sd_listen_fds(3)."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":  # noqa: TID251
        return None
    os.set_inheritable(_LISTEN_FDS_START, False)
    return socket.socket(fileno=_LISTEN_FDS_START)


def own_listener(path: str, *, mode: int = 0o666) -> socket.socket:
    """A new listening socket at ``path``, by default for everybody. A dead one in its place is removed."""
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with probe:
        try:
            probe.connect(path)
        except FileNotFoundError:
            pass
        except ConnectionRefusedError:
            os.unlink(path)
        else:
            raise EngineBusy(f"an engine listens on {path} already", hint="stop it first")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    os.chmod(path, mode)  # everybody may ask the engine; who they are the kernel says
    listener.listen(_BACKLOG)
    return listener
