"""enter among odd things: sources of every origin, descriptors of every kind, and a host that rearranges directories
while the command runs."""

from __future__ import annotations

import ctypes
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import enter
from tests.support.autofs import automounts
from tests.support.enter import ALICE, BOB, World
from tests.support.polling import wait_until

pytestmark = pytest.mark.root

_NR_OPEN_TREE, _NR_FSOPEN, _NR_FSCONFIG, _NR_FSMOUNT = 428, 430, 431, 432
_NR_IO_URING_SETUP = 425


# sources


def test_processes_hidden_from_the_caller_stay_hidden_inside(world: World) -> None:
    """The command's /proc is the caller's own, with the hidepid it was mounted with."""
    world.shell("mount -t proc -o hidepid=2,nosuid,nodev,noexec proc /proc")
    other = world.start(world.plan(["sleep", "1000"]), account=BOB)
    world.answer(world.container)
    try:
        wait_until(lambda: os.readlink(f"/proc/{other.pid}/exe").endswith("busybox"), what="Bob's program")
        script = (
            f"ls -d /proc/{other.pid} 2>/dev/null || echo hidden; ls -d /proc/$$; grep -c hidepid /proc/self/mountinfo"
        )
        launch = world.start(world.plan(["sh", "-c", script]))
        world.answer(world.container)
        ended = launch.finish()
    finally:
        other.process.kill()
        other.finish()
        world.shell("umount /proc")
    assert ended.lines == ["hidden", f"/proc/{ended.pid}", "1"]


def test_a_directory_the_automounter_makes_is_carried_in_and_mounted_by_the_asking(systemd_like_world: World) -> None:
    world = systemd_like_world
    export = world.directory("export")
    (export / "file").write_text("exported\n")
    point = world.place / "auto"
    with automounts(world.host, point, {"home": export}):
        argv = world.plan(["cat", "/mnt/one/file"], mounts=[(f"{point}/home/.", "/mnt/one", "rw")])
        ended = world.run(argv)
        world.shell(f"umount {point}/home")
    assert ended.lines == ["exported"], ended


def _tree_of_a_user_namespace(world: World, make: Callable[[], int]) -> socket.socket:
    """What Alice sends herself from a user namespace of hers: one descriptor of a mount."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def send() -> None:
        enter.require(enter.libc.unshare(enter.CLONE_NEWUSER | enter.CLONE_NEWNS))
        socket.send_fds(there, [b"x"], [make()])

    assert enter.ended(world.child(send)) == 0
    there.close()
    return here


@pytest.mark.parametrize("kind", ["new filesystem", "copy of the host's"])
def test_a_mount_made_in_a_users_own_namespace_is_refused_or_gives_no_more_than_any_other(
    world: World, kind: str
) -> None:
    """Kernels differ in whether such a mount may be cloned (may_copy_tree in fs/namespace.c)."""

    def new_filesystem() -> int:
        filesystem = enter.require(enter.libc.syscall(_NR_FSOPEN, b"tmpfs", 0))
        enter.require(enter.libc.syscall(_NR_FSCONFIG, filesystem, 6, None, None, 0))
        return enter.require(enter.libc.syscall(_NR_FSMOUNT, filesystem, 0, 0))

    def copy() -> int:
        return enter.require(enter.libc.syscall(_NR_OPEN_TREE, -100, b"/", 1 | 0x8000))

    with _tree_of_a_user_namespace(world, new_filesystem if kind == "new filesystem" else copy) as given:
        _, (tree,), _, _ = socket.recv_fds(given, 1, 1)
    script = "grep ' /mnt/one ' /proc/self/mountinfo; grep CapEff /proc/self/status"
    argv = world.plan(["sh", "-c", script], mounts=[("/proc/self/fd/150/.", "/mnt/one", "rw")])
    ended = world.run(argv, before=lambda: void(os.dup2(tree, 150)))
    os.close(tree)
    if ended.status == 125:
        ended.require_refusal("mount-source", "/proc/self/fd/150")
        return
    assert ended.status == 0, ended
    *mounts, capabilities = ended.lines
    assert capabilities == "CapEff:\t0000000000000000"
    assert mounts and all("nosuid,nodev" in line.split(" ")[5] for line in mounts)


def test_a_directory_in_the_namespace_of_another_process_is_refused_as_a_source(world: World) -> None:
    """Through /proc/PID/root of a process in a user namespace of the caller's, whose files the caller may all read."""
    namespace, end = enter.namespace_of_a_child(world, enter.CLONE_NEWNS)
    (pid,) = (int(name) for name in os.listdir("/proc") if name.isdigit() and _is_in(name, namespace))
    ended = world.run_alone(world.plan(["id"], mounts=[(f"/proc/{pid}/root/.", "/mnt/one", "rw")]))
    end()
    ended.require_refusal("mount-source", f"/proc/{pid}/root/.")


