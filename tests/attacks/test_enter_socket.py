"""Who may hand enter a namespace: the engine, over its own socket, and nobody else."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import enter
from tests.support.dbus import Bus
from tests.support.enter import ALICE, BOB, ROOT, SOCKET, World
from tests.support.polling import wait_until

pytestmark = pytest.mark.root

NOT_THE_ENGINE = "not a connection to the engine at /run/hpcctr/engine.sock"


def _send_fds(connection: socket.socket, *descriptors: int, data: bytes = b"\0") -> None:
    """What an attacker's end sends at once: enter may have refused and gone already."""
    with contextlib.suppress(OSError):
        socket.send_fds(connection, [data], list(descriptors))


def _namespace_of_a_child(world: World, unshared: int) -> tuple[int, Callable[[], None]]:
    """A descriptor of a mount namespace Alice made in a user namespace of hers, and what ends its process."""
    ready, go = os.pipe()

    def make() -> None:
        os.close(ready)
        enter.require(enter.libc.unshare(enter.CLONE_NEWUSER | unshared))
        os.write(go, b"x")
        os.read(wait_end, 1)

    wait_end, release = os.pipe()
    pid = world.child(make)
    os.close(go)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)

    def end() -> None:
        os.write(release, b"x")
        os.close(release)
        os.close(wait_end)
        os.close(namespace)
        assert enter.ended(pid) == 0

    return namespace, end


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
    namespace, end = _namespace_of_a_child(world, enter.CLONE_NEWNS)
    _send_fds(ends[0], namespace)
    ended = world.run_alone(world.plan(["sh", "-c", "id"]), sock=ends[1])
    end()
    for each in (*ends, left, right):
        each.close()
    ended.require_refusal("caller-refused", NOT_THE_ENGINE)
    assert ended.status == 126


def test_a_socketpair_made_by_root_is_not_accepted_from_a_user(world: World) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
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
        namespace, end = _namespace_of_a_child(world, enter.CLONE_NEWNS)
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


# what the engine's socket may answer


def _answered(
    world: World, *descriptors: int, data: bytes = b"\0", extra: list[tuple[int, int, bytes]] | None = None
) -> enter.Ended:
    launch = world.start(world.plan(["sh", "-c", "id"]))
    world.answer(*descriptors, data=data, extra=extra or [])
    return launch.finish()


def test_two_descriptors_are_not_accepted(world: World) -> None:
    _answered(world, world.container, world.container).require_refusal("protocol", "not one descriptor")


def test_more_descriptors_than_fit_are_not_accepted(world: World) -> None:
    _answered(world, *[world.container] * 100).require_refusal("protocol", "too long")


def test_an_answer_without_a_descriptor_is_not_accepted(world: World) -> None:
    _answered(world).require_refusal("protocol", "not one descriptor")


def test_an_error_that_carries_a_descriptor_is_not_accepted(world: World) -> None:
    _answered(world, world.container, data=b"\x7etext").require_refusal("protocol", "not one descriptor")


def test_a_descriptor_with_more_than_one_byte_is_not_accepted(world: World) -> None:
    _answered(world, world.container, data=b"\0\0").require_refusal("protocol", "not one descriptor")


def test_an_answer_that_does_not_fit_is_not_accepted(world: World) -> None:
    _answered(world, data=b"\x7e" + b"x" * 5000).require_refusal("protocol", "too long")
    _answered(world, world.container, data=b"\0" * 5000).require_refusal("protocol", "too long")


