"""A host of its own inside this machine: a mount namespace with its own /run, held by a process.

Daemons and users' programs of a test run in it, so that two engines never meet in /run/hpcctr and that
everything a test mounts ends with it.

    with Host.start(Path("/var/tmp/x"), propagation="shared") as host:
        host.run(["id", "-un"], user=alice)
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from tests.support.mountinfo import Mount, read_mountinfo
from tests.support.polling import wait_until
from tests.support.processes import Process, processes
from tests.support.users import User

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MARK = "TEST_HOST_MARK"
"""Environment variable that tells which Host a process came from, also after it went into a container."""

# On a machine without udev /dev/fuse is root's alone; udev's rule opens it to everyone. The node lives on below /run.
_PRIVATE_RUN = """
set -eu
if [ -e /dev/fuse ]; then
    mount -t tmpfs -o mode=700,nosuid,size=64k tmpfs /run
    mknod -m 666 /run/fuse c 10 229
    mount --bind /run/fuse /dev/fuse
    umount /run
fi
mount -t tmpfs -o mode=755,nosuid,nodev,size=256m tmpfs /run
mkdir -p /run/lock /run/user
chmod 1777 /run/lock
"""
_SHOW_ONLY_CGROUP2 = "mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 /sys/fs/cgroup\n"
_LOOPBACK_UP = "ip link set lo up\n"
_NAME = 'hostname "$HOST_NAME"\n'
_HOLD = "echo ready\nexec cat\n"


class CommandFailed(AssertionError):
    """A command in a Host ended otherwise than the test demands; the text carries all it printed."""

    def __init__(self, argv: Sequence[str], status: int | str, stdout: bytes, stderr: bytes) -> None:
        super().__init__(
            f"{' '.join(argv)}\nstatus: {status}\nstdout: {stdout.decode(errors='replace')}\n"
            f"stderr: {stderr.decode(errors='replace')}"
        )


@dataclass(kw_only=True)
class Host:
    """A held mount namespace. `root` is its directory for sockets, logs and state, readable for everyone."""

    root: Path
    holder: subprocess.Popen[bytes]
    mark: str
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @classmethod
    def start(
        cls,
        root: Path,
        *,
        propagation: Literal["private", "shared"] = "private",
        own_network: bool = False,
        cgroup2_only: bool = False,
        hostname: str | None = None,
    ) -> Self:
        """Unshare, mount /run, and hold. `shared`: all mounts propagate within the Host, as systemd sets it at boot."""
        script = _PRIVATE_RUN
        if cgroup2_only:
            script += _SHOW_ONLY_CGROUP2
        if own_network:
            script += _LOOPBACK_UP
        if hostname is not None:
            script += _NAME
        if propagation == "shared":
            script += "mount --make-rshared /\n"
        mark = f"{root.name}.{os.getpid()}.{time.monotonic_ns()}"
        argv = ["unshare", "--mount", "--propagation", "private", "--uts", *(["--net"] if own_network else [])]
        holder = subprocess.Popen(
            [*argv, "sh", "-c", script + _HOLD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PATH": PATH, MARK: mark, "HOST_NAME": hostname or ""},
            # An interrupt typed at the tests must not end the holder before the tests have cleaned up.
            start_new_session=True,
        )
        assert holder.stdout is not None
        if holder.stdout.readline() != b"ready\n":
            holder.kill()
            raise AssertionError(f"no host: unshare ended with status {holder.wait()}")
        return cls(root=root, holder=holder, mark=mark)

    def argv(
        self, argv: Sequence[str], *, user: User | None = None, cwd: Path | str | None = None, umask: int | None = None
    ) -> list[str]:
        """The command line that runs `argv` in this Host. Every part execs the next: the pid stays."""
        namespaces = f"/proc/{self.holder.pid}/ns"
        entered = ["nsenter", f"--mount={namespaces}/mnt", f"--net={namespaces}/net", f"--uts={namespaces}/uts"]
        if user is not None:
            groups = ",".join(str(gid) for gid in user.groups)
            entered += [
                "setpriv",
                f"--reuid={user.uid}",
                f"--regid={user.gid}",
                f"--groups={groups}",
                "--inh-caps=-all",
            ]
        if cwd is None:
            cwd = "/" if user is None else user.home
        entered += ["env", f"--chdir={cwd}"]
        if umask is not None:
            entered += ["sh", "-c", f'umask {umask:o} && exec "$@"', "sh"]
        return [*entered, *(os.fspath(argument) for argument in argv)]

    def environment(self, user: User | None, extra: Mapping[str, str] | None) -> dict[str, str]:
        """What a login would set, and nothing of the environment the tests themselves run in."""
        name, home = ("root", "/root") if user is None else (user.name, str(user.home))
        return {
            "PATH": PATH,
            "HOME": home,
            "USER": name,
            "LOGNAME": name,
            "SHELL": "/bin/sh",
            "LANG": "C.UTF-8",
            MARK: self.mark,
            **(extra or {}),
        }

    def popen(
        self,
        argv: Sequence[str],
        *,
        user: User | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        umask: int | None = None,
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        pass_fds: Sequence[int] = (),
        start_new_session: bool = True,
    ) -> subprocess.Popen[bytes]:
        """Start a program; its pid is the Popen's own. What still runs at `stop` is killed."""
        process = subprocess.Popen(
            self.argv(argv, user=user, cwd=cwd, umask=umask),
            env=self.environment(user, env),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=pass_fds,
            start_new_session=start_new_session,
        )
        self.started.append(process)
        return process

    def run(
        self,
        argv: Sequence[str],
        *,
        user: User | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        umask: int | None = None,
        input: bytes | None = None,
        timeout: float = 60,
        check: bool | int = True,
        pass_fds: Sequence[int] = (),
    ) -> subprocess.CompletedProcess[bytes]:
        """Run to the end and collect the output; `check` demands status 0, or the given status, or nothing (False)."""
        process = self.popen(
            argv,
            user=user,
            env=env,
            cwd=cwd,
            umask=umask,
            stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=pass_fds,
        )
        try:
            stdout, stderr = process.communicate(input, timeout=timeout)
        except subprocess.TimeoutExpired:
            # The whole session: a launcher's children keep the pipes open.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            stdout, stderr = process.communicate()
            raise CommandFailed(argv, f"still running after {timeout} s", stdout, stderr) from None
        finally:
            self.started.remove(process)
        if check is not False and process.returncode != (0 if check is True else check):
            raise CommandFailed(argv, process.returncode, stdout, stderr)
        return subprocess.CompletedProcess(list(argv), process.returncode, stdout, stderr)

    def path(self, path: Path | str) -> Path:
        """The outside name of a path of this Host, for instance of its /run."""
        return Path(f"/proc/{self.holder.pid}/root") / str(path).lstrip("/")

    def mounts(self) -> tuple[Mount, ...]:
        return read_mountinfo(Path(f"/proc/{self.holder.pid}/mountinfo"))

    def processes(self) -> tuple[Process, ...]:
        """All processes of this Host but its holder: in its mount namespace, marked, or descended from one of these."""
        namespace = os.stat(f"/proc/{self.holder.pid}/ns/mnt").st_ino
        everything = processes()
        ours = {
            process.pid
            for process in everything
            if process.mount_namespace == namespace or process.environment_has(f"{MARK}={self.mark}")
        }
        while True:
            children = {process.pid for process in everything if process.ppid in ours} - ours
            if not children:
                break
            ours |= children
        ours.discard(self.holder.pid)
        return tuple(process for process in everything if process.pid in ours)

    def stop(self) -> None:
        """End every process of this Host, then its holder; the kernel unmounts what nobody holds any more."""
        with contextlib.suppress(FileNotFoundError):
            wait_until(self._nothing_runs, seconds=20, what=lambda: f"end of {self.processes()}")
        for process in self.started:
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        self.holder.kill()
        self.holder.wait()
        for stream in (self.holder.stdin, self.holder.stdout):
            if stream is not None:
                stream.close()

    def _nothing_runs(self) -> bool:
        running = [process for process in self.processes() if not process.is_zombie]
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        return not running

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
