"""The control socket: one verb, root alone, a deadline for everything."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcctr.engine import control
from hpcctr.engine.serve import own_listener
from hpcctr.errors import ContainerdUnavailable, DeadlinePassed, EngineUnreachable, ProtocolBroken
from hpcctr.wire import Frame

pytestmark = pytest.mark.root


class Nodes:
    """Stands for the engine's containers; what they really do is tested in tests/e2e/test_cleanup.py."""

    def __init__(self) -> None:
        self.asked: list[float] = []
        self.is_broken = False

    def remove_idle(self, *, seconds: float) -> tuple[list[str], list[str]]:
        self.asked.append(seconds)
        if self.is_broken:
            raise ContainerdUnavailable("containerd is away", hint="start it")
        return ["one", "two"], ["slow"]


@pytest.fixture
def nodes() -> Nodes:
    return Nodes()


@pytest.fixture
def path(tmp_path: Path, nodes: Nodes) -> Iterator[str]:
    name = str(tmp_path / "control.sock")
    with own_listener(name, mode=0o600) as listener:
        control.serve(listener, nodes)  # type: ignore[arg-type]
        yield name
        listener.shutdown(socket.SHUT_RDWR)


def _answer(path: str, packet: bytes) -> Frame:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(10)
        sock.connect(path)
        sock.sendall(packet)
        return Frame.unpack(sock.recv(65536))


def test_what_was_removed_and_what_was_not_comes_back(path: str, nodes: Nodes) -> None:
    assert control.remove_idle(path) == control.Removed(removed=["one", "two"], unfinished=["slow"])
    assert len(nodes.asked) == 1 and nodes.asked[0] < control.ANSWER_SECONDS


def test_the_engines_error_is_raised_as_the_class_it_is(path: str, nodes: Nodes) -> None:
    nodes.is_broken = True
    with pytest.raises(ContainerdUnavailable, match="containerd is away") as raised:
        control.remove_idle(path)
    assert raised.value.hint == "start it"


def test_the_socket_is_roots(path: str) -> None:
    assert os.stat(path).st_mode & 0o777 == 0o600 and os.stat(path).st_uid == 0


def test_nobody_but_root_is_answered_even_where_the_socket_is_open(path: str, nodes: Nodes, tmp_path: Path) -> None:
    os.chmod(path, 0o666)
    os.chmod(tmp_path, 0o755)
    # From there: the directories above are closed to others. The answer comes before any question.
    code = (
        "import os, socket, sys; os.chdir(sys.argv[1]); os.setuid(65534);"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect('control.sock');"
        "print(s.recv(65536))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "caller-refused" in done.stdout and nodes.asked == []


@pytest.mark.parametrize(
    "packet",
    [
        b"hpcctr/1 run\0image=x\0", b"hpcctr/1 exec\0pid=1\0", b"hpcctr/1 remove-idle\0uid=0\0",
        b"hpcctr/2 remove-idle\0", b"remove-idle", b"\0", b"x" * 70000,
    ],
)  # fmt: skip
def test_anything_else_is_refused_and_does_nothing(path: str, nodes: Nodes, packet: bytes) -> None:
    assert _answer(path, packet).text("slug") == ProtocolBroken.slug
    assert nodes.asked == []
    assert control.remove_idle(path).removed == ["one", "two"]


def test_without_an_engine_the_reason_is_told(tmp_path: Path) -> None:
    with pytest.raises(EngineUnreachable, match="No such file"):
        control.remove_idle(str(tmp_path / "none"))
    own_listener(str(tmp_path / "dead")).close()
    with pytest.raises(EngineUnreachable, match="refused"):
        control.remove_idle(str(tmp_path / "dead"))


def test_a_silent_engine_is_not_waited_for_longer_than_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "ANSWER_SECONDS", 0.2)
    begun = time.monotonic()
    with own_listener(str(tmp_path / "s")), pytest.raises(DeadlinePassed):
        control.remove_idle(str(tmp_path / "s"))
    assert time.monotonic() - begun < 5


def test_one_who_asks_nothing_keeps_nobody(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.connect(path)
        assert control.remove_idle(path).removed == ["one", "two"]
