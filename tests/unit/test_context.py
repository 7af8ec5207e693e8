"""Who asks: real processes that connect to a real socket."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hpcctr import context
from hpcctr.context import Caller, machine, read_status
from hpcctr.errors import CallerRefused, CallerTraced, NoNewPrivileges
from tests.support.polling import wait_until

pytestmark = pytest.mark.root

UID = 41234
#: Connects to argv[1] and stays until its stdin ends.
CONNECT = """
import socket, sys
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.connect(sys.argv[1])
sys.stdin.read()
"""
#: A thread connects and stays; the leader ends, and stays a zombie as long as the thread lives.
CONNECT_IN_A_THREAD = """
import ctypes, socket, sys, threading
def work():
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    s.connect(sys.argv[1])
    sys.stdin.read()
threading.Thread(target=work).start()
ctypes.CDLL(None).pthread_exit(None)
"""

Connect = Callable[..., Caller]


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Connect]:
    """connect(*prefix, uid=…, code=…): the Caller of a process started as ``prefix python -c code SOCKET``."""
    place = tmp_path / "s"
    for parent in [tmp_path, *tmp_path.parents]:
        if parent.stat().st_uid == 0 and parent != Path("/") and parent != Path("/tmp"):
            parent.chmod(0o755)
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listener.bind(str(place))
        place.chmod(0o666)
        listener.listen()
        listener.settimeout(20)

        def start(*prefix: str, uid: int = UID, code: str = CONNECT, groups: tuple[int, ...] = ()) -> Caller:
            process = subprocess.Popen(
                [*prefix, "/usr/bin/python3", "-c", code, str(place)],
                stdin=subprocess.PIPE,
                user=uid,
                group=uid,
                extra_groups=groups,
            )
            stack.callback(process.communicate, b"")
            peer, _ = listener.accept()
            stack.enter_context(peer)
            caller = Caller.of_peer(peer)
            stack.callback(os.close, caller.pidfd)
            return caller

        yield start


def test_an_ordinary_process_is_who_the_kernel_says(connect: Connect) -> None:
    caller = connect(groups=(41235, 41240))
    assert (caller.uid, caller.gid, caller.groups) == (UID, UID, (41235, 41240))
    caller.require_gateway_caller()


def test_more_groups_than_a_socket_option_of_python_holds_are_all_seen(connect: Connect) -> None:
    groups = tuple(range(50000, 50300))
    assert connect(groups=groups).groups == groups


def test_root_is_not_served(connect: Connect) -> None:
    with pytest.raises(CallerRefused, match="uid 0 is not served"):
        connect(uid=0).require_gateway_caller()


def test_a_uid_beyond_int32_is_not_served(connect: Connect) -> None:
    with pytest.raises(CallerRefused, match="is not served"):
        connect(uid=2**31).require_gateway_caller()


def test_no_new_privs_is_named(connect: Connect) -> None:
    with pytest.raises(NoNewPrivileges):
        connect("setpriv", "--no-new-privs").require_gateway_caller()


def test_a_traced_caller_is_named(connect: Connect) -> None:
    with pytest.raises(CallerTraced):
        connect("strace", "-o", "/dev/null", "-f").require_gateway_caller()


def test_a_caller_with_effective_capabilities_is_refused(connect: Connect) -> None:
    caps = ("--inh-caps=+net_bind_service", "--ambient-caps=+net_bind_service")
    prefix = ("setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", *caps)
    caller = connect(*prefix, uid=0)
    assert caller.uid == UID
    with pytest.raises(CallerRefused, match="effective capabilities"):
        caller.require_gateway_caller()


def test_a_caller_in_a_user_namespace_is_refused(connect: Connect) -> None:
    with pytest.raises(CallerRefused, match="user namespace|effective capabilities"):
        connect("unshare", "--user").require_gateway_caller()


def test_a_caller_in_a_pid_namespace_is_refused(connect: Connect) -> None:
    prefix = ("unshare", "--pid", "--fork", "setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups")
    with pytest.raises(CallerRefused, match="pid namespace"):
        connect(*prefix, uid=0).require_gateway_caller()


def test_a_caller_in_a_chroot_is_refused(connect: Connect, tmp_path: Path) -> None:
    # A bind mount of / is the same root directory; another directory that holds the same system is not.
    script = (
        f"mount --make-rprivate / && mkdir {tmp_path}/r && mount -t tmpfs tmpfs {tmp_path}/r && cd {tmp_path}/r && "
        "for d in usr lib lib64 tmp proc dev etc; do mkdir $d; mount --rbind /$d $d 2>/dev/null || true; done; "
        f'exec chroot --userspec={UID}:{UID} . "$@"'
    )
    with pytest.raises(CallerRefused, match="another root directory"):
        connect("unshare", "--mount", "sh", "-c", script, "sh", uid=0).require_gateway_caller()


def test_a_zombie_leader_with_a_living_thread_is_refused(connect: Connect) -> None:
    caller = connect(code=CONNECT_IN_A_THREAD)
    wait_until(lambda: "Z (zombie)" in Path(f"/proc/{caller.pid}/status").read_text(), what="the leader to end")
    with pytest.raises(CallerRefused, match="zombie|ended"):
        caller.require_gateway_caller()


def test_a_caller_that_has_ended_is_refused(connect: Connect) -> None:
    caller = connect(code=CONNECT.replace("sys.stdin.read()", ""))

    def ended() -> bool:
        try:
            caller.require_alive()
        except CallerRefused:
            return True
        return False

    wait_until(ended, what="the caller to end")
    with pytest.raises(CallerRefused):
        caller.require_gateway_caller()


@pytest.mark.parametrize(
    "name",
    [
        b"\rUid:\t0\t0\t0\t0",
        b"\rNew:\t1",
        b"\r\rNew:",
        b"\nState:\tZ",
        b"a) Z 1 (",
        b"\x0bCapEff:\t0",
        b"\x85Gid:\t1",
        b"x\\n:y",
        b"\xff",
    ],
)
def test_a_name_that_breaks_lines_adds_nothing_to_a_status(connect: Connect, name: bytes) -> None:
    """The kernel escapes a line feed in the name of a process, and shows every other character as it is."""
    plain = set(read_status(os.getpid()))
    code = f"import ctypes\nctypes.CDLL(None).prctl(15, {name!r}, 0, 0, 0)\n{CONNECT}"
    caller = connect(code=code)
    status = read_status(caller.pid)
    assert set(status) == plain
    assert status["Uid"].split() == [str(UID)] * 4
    caller.require_gateway_caller()


def _connected_and_gone(place: Path) -> tuple[int, socket.socket]:
    """A pid that nobody has any more, and the socket its process has connected to ``place``."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        os.setresgid(UID, UID, UID)
        os.setresuid(UID, UID, UID)
        sock.connect(str(place))
        os._exit(0)
    os.waitpid(pid, 0)
    return pid, sock


