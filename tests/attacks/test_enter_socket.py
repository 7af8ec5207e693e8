"""Who may hand enter a namespace: the engine, over its own socket, and nobody else."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import enter
from tests.support.dbus import Bus
from tests.support.enter import ALICE, BOB, ROOT, SOCKET, World

pytestmark = pytest.mark.root

NOT_THE_ENGINE = "not a connection to the engine at /run/hpcctr/engine.sock"


def _send_fds(connection: socket.socket, *descriptors: int, data: bytes = b"\0") -> None:
    """What an attacker's end sends at once: enter may have refused and gone already."""
    with contextlib.suppress(OSError):
        socket.send_fds(connection, [data], list(descriptors))


@contextlib.contextmanager
def _in_place_of_the_engine(world: World) -> Iterator[None]:
    """The engine's path is free for something else meanwhile."""
    world.shell(f"mv {SOCKET} {SOCKET}.aside")
    try:
        yield
    finally:
        world.shell(f"rm -f {SOCKET}; mv {SOCKET}.aside {SOCKET}")


def test_a_namespace_from_a_users_own_socketpair_is_not_accepted(world: World) -> None:
    ends: list[socket.socket] = []
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

    def make() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        socket.send_fds(left, [b"x"], [ours.fileno(), theirs.fileno()])

    assert enter.ended(world.child(make)) == 0
    _, descriptors, _, _ = socket.recv_fds(right, 1, 2)
    ends = [socket.socket(fileno=descriptor) for descriptor in descriptors]
    namespace, end = enter.namespace_of_a_child(world, enter.CLONE_NEWNS)
    _send_fds(ends[0], namespace)
    ended = world.run_alone(world.plan(["sh", "-c", "id"]), sock=ends[1])
    end()
    for each in (*ends, left, right):
        each.close()
    ended.require_refusal("caller-refused", NOT_THE_ENGINE)
    assert ended.status == 126


@pytest.mark.parametrize("is_named_by_the_kernel", [False, True])
def test_a_socketpair_made_by_root_is_not_accepted_from_a_user(world: World, is_named_by_the_kernel: bool) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        if is_named_by_the_kernel:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            ours.send(b"x")
            theirs.recv(1)
        _send_fds(ours, world.container)
        world.run_alone(world.plan(["id"]), sock=theirs).require_refusal("caller-refused", NOT_THE_ENGINE)


def test_a_socketpair_of_a_user_is_not_accepted_from_root(world: World) -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

    def make() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        socket.send_fds(left, [b"x"], [ours.fileno(), theirs.fileno()])

    assert enter.ended(world.child(make)) == 0
    _, descriptors, _, _ = socket.recv_fds(right, 1, 2)
    ours, theirs = (socket.socket(fileno=descriptor) for descriptor in descriptors)
    with left, right, ours, theirs:
        ended = world.run_alone(world.plan(["id"]), sock=theirs, account=ROOT)
        ended.require_refusal("caller-refused", NOT_THE_ENGINE)


@pytest.mark.parametrize(
    "path",
    [
        "/run/hpcctr/other.sock",
        "/run/hpcctr/engine.sock2",
        "/run/hpcctr/engine.soc",
        "/run/hpcctr/../hpcctr/engine.sock",
        "//run/hpcctr/engine.sock",
        "\0/run/hpcctr/engine.sock",
        "\0" + SOCKET[1:],
    ],
)
def test_root_behind_a_socket_of_another_name_is_not_the_engine(world: World, path: str) -> None:
    aside = _in_place_of_the_engine(world) if path.endswith("/engine.sock") else contextlib.nullcontext()
    with aside, world.listen(path) as listener, world.connect(path) as connection:
        other, _ = listener.accept()
        with other:
            _send_fds(other, world.container)
            ended = world.run_alone(world.plan(["id"]), sock=connection)
    if not path.startswith("\0"):
        world.shell(f"rm -f {path}" if not path.endswith("/engine.sock") else ":")
    ended.require_refusal("caller-refused", NOT_THE_ENGINE)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_only_a_seqpacket_socket_at_the_engines_path_is_the_engine(world: World, kind: socket.SocketKind) -> None:
    with _in_place_of_the_engine(world), world.listen(SOCKET, kind) as listener, world.connect(SOCKET, kind) as ours:
        other, _ = listener.accept()
        with other:
            _send_fds(other, world.container)
            ended = world.run_alone(world.plan(["pwd"]), sock=ours)
    if kind == socket.SOCK_SEQPACKET:
        assert ended.lines == ["/"]
    else:
        ended.require_refusal("caller-refused", NOT_THE_ENGINE)


def test_a_datagram_socket_at_the_engines_path_is_not_the_engine(world: World) -> None:
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def bind() -> None:
        receiver.bind(SOCKET)
        os.chmod(SOCKET, 0o666)

    with _in_place_of_the_engine(world), receiver:
        assert enter.ended(world.child(bind, account=ROOT)) == 0
        with world.connect(SOCKET, socket.SOCK_DGRAM) as ours:
            ended = world.run_alone(world.plan(["id"]), sock=ours)
    ended.require_refusal("caller-refused", NOT_THE_ENGINE)