def _is_in(pid: str, namespace: int) -> bool:
    try:
        return os.stat(f"/proc/{pid}/ns/mnt").st_ino == os.fstat(namespace).st_ino
    except OSError:
        return False


def void(_: object) -> None:
    """For calls in a lambda whose result does not matter."""


def test_what_a_bound_namespace_covers_stays_covered(world: World) -> None:
    """A mount that a recursive clone could leave out, and so show what is below it; refused would do as well."""
    directory = world.directory("namespaces")
    (directory / "covered").write_text("secret\n")
    # Slave: a namespace that is bound in itself would keep itself for ever, which the kernel refuses.
    world.shell(f"mount --bind {directory} {directory}; mount --make-private {directory}")
    # The kernel binds a namespace only where it takes it for younger, by numbers that processors give out in batches.
    world.shell(f"for i in $(seq 50); do unshare --mount={directory}/covered true && exit; done; exit 1")
    argv = world.plan(["cat", "/mnt/one/covered"], mounts=[(f"{directory}/.", "/mnt/one", "rw")])
    ended = world.run(argv)
    world.shell(f"umount {directory}/covered; umount {directory}")
    assert b"secret" not in ended.out + ended.err, ended


# descriptors


def _io_uring() -> int:
    return enter.require(enter.libc.syscall(_NR_IO_URING_SETUP, 4, ctypes.create_string_buffer(120)))


def _queued() -> int:
    """A socket in whose queue lies a descriptor."""
    one, other = socket.socketpair()
    socket.send_fds(other, [b"x"], [0])
    # The other end may close: what is queued can still be read.
    return one.detach()


ODD: dict[str, Callable[[], int]] = {
    "eventfd": lambda: os.eventfd(7),
    "pidfd": lambda: os.pidfd_open(os.getpid()),
    "memfd": lambda: os.memfd_create("x"),
    "epoll": lambda: enter.require(enter.libc.epoll_create1(0)),
    "inotify": lambda: enter.require(enter.libc.inotify_init1(0)),
    "timerfd": lambda: enter.require(enter.libc.timerfd_create(1, 0)),
    "io_uring": _io_uring,
    "directory": lambda: os.open("/", os.O_RDONLY),
    "path": lambda: os.open("/etc", os.O_PATH),
    "queue": _queued,
    "engine": lambda: os.dup(enter.DESCRIPTOR),
}


@pytest.mark.parametrize("number", [0, 1, 7, 1000])
@pytest.mark.parametrize("kind", ODD)
def test_a_descriptor_of_any_kind_arrives_as_it_is(world: World, kind: str, number: int) -> None:
    """Whatever its number. It is told on standard error: 1 is one of the numbers."""

    def place() -> None:
        try:
            made = ODD[kind]()
        except OSError as error:
            # Without io_uring on this machine: something else instead, which arrives as well.
            assert kind == "io_uring", error
            made = os.eventfd(0)
        os.dup2(made, number)
        os.close(made)
        link = os.readlink(f"/proc/self/fd/{number}")
        os.write(told, link.encode())

    reader, told = os.pipe()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 1000
    ended = world.run(world.plan(["sh", "-c", f"link=$(readlink /proc/$$/fd/{number}); echo $link >&2"]), before=place)
    os.close(told)
    with open(reader, "rb") as pipe:
        before = pipe.read()
    assert (ended.status, ended.err) == (0, before + b"\n"), ended


