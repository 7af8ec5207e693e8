"""A containerd of its own for a Host: no CRI, own state, own socket."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.support.host import Host
from tests.support.polling import wait_until

NAMESPACE = "hpcctr"
"""containerd's namespace in which the engine keeps its records."""

_CONFIG = """
version = 2
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = [
    "io.containerd.grpc.v1.cri", "io.containerd.internal.v1.cri", "io.containerd.cri.v1.images",
    "io.containerd.cri.v1.runtime", "io.containerd.nri.v1.nri", "io.containerd.internal.v1.opt",
    "io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp",
    "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
    "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.blockfile",
]

[grpc]
address = "{socket}"

[debug]
level = "info"
"""


@dataclass(kw_only=True)
class Containerd:
    """A running containerd. Its log is DIRECTORY/log, all its events are in DIRECTORY/events."""

    host: Host
    directory: Path
    socket: Path
    process: subprocess.Popen[bytes]
    recorder: subprocess.Popen[bytes]

    def ctr(self, *arguments: str, check: bool = True, timeout: float = 60) -> str:
        """What `ctr` prints, in the engine's namespace."""
        argv = ["ctr", "--address", str(self.socket), "--namespace", NAMESPACE, *arguments]
        return self.host.run(argv, check=check, timeout=timeout).stdout.decode()

    def containers(self) -> tuple[str, ...]:
        return tuple(self.ctr("containers", "list", "--quiet").split())

    def tasks(self) -> dict[str, str]:
        """Task id to status, as CREATED or RUNNING."""
        rows = [line.split() for line in self.ctr("tasks", "list").splitlines()[1:]]
        return {row[0]: row[-1] for row in rows}

    def created(self) -> tuple[str, ...]:
        """Every container ever made in the engine's namespace, in order, also those removed since."""
        found = []
        for line in (self.directory / "events").read_text().splitlines():
            # date, time, zone, zone, namespace, topic, event
            before, _, event = line.partition(" /containers/create ")
            if event and before.split()[-1] == NAMESPACE:
                found.append(str(json.loads(event)["id"]))
        return tuple(found)

    def restart(self, *, kill: bool = False) -> None:
        """End containerd (SIGKILL with `kill`) and start it again on the same state; containers outlive that."""
        self.process.kill() if kill else self.process.terminate()
        self.process.wait(30)
        self.recorder.wait(30)
        self.process = _launch(self.host, self.directory, self.socket)
        self.recorder = _record(self.host, self.directory, self.socket)

    def stop(self) -> None:
        """Remove all containers with their tasks, then end containerd."""
        for task_id in self.tasks():
            self.ctr("tasks", "delete", "--force", task_id, check=False)
        for container_id in self.containers():
            self.ctr("containers", "delete", container_id, check=False)
        self.recorder.terminate()
        self.recorder.wait(30)
        self.process.terminate()
        self.process.wait(30)

    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")


def _record(host: Host, directory: Path, socket: Path) -> subprocess.Popen[bytes]:
    with (directory / "events").open("ab") as events:
        return host.popen(["ctr", "--address", str(socket), "events"], stdout=events)


def _launch(host: Host, directory: Path, socket: Path) -> subprocess.Popen[bytes]:
    """Start containerd and wait until it answers."""
    with (directory / "log").open("ab") as log:
        process = host.popen(["containerd", "--config", str(directory / "config.toml")], stdout=log, stderr=log)

    def answers() -> bool:
        assert process.poll() is None, f"containerd ended:\n{(directory / 'log').read_text(errors='replace')}"
        if not socket.exists():
            return False
        argv = ["ctr", "--address", str(socket), "--connect-timeout", "2s", "version"]
        return host.run(argv, check=False).returncode == 0

    wait_until(answers, seconds=30, what="an answer of containerd")
    return process


def start(host: Host, directory: Path | None = None) -> Containerd:
    """Start containerd with all its files below DIRECTORY (default: the Host's own), and wait until it answers."""
    directory = host.root / "containerd" if directory is None else directory
    directory.mkdir(mode=0o711, parents=True, exist_ok=True)
    socket = directory / "containerd.sock"
    config = directory / "config.toml"
    config.write_text(_CONFIG.format(directory=directory, socket=socket))
    process = _launch(host, directory, socket)
    recorder = _record(host, directory, socket)
    return Containerd(host=host, directory=directory, socket=socket, process=process, recorder=recorder)
