"""The program `enter` under test: installed with its capabilities, started as ordinary users, against an engine that is
the test itself.

A `World` is a Host (mount namespace with its own /run), a socket at the engine's path, and the mount namespace of a
container with busybox in it. The test plays the engine: it accepts, reads what enter sends, and answers what it likes.

    launch = world.start(world.plan(["sh", "-c", "id"]))
    world.answer(world.container)
    ended = launch.finish()
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpcctr.enter.build import compile_enter
from hpcctr.enter.install import install_enter
from tests.support.host import Host
from tests.support.polling import wait_until
from tests.support.processes import processes

SOCKET = "/run/hpcctr/engine.sock"
DESCRIPTOR = 109
"""The number of the engine's socket in a launched process, far from those subprocess uses on its way."""

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID, CLONE_FS = 0x20000, 0x10000000, 0x20000000, 0x200
PR_SET_NO_NEW_PRIVS, PR_CAPBSET_DROP, PR_SET_DUMPABLE = 38, 24, 4
_PATIENCE = 20.0

libc = ctypes.CDLL(None, use_errno=True)


def require(result: int) -> int:
    """The result of a C call, or OSError with its errno."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


@dataclass(frozen=True, kw_only=True)
class Account:
    """Numbers are enough for the kernel: nothing here looks anybody up."""

    uid: int
    gid: int
    groups: tuple[int, ...]


# Of this test session alone: several may run at once, and each looks for what its users left running.
_ALICE, _BOB, _PROJECT = (500_000_000 + 10 * os.getpid() + number for number in range(3))
ALICE = Account(uid=_ALICE, gid=_ALICE, groups=(_ALICE, _PROJECT, _PROJECT + 1))
BOB = Account(uid=_BOB, gid=_BOB, groups=(_BOB, _PROJECT))
ROOT = Account(uid=0, gid=0, groups=(0,))


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a launched process ended; `status` is negative after a signal, as in subprocess."""

    pid: int
    status: int
    out: bytes
    err: bytes

    @property
    def lines(self) -> list[str]:
        return self.out.decode(errors="replace").splitlines()

    def require_refusal(self, slug: str, *words: str) -> None:
        """It ended with enter's own error: a status of ours, nothing on stdout, one error line and one hint."""
        text = self.err.decode(errors="replace")
        assert self.status in (125, 126, 127), self
        assert text.startswith(f"hpcctr: error[{slug}]: "), self
        assert text.count("\n") == 2 and "\nhint: " in text, self
        assert self.out == b"", self
        for word in words:
            assert word in text, self


@dataclass(frozen=True, kw_only=True)
class Launch:
    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.process.pid

    def finish(self, *, seconds: float = _PATIENCE) -> Ended:
        out, err = self.process.communicate(timeout=seconds)
        return Ended(pid=self.pid, status=self.process.returncode, out=out, err=err)


def become(account: Account) -> None:
    os.setgroups(account.groups)
    os.setresgid(account.gid, account.gid, account.gid)
    os.setresuid(account.uid, account.uid, account.uid)
    # Changing ids closed /proc/self to the process itself (prctl(2)); a login's exec opens it again.
    require(libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0))


def go_into(pid: int) -> None:
    """The calling process continues in the mount namespace of `pid`."""
    descriptor = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
    require(libc.setns(descriptor, CLONE_NEWNS))
    os.close(descriptor)


