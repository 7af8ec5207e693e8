"""Who may start enter, and what its user can see of it: capabilities are the kernel's to give, and never to lend."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.support import enter
from tests.support.enter import ALICE, BOB, World
from tests.support.polling import wait_until

pytestmark = pytest.mark.root


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
