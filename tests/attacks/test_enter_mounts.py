"""What a caller can do to sources, targets, limits and namespaces, and why it gains nothing."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import enter
from tests.support.enter import ALICE, BOB, ROOT, World

pytestmark = pytest.mark.root


@pytest.fixture
def source(world: World, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory of Alice's with a directory `sub` in it."""
    directory = world.directory(f"source.{abs(hash(request.node.name))}", mode=0o755)
    (directory / "sub").mkdir()
    (directory / "sub/secret").write_text("hidden\n")
    yield directory


# sources


def test_a_source_the_caller_may_not_reach_is_not_carried(world: World) -> None:
    directory = world.directory("bobs", account=BOB)
    (directory / "inner").mkdir()
    ended = world.run(world.plan(["ls", "/mnt/one"], mounts=[(f"{directory}/inner/.", "/mnt/one", "rw")]))
    ended.require_refusal("mount-source", "permission denied")


def test_root_without_capabilities_reaches_no_more_than_its_files_modes_allow(world: World) -> None:
    """Root's launch opens sources as the command will see them: CAP_DAC_OVERRIDE is gone."""
    directory = world.directory("closed-to-root")
    (directory / "inner").mkdir()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        argv = world.plan(["ls"], mounts=[(f"{directory}/inner/.", "/mnt/one", "rw")])
        world.run_alone(argv, account=ROOT, sock=theirs).require_refusal("mount-source", "permission denied")


@pytest.mark.parametrize("name", ["missing", "dangling", "loop"])
def test_a_source_that_leads_nowhere_is_named(world: World, name: str) -> None:
    directory = world.directory(f"nowhere.{name}")
    if name == "dangling":
        (directory / name).symlink_to("nothing")
    if name == "loop":
        (directory / name).symlink_to(name)
    ended = world.run(world.plan(["id"], mounts=[(f"{directory}/{name}/.", "/mnt/one", "rw")]))
    ended.require_refusal("mount-source", f"{directory}/{name}/.")
    assert ended.status == 125


def test_a_fifo_as_a_source_does_not_block(world: World) -> None:
    directory = world.directory("fifo")
    os.mkfifo(directory / "pipe")
    os.chown(directory / "pipe", ALICE.uid, ALICE.gid)
    mounts = [(f"{directory}/pipe", "/etc/file", "rw")]
    ended = world.run(world.plan(["stat", "-c", "%F", "/etc/file"], mounts=mounts))
    assert ended.lines == ["fifo"]


def test_a_source_that_vanishes_while_enter_waits_is_named_and_nothing_takes_its_place(world: World) -> None:
    directory = world.directory("vanishing")
    launch = world.start(world.plan(["ls", "-A", "/mnt/one"], mounts=[(f"{directory}/.", "/mnt/one", "rw")]))
    with world.accept() as connection:
        world.hear(connection)
        directory.rmdir()
        world.directory("vanishing", account=BOB)
        socket.send_fds(connection, [b"\0"], [world.container])
    ended = launch.finish()
    ended.require_refusal("mount-source", f"{directory}/.", "vanished")


def test_a_directory_moved_elsewhere_while_enter_waits_is_still_the_one_that_was_opened(world: World) -> None:
    directory = world.directory("moving")
    (directory / "mine").touch()
    launch = world.start(world.plan(["ls", "/mnt/one"], mounts=[(f"{directory}/.", "/mnt/one", "rw")]))
    with world.accept() as connection:
        world.hear(connection)
        directory.rename(world.place / "moved")
        directory.symlink_to("/etc")
        socket.send_fds(connection, [b"\0"], [world.container])
    assert launch.finish().lines == ["mine"]
    directory.unlink()


def test_a_source_in_another_mount_namespace_is_refused(world: World) -> None:
    """A descriptor passed in from outside: the caller can read there, but not carry it off as a mount."""
    outside = os.open("/etc", os.O_PATH)
    argv = world.plan(["ls", "/mnt/one"], mounts=[("/proc/self/fd/115/.", "/mnt/one", "rw")])
    ended = world.run_alone(argv, before=lambda: void(os.dup2(outside, 115)))
    os.close(outside)
    ended.require_refusal("mount-source", "/proc/self/fd/115/.")


def void(_: object) -> None:
    """For calls in a lambda whose result does not matter."""