def test_a_table_of_descriptors_that_is_nearly_full_arrives_as_it_is(world: World) -> None:
    """With room for what enter holds for a moment, and duplicates of its socket among them."""

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
        for number in range(enter.DESCRIPTOR + 1, 190):
            os.dup2(enter.DESCRIPTOR if number % 2 else 2, number)

    script = "i=110; while [ $i -lt 200 ]; do echo $i:$(readlink /proc/$$/fd/$i); i=$((i+1)); done"
    ended = world.run(world.plan(["sh", "-c", script]), before=fill)
    kinds = {int(line.split(":")[0]): line.split(":")[1] for line in ended.lines}
    # One of the numbers may have been the pipe by which Python hears of a failed exec, which that closes.
    wrong = [number for number in range(110, 190) if kinds[number] != ("socket" if number % 2 else "pipe")]
    assert len(wrong) <= 1 and {kinds[number] for number in wrong} <= {""}, ended
    assert {kinds[number] for number in range(190, 200)} == {""}


# the host, while the command runs


@pytest.mark.parametrize("through", ["the host", "the program's root"])
def test_renaming_and_removing_what_is_mounted_on_disturbs_no_running_program(world: World, through: str) -> None:
    """A directory of the user's that holds a mount point of the view: moved away and removed under a program."""
    outer, inner = world.directory(f"outer.{len(through)}"), world.directory(f"inner.{len(through)}")
    (outer / "point").mkdir()
    os.chown(outer / "point", ALICE.uid, ALICE.gid)
    (inner / "file").write_text("inner\n")
    mounts = [(f"{outer}/.", "/mnt/one", "rw"), (f"{inner}/.", "/mnt/one/point", "rw")]
    script = (
        "cat /mnt/one/point/file; touch /mnt/one/ready; while [ ! -e /mnt/one/go ]; do sleep 0.05; done; ls /mnt/one"
    )
    launch = world.start(world.plan(["sh", "-c", script], mounts=mounts))
    world.answer(world.container)
    wait_until((outer / "ready").exists, what="the program")
    place = outer if through == "the host" else Path(f"/proc/{launch.pid}/root/mnt/one")

    def rearrange() -> int:
        try:
            os.rename(place / "point", place / "moved")
            os.rmdir(place / "moved")
        except OSError as error:
            # Busy, where it is looked at through the view in which it is a mount point.
            return error.errno or 99
        return 0

    assert enter.ended(world.child(rearrange)) in ((0,) if through == "the host" else (0, 16))
    (outer / "go").touch()
    ended = launch.finish()
    assert ended.status == 0 and ended.lines[0] == "inner", ended
    assert (inner / "file").read_text() == "inner\n"


def test_a_user_cannot_take_a_mount_out_of_a_running_view(world: World) -> None:
    """Neither from outside nor with all the rights of a user namespace of theirs over a copy of it."""
    launch = world.start(world.plan(["sleep", "1000"]))
    world.answer(world.container)
    wait_until(lambda: os.readlink(f"/proc/{launch.pid}/exe").endswith("busybox"), what="the command")

    def take() -> int:
        descriptor = os.open(f"/proc/{launch.pid}/ns/mnt", os.O_RDONLY)
        if enter.libc.setns(descriptor, enter.CLONE_NEWNS) == 0:
            return 1
        enter.require(enter.libc.unshare(enter.CLONE_NEWUSER))
        return 1 if enter.libc.setns(descriptor, enter.CLONE_NEWNS) == 0 else 0

    assert enter.ended(world.child(take)) == 0
    launch.process.kill()
    launch.finish()
