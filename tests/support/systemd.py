"""A real systemd for a Host: the manager of root's own session, which applies every option of a unit as pid 1 does.

It needs no init and no D-Bus. What it starts is in the Host's mount namespace and in the machine's pid namespace, so
the engine's checks of callers hold; and it is root's with all capabilities, so options that need privilege (bounding
set, devices, filters, namespaces) are applied and not skipped.

with Systemd.start(host) as systemd:
    systemd.write("x.service", "[Service]\nExecStart=/bin/sleep 60\n")
    systemd.ctl("start", "x.service")
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.host import Host
from tests.support.polling import wait_until

MANAGER = "/lib/systemd/systemd"
_RUNTIME = "/run/systemd-root"
_UNITS = "/run/systemd-units"
_ENVIRONMENT = {
    "XDG_RUNTIME_DIR": _RUNTIME,
    # Only the units a test writes: nothing of the machine's is started.
    "SYSTEMD_UNIT_PATH": _UNITS,
    "SYSTEMD_GENERATOR_PATH": "",
    "SYSTEMD_ENVIRONMENT_GENERATOR_PATH": "",
    "SYSTEMD_LOG_TARGET": "console",
    "SYSTEMD_COLORS": "0",
    "SYSTEMD_PAGER": "",
}
_TARGETS = ("basic.target", "sockets.target", "shutdown.target")
# Nothing of other hierarchies stays below, where a mount table would still name it. The Host's mounts are private.
_SHOW_ONLY_CGROUP2 = """
set -eu
[ "$(stat -f -c %T /sys/fs/cgroup)" = cgroup2fs ] && exit
umount --recursive /sys/fs/cgroup
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 /sys/fs/cgroup
"""
# A manager takes all processes of the cgroup it starts in to be its own and moves them: it gets a cgroup that has none,
# and where that cannot be had it does not start.
_START = """
set -eu
[ "$(stat -f -c %T /sys/fs/cgroup)" = cgroup2fs ]
echo 0 >"/sys/fs/cgroup/$1/cgroup.procs"
grep -qx "0::/$1" /proc/self/cgroup
exec "$2" --user --unit=basic.target
"""


@dataclass(frozen=True, kw_only=True)
class Systemd:
    """A running manager; its log, and what its services print, is HOST.root/systemd.log."""

    host: Host
    process: subprocess.Popen[bytes]
    #: Below the cgroup hierarchy's root.
    cgroup: str

    @classmethod
    @contextlib.contextmanager
    def start(cls, host: Host) -> Iterator[Systemd]:
        """Start a manager, end it with all its services, and remove its cgroups.

        The Host shows only cgroup2 from here on, so it comes before what looks at cgroups: containerd.
        """
        host.run(["sh", "-c", _SHOW_ONLY_CGROUP2])
        cgroup = f"hpcctr-systemd-{host.root.name}"
        for directory in ("/run/systemd/system", _UNITS, _RUNTIME, f"/sys/fs/cgroup/{cgroup}"):
            host.path(directory).mkdir(mode=0o700 if directory == _RUNTIME else 0o755, parents=True, exist_ok=True)
        for target in _TARGETS:
            (host.path(_UNITS) / target).write_text(f"[Unit]\nDescription={target}\n")
        try:
            with (host.root / "systemd.log").open("ab") as log:
                process = host.popen(
                    ["sh", "-c", _START, "sh", cgroup, MANAGER], env=_ENVIRONMENT, stdout=log, stderr=log
                )
            started = cls(host=host, process=process, cgroup=cgroup)
            wait_until(started._answers, what=lambda: f"an answer of systemd:\n{started.log()}")
            try:
                yield started
            finally:
                started._stop()
        finally:
            _remove_cgroups(host.path(f"/sys/fs/cgroup/{cgroup}"))

    def ctl(self, *arguments: str, check: bool | int = True, timeout: float = 60) -> str:
        """What `systemctl ARGUMENTS` prints on standard output."""
        done = self.host.run(["systemctl", "--user", *arguments], env=_ENVIRONMENT, check=check, timeout=timeout)
        return done.stdout.decode()

    def write(self, name: str, text: str) -> None:
        """Write a unit, or a drop-in as `x.service.d/50-name.conf`; an empty text removes it."""
        path = self.host.path(_UNITS) / name
        if text:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        else:
            path.unlink(missing_ok=True)
        self.ctl("daemon-reload")

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Properties of a unit, as systemd understood them."""
        lines = self.ctl("show", unit, f"--property={','.join(properties)}").splitlines()
        return dict(line.partition("=")[::2] for line in lines)

    def main_pid(self, unit: str) -> int:
        """The pid of a service's main process; 0 when there is none."""
        return int(self.show(unit, "MainPID")["MainPID"])

    def log(self) -> str:
        return (self.host.root / "systemd.log").read_text(errors="replace")

    def _answers(self) -> bool:
        assert self.process.poll() is None, f"systemd ended with {self.process.returncode}:\n{self.log()}"
        return self.host.path(f"{_RUNTIME}/systemd/private").exists() and "basic.target" in self.ctl(
            "list-units", "--no-legend", "basic.target", check=False
        )

    def _stop(self) -> None:
        for kind in ("socket", "service"):
            units = [
                line.split()[0]
                for line in self.ctl("list-units", f"--type={kind}", "--plain", "--no-legend").splitlines()
            ]
            if units:
                self.ctl("stop", *units, check=False)
        # Its own orderly end would need the units of a whole session.
        self.process.kill()
        self.process.wait(30)


def _remove_cgroups(top: Path) -> None:
    """Remove a cgroup with everything below, once the last of its processes has ended."""

    def is_empty() -> bool:
        for procs in top.rglob("cgroup.procs"):
            for pid in procs.read_text().split():
                # All that can be in there was started by the manager of this test.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        return "populated 0" in (top / "cgroup.events").read_text()

    wait_until(is_empty, what=f"the end of the processes in {top}")
    for directory, _, _ in os.walk(top, topdown=False):
        Path(directory).rmdir()