# unbindable mounts: a recursive clone leaves them out, and shows what they cover


def _refused_over(world: World, source: Path, unbindable: Path) -> enter.Ended:
    world.shell(f"mount -t tmpfs cover '{unbindable}'; mount --make-unbindable '{unbindable}'")
    try:
        argv = world.plan(["cat", "/mnt/one/sub/secret"], mounts=[(f"{source}/.", "/mnt/one", "rw")])
        return world.run_alone(argv)
    finally:
        world.shell(f"umount '{unbindable}'")


def test_what_an_unbindable_mount_hides_stays_hidden(world: World, source: Path) -> None:
    ended = _refused_over(world, source, source / "sub")
    ended.require_refusal("mount-source", "unbindable", str(source))


def test_an_unbindable_mount_is_found_through_a_symbolic_link(world: World, source: Path) -> None:
    link = world.place / f"{source.name}.link"
    link.symlink_to(source)
    _refused_over(world, link, source / "sub").require_refusal("mount-source", "unbindable")


@pytest.mark.parametrize(
    "name", ["a blank", "a\ttab", "a\nnewline", "back\\slash", "\\040", "\xe4", "#", "- shared:1 x"]
)
def test_an_unbindable_mount_is_found_below_a_name_mountinfo_escapes(world: World, source: Path, name: str) -> None:
    directory = source / name
    directory.mkdir()
    (directory / "sub").mkdir()
    _refused_over(world, directory, directory / "sub").require_refusal("mount-source", "unbindable")


def test_a_source_whose_own_mount_is_unbindable_is_refused(world: World, source: Path) -> None:
    _refused_over(world, source / "sub", source / "sub").require_refusal("mount-source")


def test_an_unbindable_mount_beside_a_source_is_none_of_its_business(world: World, source: Path) -> None:
    """Components count, not characters: sub2 is not beneath sub."""
    for name in ("sub2", "su"):
        (source / name).mkdir()
    world.shell(f"for d in sub2 su; do mount -t tmpfs c {source}/$d; mount --make-unbindable {source}/$d; done")
    argv = world.plan(["cat", "/mnt/one/secret"], mounts=[(f"{source}/sub/.", "/mnt/one", "rw")])
    ended = world.run(argv)
    world.shell(f"umount {source}/sub2 {source}/su")
    assert ended.lines == ["hidden"]


@contextlib.contextmanager
def _deep_mount(world: World, source: Path, *, unbindable: bool) -> Iterator[None]:
    """A mount below `source` at a path of 20,000 bytes, as another user's FUSE mount can come to lie.

    Half of the bytes are blanks, four characters each in mountinfo.
    """
    step = "d " * 100
    ms_unbindable, mnt_detach = 1 << 17, 2

    def descend() -> None:
        os.chdir(source)
        for _ in range(100):
            Path(step).mkdir(exist_ok=True)
            os.chdir(step)
        Path("m").mkdir(exist_ok=True)

    def mount() -> None:
        descend()
        enter.require(enter.libc.mount(b"deep", b"m", b"tmpfs", 0, None))
        if unbindable:
            enter.require(enter.libc.mount(None, b"m", None, ms_unbindable, None))

    def unmount() -> None:
        descend()
        enter.require(enter.libc.umount2(b"m", mnt_detach))

    assert enter.ended(world.child(mount, account=ROOT)) == 0
    yield
    assert enter.ended(world.child(unmount, account=ROOT)) == 0


def test_a_mount_at_a_path_longer_than_any_buffer_stops_nobody(world: World, source: Path) -> None:
    with _deep_mount(world, source, unbindable=False):
        ended = world.run(world.plan(["pwd"], mounts=[("/tmp/.", "/tmp", "rw")]))
        other = world.run(world.plan(["cat", "/mnt/one/sub/secret"], mounts=[(f"{source}/.", "/mnt/one", "rw")]))
    assert (ended.lines, other.lines) == (["/"], ["hidden"])


def test_an_unbindable_mount_at_a_path_longer_than_any_buffer_is_found(world: World, source: Path) -> None:
    with _deep_mount(world, source, unbindable=True):
        ended = world.run_alone(world.plan(["id"], mounts=[(f"{source}/.", "/mnt/one", "rw")]))
        other = world.run(world.plan(["pwd"], mounts=[(f"{source}/sub/.", "/mnt/one", "rw")]))
    ended.require_refusal("mount-source", "unbindable")
    assert other.lines == ["/"]