@pytest.mark.parametrize("name", ["file", "pipe", "tcp", "unconnected", "listening", "closed"])
def test_what_is_no_connection_is_not_the_engine(world: World, name: str) -> None:
    def place() -> None:
        if name == "file":
            os.dup2(os.open("/etc/passwd", os.O_RDONLY), enter.DESCRIPTOR)
        elif name == "pipe":
            os.dup2(os.pipe()[0], enter.DESCRIPTOR)
        elif name == "tcp":
            os.dup2(socket.socket(socket.AF_INET).detach(), enter.DESCRIPTOR)
        elif name == "unconnected":
            os.dup2(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).detach(), enter.DESCRIPTOR)
        elif name == "listening":
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            listener.bind("\0hpcctr-test-listening")
            listener.listen(1)
            os.dup2(listener.detach(), enter.DESCRIPTOR)
        else:
            os.close(enter.DESCRIPTOR)

    world.run_alone(world.plan(["id"]), before=place).require_refusal("caller-refused", NOT_THE_ENGINE)


@pytest.mark.parametrize("where", ["/run/bus.sock", SOCKET])
def test_a_root_started_dbus_daemon_that_relays_a_users_namespace_is_not_the_engine(world: World, where: str) -> None:
    aside = _in_place_of_the_engine(world) if where == SOCKET else contextlib.nullcontext()
    with aside, Bus.start(world, where) as bus, bus.connect() as receiver, bus.connect() as sender:
        namespace, end = enter.namespace_of_a_child(world, enter.CLONE_NEWNS)
        # The bus does relay descriptors, with root as its peer credentials.
        credentials = receiver.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        assert struct.unpack("iII", credentials)[1] == 0
        sender.send_descriptor(receiver.name, namespace)
        assert receiver.receive_descriptor_inode() == os.fstat(namespace).st_ino
        sender.send_descriptor(receiver.name, namespace)
        ended = world.run_alone(world.plan(["sh", "-c", "id"]), sock=receiver.sock)
        end()
    ended.require_refusal("caller-refused", NOT_THE_ENGINE)


def _listen_in_own_namespaces(report: socket.socket, wait_end: int) -> None:
    """As Alice: root of a user namespace, with a /run of her own, behind the engine's path."""
    enter.require(enter.libc.unshare(enter.CLONE_NEWUSER | enter.CLONE_NEWNS))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {ALICE.uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {ALICE.gid} 1")
    enter.require(enter.libc.mount(b"tmpfs", b"/run", b"tmpfs", 0, b"mode=755"))
    os.mkdir("/run/hpcctr")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(SOCKET)
    listener.listen(1)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(SOCKET)
    served, _ = listener.accept()
    namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    socket.send_fds(served, [b"\0"], [namespace])
    socket.send_fds(report, [b"x"], [connection.fileno()])
    os.read(wait_end, 1)


@contextlib.contextmanager
def _own_engine(world: World) -> Iterator[tuple[socket.socket, int]]:
    """A connection to Alice's engine in namespaces of her own, with a namespace waiting in it, and the engine's pid."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    wait_end, release = os.pipe()
    pid = world.child(lambda: _listen_in_own_namespaces(left, wait_end))
    right.settimeout(20)
    with left, right:
        _, descriptors, _, _ = socket.recv_fds(right, 1, 1)
    with socket.socket(fileno=descriptors[0]) as connection:
        yield connection, pid
    os.write(release, b"x")
    assert enter.ended(pid) == 0
    os.close(wait_end)
    os.close(release)


def test_a_user_who_listens_at_the_engines_path_in_namespaces_of_their_own_is_not_the_engine(world: World) -> None:
    with _own_engine(world) as (connection, _):
        assert connection.getpeername() == SOCKET
        ended = world.run_alone(world.plan(["sh", "-c", "id"]), sock=connection)
    ended.require_refusal("caller-refused", NOT_THE_ENGINE)


def test_a_caller_in_a_user_namespace_is_refused_whatever_it_brings(world: World) -> None:
    """There the same attack has uid 0 behind the socket and capabilities, but over nothing of the host."""
    with _own_engine(world) as (connection, pid):

        def go_inside() -> None:
            namespaces = [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY) for kind in ("user", "mnt")]
            for namespace in namespaces:
                enter.require(enter.libc.setns(namespace, 0))

        ended = world.run_alone(world.plan(["sh", "-c", "id"]), sock=connection, before=go_inside)
    ended.require_refusal("caller-refused", "user namespace")


def test_a_caller_that_made_itself_root_of_a_user_namespace_is_refused(world: World) -> None:
    def unshare() -> None:
        enter.require(enter.libc.unshare(enter.CLONE_NEWUSER))

    world.run_alone(world.plan(["id"]), before=unshare).require_refusal("caller-refused", "user namespace")


def test_another_users_connection_carries_the_senders_identity_to_the_engine(world: World) -> None:
    """Bob connects, Alice's enter asks over his socket: the engine sees Alice, who is not its peer."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def connect() -> None:
        connection.connect(SOCKET)

    assert enter.ended(world.child(connect, account=BOB)) == 0
    with connection:
        launch = world.start(world.plan(["id"]), sock=connection)
        with world.accept() as served:
            pid, uid, _ = world.hear(served)
            peer = struct.unpack("iII", served.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            assert (pid, uid) == (launch.pid, ALICE.uid)
            assert peer[1] == BOB.uid
        launch.finish().require_refusal("protocol")