@pytest.mark.parametrize("option", [socket.SO_PASSCRED, 76], ids=["SO_PASSCRED", "SO_PASSPIDFD"])
def test_another_control_message_beside_the_descriptor_is_not_accepted(world: World, option: int) -> None:
    """A caller can ask for one on its end; the kernel puts credentials before the descriptor, a pidfd behind it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, option, 1)
        except OSError:
            pytest.skip("this kernel does not know the option")

    def ask_for_more() -> None:
        with socket.socket(fileno=os.dup(enter.DESCRIPTOR)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, option, 1)

    launch = world.start(world.plan(["sh", "-c", "id"]), before=ask_for_more)
    world.answer(world.container)
    launch.finish().require_refusal("protocol", "not one descriptor")


@pytest.mark.parametrize("kind", ["user", "pid", "net", "uts", "ipc", "cgroup"])
def test_a_namespace_of_another_kind_is_not_accepted(world: World, kind: str) -> None:
    namespace = os.open(f"/proc/self/ns/{kind}", os.O_RDONLY)
    ended = _answered(world, namespace)
    os.close(namespace)
    ended.require_refusal("protocol", "not a mount namespace")


@pytest.mark.parametrize("path", ["/etc/passwd", "/", "/proc/self/status", "/dev/null"])
def test_a_file_is_not_accepted_as_a_namespace(world: World, path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    ended = _answered(world, descriptor)
    os.close(descriptor)
    ended.require_refusal("view", "namespace from the engine")


def test_a_mount_namespace_of_the_users_own_user_namespace_changes_nothing_on_the_host(world: World) -> None:
    """Even if the engine were led to send one: it has no read-only root, and the launch ends there."""
    namespace, end = _namespace_of_a_child(world, enter.CLONE_NEWNS)
    ended = _answered(world, namespace)
    end()
    ended.require_refusal("view")


def test_the_answer_is_too_much_when_no_descriptor_is_free(world: World) -> None:
    def limit() -> None:
        # 0 to 2 are taken, enter opens /proc as 3, and the answer would be 4.
        resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4))

    argv = world.plan(["id"])
    argv[5:9] = ["0"]
    launch = world.start(argv, before=limit)
    world.answer(world.container)
    launch.finish().require_refusal("protocol", "limit of open files", "ulimit -n")


def test_a_user_cannot_look_into_a_waiting_enter(world: World) -> None:
    launch = world.start(world.plan(["pwd"]), env={"SECRET": "x"})
    with world.accept() as connection:
        world.hear(connection)
        enter.wait_for_state(launch.pid, "S")

        def look() -> None:
            for name in (
                "mem",
                "environ",
                "maps",
                "auxv",
                "fd/3",
                "exe",
                "cwd",
                "root",
                "ns/mnt",
                "fdinfo/3",
                "syscall",
            ):
                try:
                    place = f"/proc/{launch.pid}/{name}"
                    if name in ("exe", "cwd", "root"):
                        os.readlink(place)
                    else:
                        os.read(os.open(place, os.O_RDONLY), 1)
                except PermissionError:
                    continue
                raise AssertionError(name)
            ptrace_attach, ptrace_seize = 16, 0x4206
            for request in (ptrace_attach, ptrace_seize):
                assert enter.libc.ptrace(request, launch.pid, 0, 0) == -1
            try:
                os.open(world.program, os.O_RDONLY)
            except PermissionError:
                return
            raise AssertionError("the program can be read")

        assert enter.ended(world.child(look)) == 0
        socket.send_fds(connection, [b"\0"], [world.container])
    assert launch.finish().status == 0


def test_the_command_can_be_looked_into_by_its_user_again(world: World) -> None:
    launch = world.start(world.plan(["sleep", "1000"]))
    world.answer(world.container)
    wait_until(lambda: os.readlink(f"/proc/{launch.pid}/exe") != str(world.program), what="the command")
    assert enter.ended(world.child(lambda: void(Path(f"/proc/{launch.pid}/environ").read_bytes()))) == 0
    launch.process.kill()
    launch.finish()


def void(_: object) -> None:
    """For calls in a lambda whose result does not matter."""


def test_strace_around_enter_gets_a_clear_error_and_no_capability(world: World) -> None:
    ended = world.run_alone(world.plan(["id"]), wrapper=["strace", "-o", "/dev/null"])
    ended.require_refusal("traced", "traces the calling process")
    assert ended.status == 126


def test_a_parent_that_traces_gets_a_clear_error_and_no_capability(world: World) -> None:
    argv = world.plan(["id"])
    reader, writer = os.pipe()

    def trace() -> int:
        traceme, cont = 0, 7
        tracee = os.fork()
        if tracee == 0:
            os.dup2(writer, 2)
            enter.require(enter.libc.ptrace(traceme, 0, 0, 0))
            os.execv(world.program, argv)
        while True:
            _, status = os.waitpid(tracee, 0)
            if not os.WIFSTOPPED(status):
                return os.waitstatus_to_exitcode(status)
            enter.require(enter.libc.ptrace(cont, tracee, 0, 0))

    status = enter.ended(world.child(trace))
    os.close(writer)
    with open(reader, "rb") as pipe:
        text = pipe.read()
    assert status == 126
    assert text.startswith(b"hpcctr: error[traced]: ")


def test_every_capability_reason_is_told_apart(world: World) -> None:
    def no_new_privileges() -> None:
        enter.require(enter.libc.prctl(enter.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))

    def narrow_bounding_set() -> None:
        enter.require(enter.libc.prctl(enter.PR_CAPBSET_DROP, 18, 0, 0, 0))

    argv = world.plan(["id"])
    world.run_alone(argv, before=no_new_privileges).require_refusal("no-new-privs", "no_new_privs is set")
    world.run_alone(argv, as_root=narrow_bounding_set).require_refusal("caller-refused", "bounding set")

    bare = world.place / "bare"
    bare.write_bytes((world.place / "built/enter").read_bytes())
    bare.chmod(0o711)
    world.run_alone(argv, program=bare).require_refusal("enter-unusable", "its file has none")

    nosuid = world.place / "nosuid"
    nosuid.touch()
    world.shell(f"mount --bind {world.program} {nosuid}; mount -o remount,bind,nosuid {nosuid}")
    ended = world.run_alone(argv, program=nosuid)
    world.shell(f"umount {nosuid}")
    ended.require_refusal("enter-unusable", "nosuid")


def test_a_caller_that_shares_its_directory_with_another_process_gets_no_capability(world: World) -> None:
    """A sharer could otherwise change root and directory of a process with capabilities."""
    argv = world.plan(["id"])
    reader, writer = os.pipe()

    def share() -> int:
        sys_clone = 56 if os.uname().machine == "x86_64" else 220
        child = enter.require(enter.libc.syscall(sys_clone, enter.CLONE_FS | 17, 0, 0, 0, 0))
        if child == 0:
            os.dup2(writer, 2)
            os.execv(world.program, argv)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)

    status = enter.ended(world.child(share))
    os.close(writer)
    with open(reader, "rb") as pipe:
        text = pipe.read().decode()
    assert status == 126
    assert text.startswith("hpcctr: error[caller-refused]: ") and "CLONE_FS" in text


@pytest.mark.parametrize("which", ["setresuid", "setresgid"])
def test_ids_that_differ_are_refused(world: World, which: str) -> None:
    def differ() -> None:
        # Root's, while it may: real Alice, effective Bob, as a setuid program of Bob's would run it.
        if which == "setresgid":
            os.setresgid(ALICE.gid, BOB.gid, BOB.gid)
        else:
            os.setresuid(ALICE.uid, BOB.uid, BOB.uid)

    def prepare() -> None:
        enter.go_into(world.host.holder.pid)
        differ()

    process = subprocess.Popen(
        world.plan(["id"]),
        executable=world.program,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=prepare,
    )
    enter.Launch(process=process).finish().require_refusal("caller-refused", "differ")
