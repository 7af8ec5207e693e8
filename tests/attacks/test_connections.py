"""Attacks on the engine's socket: connections that are many, slow, silent, half, or bring something along."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcctr.request import LaunchRequest
from hpcctr.wire import ENGINE_SOCKET
from tests.support import oci
from tests.support.node import Node, node
from tests.support.polling import wait_until
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]

IMAGE = "local/plain:1"
REQUEST = LaunchRequest(image=IMAGE).frame().pack()
#: What every attack below begins with.
_BEGIN = f"""
import array, os, socket, struct, sys
def connect():
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect({ENGINE_SOCKET!r})
    return sock
def hold():
    print("held", flush=True)
    sys.stdin.read()
REQUEST = {REQUEST!r}
"""


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node with small limits and one image."""
    from tests.support.scratch import scratch

    limits = "[limits]\nsessions = 64\nsessions-per-uid = 8\nwaiting-per-uid = 32\n"
    with scratch("connections") as place, node(place, linger_seconds=600, more=limits) as started:
        layout = oci.write_layout(place / "layout", oci.Image(layers=(oci.tar(*oci.busybox_members()),), config={}))
        started.hpcctr("pull", "--name", IMAGE, f"oci:{layout}")
        yield started


@contextlib.contextmanager
def _attack(node: Node, user: User, code: str) -> Iterator[None]:
    """While ``code``, run by a user, is at its ``hold()``."""
    process = node.host.popen(
        ["/usr/bin/python3", "-c", _BEGIN + code], user=user, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield
    finally:
        process.communicate()


def _kinds(node: Node) -> Counter[str]:
    """The engine's descriptors by what they are, without numbers."""
    found: Counter[str] = Counter()
    for link in Path(f"/proc/{node.engine.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[os.readlink(link).partition("[")[0]] += 1
    return found


def _threads(node: Node) -> int:
    return len(list(Path(f"/proc/{node.engine.process.pid}/task").iterdir()))


def _require_service(node: Node, user: User, *, seconds: float = 8.0) -> None:
    """A launch of ``user``'s works, and soon."""
    began = time.monotonic()
    assert node.run(IMAGE, "echo", "served", user=user).stdout == b"served\n"
    assert time.monotonic() - began < seconds


@pytest.fixture(autouse=True)
def _everything_is_given_back(attacked: Node, alice: User, bob: User) -> Iterator[None]:
    """After every attack the engine has the descriptors and threads that it had before."""
    for user in (alice, bob):
        _require_service(attacked, user)
    # The container of the bare request as well.
    with _attack(
        attacked, alice, "sock = connect()\nsock.send(REQUEST)\nassert b'granted' in sock.recv(65536)\nhold()"
    ):
        pass
    kinds, threads = _kinds(attacked), _threads(attacked)
    yield
    wait_until(
        lambda: not _kinds(attacked) - kinds and _threads(attacked) <= threads,
        seconds=40,
        what=lambda: f"{_kinds(attacked)} and {_threads(attacked)} threads to become {kinds} and {threads}",
    )


def test_ten_thousand_connections_of_one_user_keep_nobody_else_out(attacked: Node, alice: User, bob: User) -> None:
    code = """
import resource
limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
held, refused = [], 0
for _ in range(10000):
    sock = connect()
    held.append(sock)
    if len(held) >= min(limit - 50, 2000):
        held.pop(0).close()
hold()
"""
    with _attack(attacked, alice, code):
        _require_service(attacked, bob)
        assert _threads(attacked) < 40


def test_a_silent_connection_is_hung_up_on(attacked: Node, alice: User) -> None:
    began = time.monotonic()
    with _attack(attacked, alice, "sock = connect()\nassert sock.recv(1) == b''\nhold()"):
        assert 5 < time.monotonic() - began < 30


@pytest.mark.parametrize(
    "packet",
    [
        "REQUEST[:len(REQUEST) // 2]",
        "REQUEST[:-1]",
        "b'h'",
        "bytes(1)",
        "os.urandom(65536)",
        "b'hpcctr/1 run\\0' + b'image=x\\0' * 8000",
    ],
    ids=["half", "without-its-end", "one-byte", "zero", "the-largest", "a-key-eight-thousand-times"],
)
def test_half_a_frame_and_garbage_are_answered_with_an_error_at_once(attacked: Node, alice: User, packet: str) -> None:
    code = f"""
sock = connect()
sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
sock.send({packet})
assert b"slug=protocol" in sock.recv(65536)
assert sock.recv(65536) == b""
hold()
"""
    began = time.monotonic()
    with _attack(attacked, alice, code):
        pass
    assert time.monotonic() - began < 5


def test_who_asks_and_never_reads_or_never_goes_in_keeps_nobody_else_out(
    attacked: Node, alice: User, bob: User
) -> None:
    code = """
held = []
for number in range(40):
    sock = connect()
    sock.send(REQUEST)
    held.append(sock)
hold()
"""
    with _attack(attacked, alice, code):
        _require_service(attacked, bob)


def test_a_thousand_packets_at_once_are_one_request(attacked: Node, alice: User, bob: User) -> None:
    code = """
sock = connect()
sock.setblocking(False)
sent = 0
try:
    while sent < 1000:
        sock.send(REQUEST)
        sent += 1
except (BlockingIOError, BrokenPipeError, ConnectionResetError):
    pass
hold()
"""
    with _attack(attacked, alice, code):
        _require_service(attacked, bob)


#: Descriptors a caller may send along: what closing or receiving them could do to the engine differs.
_KINDS = {
    "files-and-directories": "[os.open('/', os.O_RDONLY), os.open('/etc/passwd', os.O_PATH), 0, 1, 2]",
    "the-same-many-times": "[0] * 253",
    "events-and-memory": "[os.eventfd(0), os.pidfd_open(os.getpid()), os.memfd_create('x')]",
    "pipes": "[*os.pipe()]",
    "the-connection-itself": "[sock.fileno()]",
    "sockets-with-descriptors-in-them": "nested()",
    "a-listening-socket": "[listening().fileno()]",
    "a-terminal": "[*os.openpty()]",
    "namespaces": "[os.open('/proc/self/ns/mnt', os.O_RDONLY), os.open('/proc/self/ns/user', os.O_RDONLY)]",
    "a-socket-whose-close-lingers": "[lingering()]",
}


@pytest.mark.parametrize("kind", list(_KINDS))
def test_descriptors_of_any_kind_never_become_the_engines(attacked: Node, alice: User, bob: User, kind: str) -> None:
    code = f"""
kept = []
def nested():
    one, other = socket.socketpair()
    for _ in range(20):
        socket.send_fds(one, [b"x"], [one.fileno(), other.fileno()])
    kept.extend((one, other))
    return [one.fileno(), other.fileno()]
def listening():
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    kept.append(server)
    return server
def lingering():
    server = listening()
    client = socket.create_connection(server.getsockname())
    kept.append(server.accept()[0])
    client.setblocking(False)
    try:
        while True:
            client.send(b"x" * 65536)
    except BlockingIOError:
        pass
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 15))
    return client.detach()
held = []
for _ in range(20):
    sock = connect()
    descriptors = {_KINDS[kind]}
    try:
        socket.send_fds(sock, [REQUEST], descriptors)
        if {kind!r} == "a-socket-whose-close-lingers":
            os.close(descriptors[0])  # the last one is the engine's now
    except PermissionError:
        sock.send(REQUEST)  # Linux 6.16: the kernel refuses them for the engine
    held.append(sock)
hold()
"""
    before = _kinds(attacked)
    with _attack(attacked, alice, code):
        _require_service(attacked, bob)
        # Of alice's there are sockets alone, and a pidfd, a namespace and a directory for each launch under way.
        new = set(_kinds(attacked) - before)
        assert new <= {"socket:", "anon_inode:", "mnt:", f"/proc/{attacked.engine.process.pid}/fd"}, new
        assert (_kinds(attacked) - before)["anon_inode:"] <= 9
    _require_service(attacked, alice)


def test_descriptors_sent_in_enters_place_end_the_launch(attacked: Node, alice: User) -> None:
    code = """
sock = connect()
sock.send(REQUEST)
assert b"granted" in sock.recv(65536)
try:
    socket.send_fds(sock, [b"E"], [0])
except PermissionError:
    sock.send(b"EE")
answer = sock.recv(65536)
assert answer[0] == 125 and b"one byte" in answer, answer
hold()
"""
    with _attack(attacked, alice, code):
        pass


def test_who_has_containers_built_without_end_waits_and_nobody_else_does(
    tmp_path_factory: pytest.TempPathFactory, alice: User, bob: User
) -> None:
    from tests.support.scratch import scratch

    limits = "[limits]\ncontainers-per-uid = 2\nbuilds-per-minute = 12\n"
    with scratch("builds") as place, node(place, more=limits) as slow:
        layout = oci.write_layout(place / "layout", oci.Image(layers=(oci.tar(*oci.busybox_members()),), config={}))
        slow.hpcctr("pull", "--name", IMAGE, f"oci:{layout}")
        began = time.monotonic()
        for number in range(3):
            slow.run(IMAGE, "true", user=alice, flags=["-v", f"/usr:/place{number}"])
        # Two at once, the third five seconds after.
        assert time.monotonic() - began > 4.9
        began = time.monotonic()
        slow.run(IMAGE, "true", user=bob)
        assert time.monotonic() - began < 4.5


def test_more_targets_than_a_frame_holds_are_refused_by_name(attacked: Node, alice: User) -> None:
    flags = [word for number in range(100) for word in ("-v", f"/usr:/{'/'.join(['y' * 250] * 3)}/{number}")]
    refused = attacked.run(IMAGE, "true", user=alice, flags=flags, check=125)
    assert b"error[protocol]: a run frame of" in refused.stderr
    assert b"fewer or shorter mount targets" in refused.stderr
