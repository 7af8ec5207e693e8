"""The gateway's process: its directories, its sockets, its signals, its end.

Started by systemd socket activation (sd_listen_fds(3)) or in the foreground; then it makes the socket itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import stat
from collections.abc import Callable

import msgspec

from hpcctr.containerd import Containerd
from hpcctr.engine import control
from hpcctr.engine.gateway import Gateway, refuse_descriptors
from hpcctr.engine.log import log
from hpcctr.engine.nodes import NodeContainers
from hpcctr.engine.rights import require_capabilities
from hpcctr.errors import CallerRefused, ContainerdUnavailable, EngineBusy, HpcctrError, StoreUnusable
from hpcctr.site import Site
from hpcctr.wire import ENGINE_SOCKET, RUN_DIRECTORY

STATE_DIRECTORY = control.STATE_DIRECTORY
_LISTEN_FDS_START = 3
_BACKLOG = 1024
#: Seconds for sessions to come to their end before the engine does; systemd's patience (TimeoutStopSec) is longer.
_DRAIN_SECONDS = 20.0
#: mallopt(3), malloc.h.
_M_ARENA_MAX = -8
#: Settings that are built into what a running engine keeps.
_UNTIL_RESTART = ("store", "runtime", "containerd", "verify_at_mount")


def serve(load: Callable[[], Site]) -> int:
    """Run the gateway until SIGTERM or SIGINT; the exit status. SIGHUP has it read its site file again, by ``load``.

    Raises any :class:`HpcctrError` instead of starting.
    """
    if os.getuid() != 0:
        raise CallerRefused(
            "the engine runs as root", hint="sudo hpcctr engine serve, or systemctl start hpcctr-engine.socket"
        )
    require_capabilities()
    site = load()
    os.umask(0o022)
    os.environ["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin"  # noqa: TID251
    # First of all: a signal that comes now is for later, not the end.
    bell = _bell_of_signals()
    make_run_directory()
    # Before what takes time: who connects from now on waits for it.
    listener = inherited_listener() or own_listener(ENGINE_SOCKET)
    refuse_descriptors(listener)
    nodes = NodeContainers(
        site=site, containerd=Containerd(site.containerd.socket), state=STATE_DIRECTORY, owner="gateway"
    )
    _raise_descriptor_limit()
    _limit_arenas()
    try:
        nodes.adopt()
    except ContainerdUnavailable as error:
        # Boot order is nobody's promise; every launch tries again.
        log(f"{error}; going on without it")
    control.serve(own_listener(control.CONTROL_SOCKET, mode=0o600), nodes)

    gateway = Gateway(site, nodes)
    log(f"listening on {ENGINE_SOCKET}, store {site.store}")
    _tell_systemd_that_it_is_ready()
    gateway.accept(listener, bell)
    while not _rings_for_the_end(bell):
        site = _settled(site, load, gateway, nodes)
        gateway.accept(listener, bell)
    # Who connects meanwhile is the next engine's when the socket is systemd's, and else asks again.
    if left := gateway.drain(_DRAIN_SECONDS):
        log(f"ending with {left} sessions under way")
    listener.close()
    nodes.close(remove=False)
    return 0


def _settled(site: Site, load: Callable[[], Site], gateway: Gateway, nodes: NodeContainers) -> Site:
    """The site as its file says now, in force; the one before when the file is wrong, or could be somebody else's."""
    try:
        new = load()
    except HpcctrError as error:
        log(f"the site file is not taken, all stays as it was: {error}")
        return site
    kept = {key: getattr(site, key) for key in _UNTIL_RESTART}
    later = [key.replace("_", "-") for key in _UNTIL_RESTART if getattr(new, key) != kept[key]]
    settled = msgspec.structs.replace(new, **kept)
    nodes.settle(settled)
    gateway.settle(settled)
    log("site file read again" + (f"; {', '.join(later)} after a restart, which ends no program" if later else ""))
    return settled


def _tell_systemd_that_it_is_ready() -> None:
    """sd_notify(3), for Type=notify: a signal before that, as of a reload, would have ended a starting Python."""
    address = os.environ.pop("NOTIFY_SOCKET", "")  # noqa: TID251
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.sendto(b"READY=1", f"\0{address[1:]}" if address.startswith("@") else address)


def _bell_of_signals() -> int:
    """A descriptor that can be read once SIGTERM, SIGINT or SIGHUP has come; it gives their numbers.

    Not by a handler of Python's: that runs when the main thread next comes back from a system call, and a signal that
    another thread took, or that came on the way into the call, does not end the call (signal.set_wakeup_fd).
    """
    bell, ringer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(ringer)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    return bell


def _rings_for_the_end(bell: int) -> bool:
    """Whether one of the signals that have come ends the engine."""
    return any(number != signal.SIGHUP for number in os.read(bell, 4096))


def _limit_arenas() -> None:
    """Sessions are threads that come and go; an arena for each, which glibc would make, keeps what they once used."""
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


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
