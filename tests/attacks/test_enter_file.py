"""enter as a file and as a process, in the hands of its user: no other way to start it than the installed one gives a
capability, and nothing of a running one can be read, stopped at, or taken away."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import enter
from tests.support.enter import ALICE, ROOT, World

pytestmark = pytest.mark.root

_IS_X86 = os.uname().machine == "x86_64"
_NR_PROCESS_VM_READV, _NR_PROCESS_VM_WRITEV = (310, 311) if _IS_X86 else (270, 271)
_NR_PERF_EVENT_OPEN = 298 if _IS_X86 else 241
_NR_KCMP = 312 if _IS_X86 else 272
_NR_MOVE_PAGES = 279 if _IS_X86 else 239
_NR_PIDFD_GETFD, _NR_PROCESS_MADVISE = 438, 440
_PTRACE_ATTACH, _PTRACE_SEIZE = 16, 0x4206


@contextlib.contextmanager
def _waiting(world: World) -> Iterator[int]:
    """The pid of an enter that waits for the engine; it gets its answer at the end."""
    launch = world.start(world.plan(["true"]), env={"SECRET": "x"})
    with world.accept() as connection:
        world.hear(connection)
        enter.wait_for_state(launch.pid, "S")
        yield launch.pid
        socket.send_fds(connection, [b"\0"], [world.container])
    assert launch.finish().status == 0


# other ways to start it


def test_a_copy_of_enter_cannot_be_made_by_a_user(world: World) -> None:
    def copy() -> int:
        with contextlib.suppress(PermissionError):
            os.open(world.program, os.O_RDONLY)
            return 1
        return 0

    assert enter.ended(world.child(copy)) == 0


def test_a_copy_made_by_root_has_no_capability_until_it_is_installed(world: World) -> None:
    copy = world.place / "copied"
    copy.write_bytes(world.program.read_bytes())
    copy.chmod(0o711)
    world.run_alone(world.plan(["id"]), program=copy).require_refusal("enter-unusable", "its file has none")


def test_a_users_hard_link_to_enter_cannot_be_made(world: World) -> None:
    """fs.protected_hardlinks, as every distribution sets it: of a file that is not one's own and cannot be read."""
    if Path("/proc/sys/fs/protected_hardlinks").read_text() != "1\n":
        pytest.skip("this machine lets everybody link to files of others")
    directory = world.directory("linked")

    def link() -> int:
        with contextlib.suppress(PermissionError):
            os.link(world.program, directory / "enter")
            return 1
        return 0

    assert enter.ended(world.child(link)) == 0


@pytest.mark.parametrize("how", ["hard link", "symbolic link", "bind mount", "descriptor", "name of another program"])
def test_enter_started_by_another_name_is_the_same_enter(world: World, how: str) -> None:
    """Nothing depends on how it is called: not on argv, not on the path, not on AT_EXECFN."""
    directory = world.directory(how.replace(" ", "-"), mode=0o755)
    other = directory / "sh"
    argv = world.plan(["pwd"])
    before: Callable[[], None] = lambda: None  # noqa: E731  # one name for all cases
    if how == "hard link":
        os.link(world.program, other)
    elif how == "symbolic link":
        other.symlink_to(world.program)
    elif how == "bind mount":
        other.touch()
        world.shell(f"mount --bind {world.program} {other}")
    elif how == "descriptor":
        other = Path("/proc/self/fd/150")

        def before() -> None:
            os.dup2(os.open(world.program, os.O_PATH), 150)

    else:
        argv = ["", *argv[1:]]
        other = world.program
    ended = world.run(argv, program=other, before=before)
    if how == "bind mount":
        world.shell(f"umount {other}")
    if how == "hard link":
        other.unlink()
    assert (ended.status, ended.lines) == (0, ["/"]), ended


def test_the_loader_cannot_start_enter(world: World) -> None:
    """ld.so reads the file itself, and it has no capabilities to hand on."""
    (loader,) = (Path("/lib64/ld-linux-x86-64.so.2"),) if _IS_X86 else (Path("/lib/ld-linux-aarch64.so.1"),)

    def load() -> int:
        ended = subprocess.run([loader, world.program, "1"], capture_output=True, check=False)
        return (
            0 if ended.returncode != 0 and b"hpcctr" not in ended.stdout and b"Permission denied" in ended.stderr else 1
        )

    assert enter.ended(world.child(load)) == 0


def test_enter_is_not_written_to_while_it_runs(world: World) -> None:
    with _waiting(world), pytest.raises(OSError, match="busy"):
        os.open(world.program, os.O_WRONLY)