def _successor(pid: int, uid: int) -> subprocess.Popen[bytes]:
    """A process of ``uid`` whose number is ``pid``: the next one after ns_last_pid, unless another is quicker."""
    for _ in range(500):
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, user=uid, group=uid, extra_groups=())
        if process.pid == pid:
            return process
        process.communicate()
    raise AssertionError(f"pid {pid} could not be had again")


@pytest.mark.parametrize("has_peer_pidfd", [True, False], ids=["pidfd of the peer", "pidfd of its number"])
def test_a_number_that_was_handed_on_is_not_the_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, has_peer_pidfd: bool
) -> None:
    """Also on a kernel that knows no pidfd of a peer, where the number is all there is."""
    if not has_peer_pidfd:
        monkeypatch.setattr(context, "_SO_PEERPIDFD", 9999)
    place = tmp_path / "s"
    for parent in [tmp_path, *tmp_path.parents]:
        if parent.stat().st_uid == 0 and parent != Path("/") and parent != Path("/tmp"):
            parent.chmod(0o755)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(place))
        place.chmod(0o666)
        listener.listen()
        for uid in (UID + 1, 0):
            pid, sock = _connected_and_gone(place)
            successor = _successor(pid, uid)
            peer, _ = listener.accept()
            before = len(os.listdir("/proc/self/fd"))
            with sock, peer, pytest.raises(CallerRefused, match="has ended|mixed or changed"):
                caller = Caller.of_peer(peer)
                try:
                    assert (caller.pid, caller.uid) == (pid, UID)
                    caller.require_gateway_caller()
                finally:
                    os.close(caller.pidfd)
            assert len(os.listdir("/proc/self/fd")) == before - 2
            successor.communicate()


def test_a_process_that_is_not_enter_is_refused(connect: Connect) -> None:
    caller = connect()
    with pytest.raises(CallerRefused, match="not the installed enter"):
        caller.require_enter(os.stat("/bin/true"), permitted=0)


def test_a_process_without_enters_capabilities_is_refused(connect: Connect) -> None:
    caller = connect()
    with pytest.raises(CallerRefused, match="capabilities"):
        caller.require_enter(os.stat(f"/proc/{caller.pid}/exe"), permitted=1 << 21)
    caller.require_enter(os.stat(f"/proc/{caller.pid}/exe"), permitted=0)


def test_the_machine_is_named_in_ocis_words() -> None:
    assert machine() in ("amd64", "arm64")
    assert sys.byteorder == "little"
