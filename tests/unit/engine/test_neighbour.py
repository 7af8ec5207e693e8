"""containerd must see what the engine mounts."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hpcctr.engine.neighbour import require_common_mounts
from hpcctr.errors import ContainerdUnavailable

pytestmark = pytest.mark.root

LISTEN = """
import socket, sys
s = socket.socket(socket.AF_UNIX)
s.bind(sys.argv[1])
s.listen()
print(flush=True)
sys.stdin.read()
"""


def test_a_neighbour_in_the_same_mount_namespace_is_fine(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        require_common_mounts(str(tmp_path / "s"))


def test_a_neighbour_in_another_mount_namespace_is_named(tmp_path: Path) -> None:
    process = subprocess.Popen(
        ["unshare", "--mount", sys.executable, "-c", LISTEN, str(tmp_path / "s")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(ContainerdUnavailable, match="another mount namespace") as raised:
        require_common_mounts(str(tmp_path / "s"))
    assert f"--target {process.pid}" in raised.value.hint
    process.communicate()


def test_no_neighbour_is_for_the_first_call_to_name(tmp_path: Path) -> None:
    require_common_mounts(str(tmp_path / "none"))
