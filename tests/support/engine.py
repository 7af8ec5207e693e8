"""The engine of hpcctr as a gateway in a Host, and the installed program `enter`."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.host import CommandFailed, Host
from tests.support.polling import wait_until
from tests.support.site import Site

HPCCTR = Path(os.environ.get("HPCCTR_DEV", "/opt/hpcctr/dev")) / "bin/hpcctr"
SOCKET = Path("/run/hpcctr/engine.sock")


def install_enter(site: Site) -> None:
    """Put `enter` with its file capabilities where the site says; nothing happens when it is there already."""
    site.enter.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    argv = [str(HPCCTR), "engine", "install", "--site", str(site.file)]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode != 0:
        raise CommandFailed(argv, done.returncode, done.stdout, done.stderr)


@dataclass(kw_only=True)
class Engine:
    """A running `hpcctr engine serve`. Its log is HOST.root/engine.log."""

    host: Host
    site: Site
    process: subprocess.Popen[bytes]
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def log_file(self) -> Path:
        return self.host.root / "engine.log"

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def stop(self, *, kill: bool = False) -> None:
        self.process.kill() if kill else self.process.terminate()
        self.process.wait(30)

    def restart(self, *, kill: bool = False) -> None:
        """End the engine (SIGKILL with `kill`) and start a new one at the same site."""
        self.stop(kill=kill)
        self.process = _launch(self.host, self.site, self.env)
        self.wait_for_socket()

    def wait_for_socket(self) -> None:
        def accepts() -> bool:
            assert self.process.poll() is None, f"the engine ended with {self.process.returncode}:\n{self.log()}"
            with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as probe:
                return probe.connect_ex(str(self.host.path(SOCKET))) == 0

        wait_until(accepts, seconds=30, what=lambda: f"the engine's socket; its log:\n{self.log()}")


def _launch(host: Host, site: Site, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with (host.root / "engine.log").open("ab") as log:
        return host.popen([str(HPCCTR), "engine", "serve", "--site", str(site.file)], env=env, stdout=log, stderr=log)


def start(host: Host, site: Site, *, env: Mapping[str, str] | None = None) -> Engine:
    """Start the engine and wait until its socket accepts."""
    engine = Engine(host=host, site=site, process=_launch(host, site, env or {}), env=env or {})
    engine.wait_for_socket()
    return engine
