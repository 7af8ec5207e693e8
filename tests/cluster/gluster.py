"""A shared filesystem as clusters have it: GlusterFS, one server and one brick on the first host, mounted over FUSE."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.host import Host
from tests.support.polling import wait_until

_VOLUME = "store"
_GLUSTERD = """
volume management
    type mgmt/glusterd
    option working-directory {directory}/state
    option transport-type socket
    option transport.socket.listen-port 24007
    option transport.address-family inet
end-volume
"""


@dataclass(frozen=True, kw_only=True)
class Gluster:
    """The mounted filesystem: `mount_point` is one path on all hosts."""

    server: Host
    mount_point: Path

    def volume(self, *arguments: str) -> str:
        return self.server.run(["gluster", "--mode=script", "volume", *arguments], timeout=60).stdout.decode()

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counter]:
        """Within the block the brick counts what all clients ask it for; each open, which they would else put off."""
        for option in ("open-behind", "quick-read"):
            self.volume("set", _VOLUME, f"performance.{option}", "off")
        self.volume("profile", _VOLUME, "start")
        counter = Counter(gluster=self)
        counter.counted()
        try:
            yield counter
        finally:
            self.volume("profile", _VOLUME, "stop")
            for option in ("open-behind", "quick-read"):
                self.volume("reset", _VOLUME, f"performance.{option}")


@dataclass(frozen=True, kw_only=True)
class Counter:
    """The brick's counts since they were last asked for."""

    gluster: Gluster

    def counted(self) -> dict[str, int]:
        """Operation to number, as OPEN, READ, LOOKUP; without what clients do with descriptors they give up."""
        table = self.gluster.volume("profile", _VOLUME, "info", "incremental")
        counts: dict[str, int] = {}
        # %-latency  average latency with its unit  least  most  calls  operation
        row = r"^\s*[\d.]+(?:\s+[\d.]+ [mun]?s){3}\s+(\d+)\s+([A-Z]+)\s*$"
        for calls, operation in re.findall(row, table, re.MULTILINE):
            if not operation.startswith(("RELEASE", "FORGET")):
                counts[operation] = counts.get(operation, 0) + int(calls)
        return counts


def _own_logs(host: Host, directory: Path) -> None:
    logs = directory / f"log.{host.root.name}"
    logs.mkdir(mode=0o755)
    host.run(["mount", "--bind", str(logs), "/var/log/glusterfs"])


@contextlib.contextmanager
def gluster(directory: Path, mount_point: Path, hosts: Mapping[str, Host]) -> Iterator[Gluster]:
    """Start the server with all its files below DIRECTORY, and mount the volume on every host."""
    server = next(iter(hosts.values()))
    for name in (".", "state", "brick"):
        (directory / name).mkdir(mode=0o755)
    mount_point.mkdir(mode=0o755)
    for host in hosts.values():
        _own_logs(host, directory)
    volfile = directory / "glusterd.vol"
    volfile.write_text(_GLUSTERD.format(directory=directory))
    daemon = server.popen(["glusterd", "--no-daemon", f"--volfile={volfile}"])
    made = Gluster(server=server, mount_point=mount_point)

    def answers() -> bool:
        assert daemon.poll() is None, f"glusterd ended with status {daemon.returncode}"
        done = server.run(["gluster", "--mode=script", "volume", "list"], check=False)
        return done.returncode == 0

    with contextlib.ExitStack() as stack:
        stack.callback(_end, daemon)
        wait_until(answers, seconds=30, what="glusterd")
        made.volume("create", _VOLUME, f"{server.root.name}:{directory}/brick", "force")
        made.volume("start", _VOLUME)
        stack.callback(made.volume, "stop", _VOLUME, "force")
        for host in hosts.values():
            host.run(["mount", "-t", "glusterfs", f"{server.root.name}:/{_VOLUME}", str(mount_point)])
            stack.callback(host.run, ["umount", str(mount_point)])
        yield made


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    daemon.wait(30)