# a running one


@pytest.mark.parametrize(
    "name",
    [
        *("mem", "environ", "maps", "smaps", "pagemap", "auxv", "syscall", "stack", "io", "personality", "wchan"),
        *("fd", "fdinfo", "map_files", "fd/0", "ns/mnt", "ns/user", "exe", "cwd", "root", "clear_refs"),
    ],
)
def test_neither_memory_nor_descriptors_nor_namespaces_of_a_waiting_enter_are_shown(world: World, name: str) -> None:
    """What the kernel shows of every process to everybody stays: status, stat, cmdline, mountinfo."""
    with _waiting(world) as pid:
        path = f"/proc/{pid}/{name}"

        def look() -> int:
            try:
                if name in ("exe", "cwd", "root", "ns/mnt", "ns/user", "fd/0"):
                    os.readlink(path)
                elif name in ("fd", "fdinfo", "map_files"):
                    os.listdir(path)
                elif name == "clear_refs":
                    os.open(path, os.O_WRONLY)
                else:
                    # wchan is 0 for those who may not know.
                    return 0 if os.read(os.open(path, os.O_RDONLY), 100) in (b"0", b"") else 1
            except PermissionError:
                return 0
            return 1

        assert enter.ended(world.child(look)) == 0


@pytest.mark.parametrize(
    "how", ["attach", "seize", "readv", "writev", "pidfd_getfd", "perf", "kcmp", "move_pages", "madvise"]
)
def test_no_system_call_reaches_into_a_waiting_enter(world: World, how: str) -> None:
    with _waiting(world) as pid:

        def reach() -> int:
            buffer = ctypes.create_string_buffer(64)
            part = struct.pack("QQ", ctypes.addressof(buffer), 64)
            pidfd = os.pidfd_open(pid)
            # PERF_TYPE_SOFTWARE, of user space only.
            attribute = struct.pack("IIQQQQQ", 1, 112, 0, 0, 0, 0, 1 << 5 | 1 << 6) + bytes(64)

            # Whole words: what is passed on the stack (the seventh argument) is no int.
            def call(*words: int | bytes | ctypes.Array[ctypes.c_char]) -> int:
                whole = [ctypes.c_long(word) if isinstance(word, int) else word for word in words]
                return int(enter.libc.syscall(*whole))

            node = ctypes.create_string_buffer(8)
            reaching: dict[str, Callable[[], int]] = {
                "attach": lambda: enter.libc.ptrace(_PTRACE_ATTACH, pid, 0, 0),
                "seize": lambda: enter.libc.ptrace(_PTRACE_SEIZE, pid, 0, 0),
                "readv": lambda: call(_NR_PROCESS_VM_READV, pid, part, 1, part, 1, 0),
                "writev": lambda: call(_NR_PROCESS_VM_WRITEV, pid, part, 1, part, 1, 0),
                "pidfd_getfd": lambda: call(_NR_PIDFD_GETFD, pidfd, enter.DESCRIPTOR, 0),
                "perf": lambda: call(_NR_PERF_EVENT_OPEN, attribute, pid, -1, -1, 0),
                "kcmp": lambda: call(_NR_KCMP, pid, os.getpid(), 1, 0, 0),
                "move_pages": lambda: call(_NR_MOVE_PAGES, pid, 1, part, 0, node, 0),
                "madvise": lambda: call(_NR_PROCESS_MADVISE, pidfd, part, 1, 20, 0),
            }
            result = reaching[how]()
            refused = ctypes.get_errno()
            return 0 if result == -1 and refused in (1, 13) else 1

        assert enter.ended(world.child(reach)) == 0


def test_a_waiting_enter_leaves_no_core_dump(world: World) -> None:
    """Not even where its user asks for one: the kernel writes none of what is not dumpable."""
    directory = world.directory("cores")
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    if pattern.startswith(("|", "/", "@")):
        pytest.skip(f"cores of this machine go to {pattern.strip()}")

    def ask() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        os.chdir(directory)

    launch = world.start(world.plan(["true"]), before=ask)
    with world.accept() as connection:
        world.hear(connection)
        enter.wait_for_state(launch.pid, "S")
        os.kill(launch.pid, signal.SIGSEGV)
        _, status = os.waitpid(launch.pid, 0)
        launch.process.returncode = -signal.SIGSEGV
    assert (os.WTERMSIG(status), os.WCOREDUMP(status)) == (signal.SIGSEGV, False)
    assert list(directory.iterdir()) == []