def _keep_only_standard_descriptors() -> None:
    """Whoever runs the tests may have left descriptors open for us; the command shall not see them."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):
                os.set_inheritable(int(name), False)


def _quit(status: int) -> None:
    os._exit(status)


@dataclass(kw_only=True)
class World:
    """See the module. `place` is readable for everyone; `program` is the installed enter."""

    place: Path
    host: Host
    program: Path
    listener: socket.socket
    container: int
    launches: list[Launch] = field(default_factory=list)

    # what enter is told

    def plan(
        self,
        command: Sequence[str | bytes],
        *,
        mounts: Sequence[tuple[str, str, str]] = (),
        cwd: str = "/",
        candidates: Sequence[str] | None = None,
        personality: int = 0,
        pdeathsig: int = 0,
    ) -> list[str | bytes]:
        """argv of enter; `mounts` are (source, target, mode); /proc comes first, as in every real launch."""
        everything = [("/proc/.", "/proc", "rw"), *mounts]
        tries = [f"/bin/{os.fsdecode(command[0])}"] if candidates is None else candidates
        return [
            *("hpcctr-enter", "1", str(DESCRIPTOR), str(personality), str(pdeathsig)),
            str(len(everything)),
            *(word for mount in everything for word in mount),
            *(cwd, str(len(tries)), *tries, *command),
        ]

    # processes

    def start(
        self,
        argv: Sequence[str | bytes],
        *,
        account: Account = ALICE,
        env: Mapping[str, str] | Mapping[bytes, bytes] | None = None,
        sock: socket.socket | None = None,
        closed: Sequence[int] = (),
        kept: Sequence[int] = (),
        before: Callable[[], None] = lambda: None,
        as_root: Callable[[], None] = lambda: None,
        program: Path | None = None,
        wrapper: Sequence[str] = (),
    ) -> Launch:
        """Start enter in the Host as `account`, connected to the engine at DESCRIPTOR, or with `sock` there instead.

        `as_root` runs in the new process before it becomes the account, `before` just before execve.
        """
        given = None if sock is None else sock.fileno()

        def prepare() -> None:
            _keep_only_standard_descriptors()
            go_into(self.host.holder.pid)
            as_root()
            become(account)
            if given is None:
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                connection.connect(SOCKET)
                os.dup2(connection.fileno(), DESCRIPTOR)
            else:
                os.dup2(given, DESCRIPTOR)
            before()
            for descriptor in closed:
                os.close(descriptor)

        enter = str(program or self.program)
        process = subprocess.Popen(
            [*wrapper, enter, *argv[1:]] if wrapper else list(argv),
            executable=None if wrapper else enter,
            env={"PATH": "/bin"} if env is None else env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # What Python opens is closed on exec anyway; what `prepare` placed must stay.
            close_fds=False,
            preexec_fn=prepare,
            start_new_session=True,
        )
        launch = Launch(process=process)
        self.launches.append(launch)
        return launch

    def child(self, work: Callable[[], int | None], *, account: Account = ALICE) -> int:
        """Fork a process of `account` in the Host that does `work` and exits with what it returns (0 for None).

        The caller waits for it; `ended` does that.
        """
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                # A child that waits in vain must end, whatever becomes of the test.
                signal.alarm(int(_PATIENCE))
                os.setsid()
                go_into(self.host.holder.pid)
                become(account)
                status = work() or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                _quit(status)
        return pid

    # the engine

    def accept(self) -> socket.socket:
        connection, _ = self.listener.accept()
        connection.settimeout(_PATIENCE)
        return connection

    def hear(self, connection: socket.socket) -> tuple[int, int, int]:
        """Wait for enter's byte; pid, uid and gid of its sender, as the kernel tells them."""
        data, ancillary, _, _ = connection.recvmsg(16, socket.CMSG_SPACE(12))
        assert data == b"E", data
        ((_, kind, credentials),) = ancillary
        assert kind == socket.SCM_CREDENTIALS
        pid, uid, gid = struct.unpack("iII", credentials)
        return pid, uid, gid

    def answer(self, *descriptors: int, data: bytes = b"\0", extra: Sequence[tuple[int, int, bytes]] = ()) -> None:
        """One session of the engine: accept, hear, send `data` with the descriptors, close."""
        with self.accept() as connection:
            try:
                self.hear(connection)
            except AssertionError:
                # enter ended before it asked: its error tells why.
                return
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(descriptors)}i", *descriptors))]
            connection.sendmsg([data], [*(rights if descriptors else []), *extra])

    def run(self, argv: Sequence[str | bytes], **how: object) -> Ended:
        """start, answer with the container, finish."""
        launch = self.start(argv, **how)  # type: ignore[arg-type]  # as `start`
        self.answer(self.container)
        return launch.finish()

    def run_alone(self, argv: Sequence[str | bytes], **how: object) -> Ended:
        """start with an engine that never hears of it, finish."""
        ended = self.start(argv, **how).finish()  # type: ignore[arg-type]  # as `start`
        if "sock" not in how:
            self.accept().close()
        return ended

    # the machine

    def shell(self, script: str) -> str:
        """Run a script as root in the Host."""
        return self.host.run(["sh", "-euc", script]).stdout.decode(errors="replace")

    def directory(self, name: str, *, account: Account = ALICE, mode: int = 0o700) -> Path:
        path = self.place / name
        path.mkdir()
        os.chown(path, account.uid, account.gid)
        path.chmod(mode)
        return path

    def listen(self, path: str, kind: socket.SocketKind = socket.SOCK_SEQPACKET) -> socket.socket:
        """A socket root listens on at `path` of the Host (abstract with a leading zero byte)."""
        listener = socket.socket(socket.AF_UNIX, kind)

        def bind() -> None:
            listener.bind(path)
            if not path.startswith("\0"):
                os.chmod(path, 0o666)
            listener.listen(64)

        assert ended(self.child(bind, account=ROOT)) == 0
        listener.settimeout(_PATIENCE)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        return listener

    def connect(
        self, path: str, kind: socket.SocketKind = socket.SOCK_SEQPACKET, *, account: Account = ALICE
    ) -> socket.socket:
        """A socket of the account's, connected to `path` of the Host."""
        connection = socket.socket(socket.AF_UNIX, kind)

        def work() -> None:
            connection.connect(path)

        assert ended(self.child(work, account=account)) == 0
        return connection

    def build_container(self, *, prepare: str = ":", mark_read_only: bool = True, shared: bool = False) -> int:
        """A descriptor of a new mount namespace with the busybox root, as a runtime leaves it: read-only, not nosuid.

        `prepare` is shell, run before the root is changed, with the root as its working directory. `shared`: the
        container's mounts are peers of the Host's.
        """
        root = self.place / "rootfs"
        read_only = f"mount -o remount,bind,ro {root}" if mark_read_only else ":"
        # A shared root cannot be pivoted into (pivot_root(2)): it is made shared again behind that.
        sharing = "/bin/busybox mount --make-rshared /" if shared else ":"
        script = f"""
            mount --bind {root} {root}
            cd {root}
            {prepare}
            {read_only}
            pivot_root . .
            /bin/busybox umount -l .
            {sharing}
            echo ready
            exec /bin/busybox cat
        """
        holder = self.host.popen(
            ["unshare", "--mount", "--propagation", "slave", "sh", "-euc", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert holder.stdin is not None and holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        # As with a node container whose init was killed, the descriptor alone keeps the namespace.
        namespace = os.open(f"/proc/{holder.pid}/ns/mnt", os.O_RDONLY)
        holder.stdin.close()
        holder.wait(_PATIENCE)
        holder.stdout.close()
        self.host.started.remove(holder)
        return namespace

    def require_nothing_left(self, mounts_before: Sequence[str]) -> None:
        """Every process the test started has ended, and the Host's mounts and the machine's are what they were."""
        unfinished = [launch.process.args for launch in self.launches if launch.process.returncode is None]
        self.end_launches()
        assert not unfinished, f"{unfinished!r} were not waited for"
        wait_until(lambda: not self.own_processes(), what=lambda: f"the end of {self.own_processes()}")
        assert self.own_mounts() == list(mounts_before)

    def end_launches(self) -> None:
        """Kill what still runs, so that a failed test does not disturb the next."""
        for launch in self.launches:
            if launch.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(launch.pid, signal.SIGKILL)
                launch.process.wait(_PATIENCE)
                with contextlib.suppress(TimeoutError):
                    # Its connection may still wait to be accepted.
                    self.listener.settimeout(0.1)
                    self.listener.accept()[0].close()
                self.listener.settimeout(_PATIENCE)
            for stream in (launch.process.stdout, launch.process.stderr):
                if stream is not None:
                    stream.close()
        self.launches.clear()

    def own_processes(self) -> list[str]:
        """Processes of the test's accounts, and whatever else runs in the Host."""
        accounts = [process for process in processes() if process.uid in (ALICE.uid, BOB.uid) and not process.is_zombie]
        inside = [process for process in self.host.processes() if not process.is_zombie]
        return [str(process) for process in {process.pid: process for process in [*accounts, *inside]}.values()]

    def own_mounts(self) -> list[str]:
        """The Host's mounts, and those of the machine that concern this world."""
        machine = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
        ids_differ = [" ".join(line.split(" ")[3:]) for line in machine if str(self.place) in line]
        return [str(mount) for mount in self.host.mounts()] + ids_differ


def ended(pid: int) -> int:
    """Wait for a child; its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def namespace_of_a_child(world: World, unshared: int) -> tuple[int, Callable[[], None]]:
    """A descriptor of a mount namespace Alice made in a user namespace of hers, and what ends its process."""
    ready, go = os.pipe()

    def make() -> None:
        os.close(ready)
        require(libc.unshare(CLONE_NEWUSER | unshared))
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
        assert ended(pid) == 0

    return namespace, end


def wait_for_state(pid: int, letters: str) -> None:
    """Wait until the process is in one of these states of proc_pid_stat(5)."""

    def is_there() -> bool:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] in letters

    wait_until(is_there, what=f"state {letters} of {pid}")


def _make_rootfs(root: Path) -> None:
    for name in ("proc", "sys", "dev", "tmp", "bin", "etc", "home", "real", "mnt/one", "mnt/two", "run/hpcctr/x"):
        (root / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    for applet in ("cat", "grep", "id", "ls", "mount", "pwd", "readlink", "sh", "sleep", "stat", "touch", "true"):
        (root / "bin" / applet).symlink_to("busybox")
    (root / "etc/file").write_text("of the image\n")
    (root / "link").symlink_to("real")
    (root / "bin/not-executable").write_text("#!/bin/sh\n")
    for name, text in (
        ("script", "#!/bin/sh\necho script $@\n"),
        ("orphan", "#!/no/such/interpreter\n"),
        ("no-format", "neither script nor program\n"),
    ):
        (root / "bin" / name).write_text(text)
        (root / "bin" / name).chmod(0o755)


@contextlib.contextmanager
def world(place: Path, *, propagation: str = "private") -> Iterator[World]:
    """Build everything in `place` and take it down; `propagation` of the Host's mounts: private or shared."""
    (place / "rootfs").mkdir()
    _make_rootfs(place / "rootfs")
    built = place / "built/enter"
    compile_enter(built)
    program = place / "enter"
    install_enter(built, program)
    with Host.start(place, propagation="shared" if propagation == "shared" else "private") as host:
        made = World(place=place, host=host, program=program, listener=socket.socket(), container=-1)
        made.listener.close()
        made.shell("mkdir -m 755 /run/hpcctr")
        made.listener = made.listen(SOCKET)
        made.container = made.build_container()
        try:
            yield made
        finally:
            made.end_launches()
            os.close(made.container)
            made.listener.close()