# targets


def test_a_target_the_image_does_not_have_is_refused(world: World) -> None:
    ended = world.run(world.plan(["id"], mounts=[("/tmp/.", "/not/there", "rw")]))
    ended.require_refusal("mount-target", "/not/there", "no such file or directory")


def test_a_target_through_a_symbolic_link_of_the_image_is_refused(world: World) -> None:
    for target in ("/link", "/link/below"):
        ended = world.run(world.plan(["id"], mounts=[("/tmp/.", target, "rw")]))
        ended.require_refusal("mount-target", target, "symbolic link")


def test_a_target_through_a_symbolic_link_of_a_carried_directory_is_refused(world: World) -> None:
    directory = world.directory("links")
    (directory / "out").symlink_to("/etc")
    mounts = [(f"{directory}/.", "/mnt/one", "rw"), ("/tmp/.", "/mnt/one/out", "rw")]
    world.run(world.plan(["id"], mounts=mounts)).require_refusal("mount-target", "symbolic link")


def test_a_magic_link_of_proc_is_no_target(world: World) -> None:
    """/mnt/one/1/root of a carried /proc leads out of any root; O_PATH through it is refused."""
    mounts = [("/proc/.", "/mnt/one", "rw"), ("/tmp/.", "/mnt/one/self/root/etc", "rw")]
    world.run(world.plan(["id"], mounts=mounts)).require_refusal("mount-target", "symbolic link")


def test_a_directory_does_not_go_onto_a_file_nor_a_file_onto_a_directory(world: World) -> None:
    for source, target in (("/tmp/.", "/etc/file"), ("/etc/passwd", "/mnt/one")):
        ended = world.run(world.plan(["id"], mounts=[(source, target, "rw")]))
        ended.require_refusal("mount-target", target)


# the namespace


def test_a_writable_root_ends_the_launch(world: World) -> None:
    container = world.build_container(mark_read_only=False)
    launch = world.start(world.plan(["id"]))
    world.answer(container)
    os.close(container)
    launch.finish().require_refusal("view", "/", "not in force")


def test_proc_in_the_plan_must_be_a_proc_filesystem(world: World) -> None:
    world.shell("mount -t tmpfs fake /sys")
    try:
        argv = world.plan(["id"], mounts=[("/sys/.", "/sys", "rw")])
        world.run_alone(argv).require_refusal("view", "/sys")
    finally:
        world.shell("umount /sys")


def test_a_proc_that_is_none_ends_the_launch_before_anything_is_read_from_it(world: World) -> None:
    argv = [*world.plan(["id"])[:5], "0", *world.plan(["id"])[9:]]
    world.shell("mount -t tmpfs fake /proc")
    try:
        world.run_alone(argv).require_refusal("view", "/proc", "not the kernel's own filesystem")
    finally:
        world.shell("umount /proc")


# limits


@pytest.mark.parametrize("limit", [0, 3, 4, 5, 6])
def test_a_limit_of_open_files_that_is_too_low_is_named(world: World, limit: int) -> None:
    argv = world.plan(["id"], mounts=[("/tmp/.", "/tmp", "rw"), ("/dev/.", "/dev", "rw")])
    ended = world.run_alone(argv, before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)))
    assert ended.status == 125
    assert b"the limit of open files is too low" in ended.err and b"hint: ulimit -n" in ended.err


@pytest.mark.parametrize("kilobytes", [32, 64, 128])
def test_a_small_stack_is_enough(world: World, kilobytes: int) -> None:
    """Buffers are not on the stack, which the caller chooses. 128 KiB is what execve reserves for arguments anyway."""
    size = kilobytes * 1024
    ended = world.run(
        world.plan(["sh", "-c", "pwd"]),
        before=lambda: resource.setrlimit(resource.RLIMIT_STACK, (size, resource.RLIM_INFINITY)),
    )
    assert ended.lines == ["/"]