def test_a_core_dump_of_the_command_is_possible_again(world: World) -> None:
    """What the test before looks at would be there otherwise."""
    if Path("/proc/sys/kernel/core_pattern").read_text().startswith(("|", "/", "@")):
        pytest.skip("cores of this machine go elsewhere")
    directory = world.directory("dumps")

    def ask() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    argv = world.plan(["sh", "-c", "kill -SEGV $$"], mounts=[(f"{directory}/.", "/mnt/one", "rw")], cwd="/mnt/one")
    assert world.run(argv, before=ask).status == -signal.SIGSEGV
    assert [file.name.partition(".")[0] for file in directory.iterdir()] == ["core"]


def test_an_error_into_a_file_that_may_not_grow_keeps_its_status(world: World) -> None:
    """RLIMIT_FSIZE: a write beyond it sends SIGXFSZ."""
    directory = world.directory("full")

    def limit() -> None:
        os.dup2(os.open(directory / "log", os.O_WRONLY | os.O_CREAT, 0o600), 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    assert world.run(world.plan(["nowhere"]), before=limit).status == 127


def test_a_caller_whose_proc_is_of_other_processes_is_not_taken_for_one_without_namespaces(world: World) -> None:
    """In a user namespace, with the /proc of a pid namespace it is not in: `self` leads nowhere there."""
    argv = world.plan(["id"])
    reader, writer = os.pipe()

    def caller() -> int:
        ready, told = os.pipe()
        until_closed, hold = os.pipe()
        enter.require(enter.libc.unshare(enter.CLONE_NEWUSER | enter.CLONE_NEWNS))
        child = os.fork()
        if child == 0:
            os.close(hold)
            enter.require(enter.libc.unshare(enter.CLONE_NEWPID))
            grandchild = os.fork()
            if grandchild == 0:
                enter.require(enter.libc.mount(b"proc", b"/proc", b"proc", 0, 0))
                os.write(told, b"x")
                os.read(until_closed, 1)
                os._exit(0)
            os.waitpid(grandchild, 0)
            os._exit(0)
        os.close(told)
        assert os.read(ready, 1) == b"x"
        starter = os.fork()
        if starter == 0:
            os.dup2(writer, 2)
            os.execv(world.program, argv)
        status = os.waitstatus_to_exitcode(os.waitpid(starter, 0)[1])
        os.close(hold)
        os.waitpid(child, 0)
        return status

    status = enter.ended(world.child(caller))
    os.close(writer)
    with open(reader, "rb") as pipe:
        text = pipe.read().decode()
    assert status == 125
    assert text.startswith("hpcctr: error[view]: /proc/self/ns/user: no such file or directory\n"), text


def test_who_logged_in_stays_known_and_cannot_be_forged(world: World) -> None:
    """What audit records of a process: the login's user id and session, set once by root's login program."""
    if not Path("/proc/self/loginuid").exists():
        pytest.skip("a kernel without audit")

    def log_in() -> None:
        Path("/proc/self/loginuid").write_text(str(ALICE.uid))
        outside.write_text(Path("/proc/self/sessionid").read_text())

    outside = world.place / "session"
    script = (
        "cat /proc/self/loginuid; echo; cat /proc/self/sessionid; echo; echo 0 >/proc/self/loginuid || echo refused"
    )
    ended = world.run(world.plan(["sh", "-c", script]), as_root=log_in)
    assert ended.lines == [str(ALICE.uid), outside.read_text(), "refused"]


def test_an_error_about_a_path_names_it_in_its_hint(world: World) -> None:
    closed = world.directory("closed", account=ROOT)
    ended = world.run_alone(world.plan(["id"], mounts=[(f"{closed}/x/.", "/mnt/one", "rw")]))
    ended.require_refusal("mount-source", f"{closed}/x/.: permission denied")
    assert ended.err.endswith(f"ls -ld {closed}/x\n".encode())


@pytest.mark.parametrize("path", [b"/\x9b31m", b"/\xc2\x9b31m", b"/\x1b[31m", b"/\x7f"])
def test_no_form_of_an_escape_reaches_the_terminal(world: World, path: bytes) -> None:
    plan = [word.encode() if isinstance(word, str) else word for word in world.plan(["id"])]
    plan[6] = path
    ended = world.run_alone([*plan[:6], path, b"/mnt/one", b"rw", *plan[9:]])
    ended.require_refusal("mount-source")
    assert not any(byte < 0x20 or byte in (0x7F, 0x9B) for byte in ended.err.replace(b"\n", b"")), ended
