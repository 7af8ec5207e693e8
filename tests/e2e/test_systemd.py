"""The shipped units: systemd reads them, and an engine on a socket it did not make serves as any other."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import Profile
from tests.support.engine import HPCCTR
from tests.support.polling import wait_until

pytestmark = [pytest.mark.root, pytest.mark.containerd]

UNITS = Path(__file__).parents[2] / "etc/systemd"


def test_systemd_finds_no_fault_with_the_units(place: Path) -> None:
    for unit in UNITS.iterdir():
        # verify wants the program to exist; the path in the file is an administrator's to set.
        (place / unit.name).write_text(unit.read_text().replace("/opt/hpcctr/bin/hpcctr", str(HPCCTR)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, sorted(place.glob("hpcctr-engine.*")))],
        capture_output=True,
        text=True,
        check=False,
    )
    complaints = [line for line in done.stderr.splitlines() if "hpcctr-engine" in line]
    # containerd.service belongs to another package and is not looked at here.
    assert [line for line in complaints if "containerd.service" not in line] == []


def test_an_engine_started_by_its_socket_serves(own_node_with_busybox: Profile) -> None:
    profile = own_node_with_busybox
    host, site = profile.node.host, profile.node.site
    profile.node.engine.stop()
    host.path("/run/hpcctr/engine.sock").unlink()
    # systemd's own tool for trying socket activation; it starts the engine at the first connection.
    activator = host.popen(
        [
            "systemd-socket-activate",
            "--seqpacket",
            "--listen=/run/hpcctr/engine.sock",
            str(HPCCTR),
            "engine",
            "serve",
            "--site",
            str(site.file),
        ],
        stderr=subprocess.DEVNULL,
    )
    socket = host.path("/run/hpcctr/engine.sock")
    wait_until(socket.exists)
    socket.chmod(0o666)
    assert profile.output("echo", "activated") == "activated\n"
    assert b"engine\0serve" in Path(f"/proc/{activator.pid}/cmdline").read_bytes()
    activator.terminate()
    assert activator.wait(20) == 0