def test_what_the_command_does_to_its_own_view_harms_nobody(world: World) -> None:
    """It has no capability to mount, and a user namespace of its own gives it none over these mounts."""
    script = "mount -t tmpfs x /mnt/one; mount -o remount,rw /; touch /x; cat /proc/self/status | grep CapEff"
    ended = world.run(world.plan(["sh", "-c", script]))
    assert ended.lines == ["CapEff:\t0000000000000000"]
    assert b"Read-only file system" in ended.err
    assert not (world.place / "rootfs/x").exists()


def test_enter_started_again_inside_gets_no_capability(world: World) -> None:
    directory = world.directory("again", mode=0o755)
    argv = world.plan(
        [str(world.program)], mounts=[(f"{world.place}/.", "/mnt/one", "ro")], candidates=["/mnt/one/enter"]
    )
    ended = world.run(argv)
    assert (ended.status, directory.is_dir()) == (126, True)
    assert ended.err.startswith(b"hpcctr: error[no-new-privs]: ")


# confined callers


def _fake_success_of(syscall: int) -> None:
    """Root's seccomp filter (no no_new_privs needed) that answers 0 for a call without carrying it out."""
    load_number, jump_if_equal, give = 0x20, 0x15, 0x06
    allow, errno_zero = 0x7FFF0000, 0x00050000
    program = b"".join(
        struct.pack("HBBI", *instruction)
        for instruction in (
            (load_number, 0, 0, 0),
            (jump_if_equal, 0, 1, syscall),
            (give, 0, 0, errno_zero),
            (give, 0, 0, allow),
        )
    )
    buffer = ctypes.create_string_buffer(program, len(program))
    filter_program = struct.pack("HxxxxxxQ", 4, ctypes.addressof(buffer))
    pr_set_seccomp, seccomp_mode_filter = 22, 2
    enter.require(enter.libc.prctl(pr_set_seccomp, seccomp_mode_filter, filter_program, 0, 0))


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers of system calls are those of x86-64")
@pytest.mark.parametrize(
    ("syscall", "slug"),
    [
        (308, "view"),
        (272, "view"),
        (442, "view"),
        (429, "view"),
        (126, "mount-source"),
        (428, "mount-source"),
        (135, "view"),
    ],
    ids=["setns", "unshare", "mount_setattr", "move_mount", "capset", "open_tree", "personality"],
)
def test_a_system_call_that_only_claims_success_ends_the_launch(world: World, syscall: int, slug: str) -> None:
    """Every effect is read back: the command never starts in a view that was not made."""
    directory = world.directory(f"faked.{syscall}")
    argv = world.plan(["id"], mounts=[(f"{directory}/.", "/mnt/one", "ro")], personality=0x0040000)
    ended = world.run(argv, as_root=lambda: _fake_success_of(syscall))
    ended.require_refusal(slug)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers of system calls are those of x86-64")
def test_a_view_that_is_still_shared_with_the_host_ends_the_launch(systemd_like_world: World) -> None:
    """All else is as it must be already: only the propagation of the root is left to be noticed."""
    world = systemd_like_world
    restrict = f"mount -o remount,bind,ro,nosuid,nodev {world.place}/rootfs"
    container = world.build_container(prepare=restrict, mark_read_only=False, shared=True)
    argv = [*world.plan(["id"])[:5], "0", *world.plan(["id"])[9:]]
    mount_setattr = 442
    launch = world.start(argv, as_root=lambda: _fake_success_of(mount_setattr))
    world.answer(container)
    os.close(container)
    launch.finish().require_refusal("view", "on the host too")


def test_a_landlocked_caller_gets_an_error_and_no_view(world: World) -> None:
    """Landlock forbids every change of mounts; a caller it confines stays where it is."""
    create_ruleset, restrict_self = 444, 446
    handled_write_file = struct.pack("Q", 1 << 1)

    def confine() -> None:
        ruleset = enter.require(enter.libc.syscall(create_ruleset, handled_write_file, 8, 0))
        enter.require(enter.libc.syscall(restrict_self, ruleset, 0))
        os.close(ruleset)

    ctypes.set_errno(0)
    if enter.libc.syscall(create_ruleset, None, 0, 1) < 0:
        pytest.skip("this kernel has no Landlock")
    ended = world.run(world.plan(["id"]), as_root=confine)
    assert ended.status in (125, 126) and ended.out == b"", ended
    assert b"a Landlock domain or a seccomp filter of the calling process forbids mounts" in ended.err
