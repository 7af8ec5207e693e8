"""Who is served when, with sessions that last as long as a test likes. Callers are processes of numeric users."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hpcctr.context import Caller
from hpcctr.engine import gateway as module
from hpcctr.engine import session
from hpcctr.engine.gateway import Gateway, refuse_descriptors
from hpcctr.engine.pace import Pace
from hpcctr.site import LimitSettings, Site
from hpcctr.wire import FRAME_MAX, Frame
from tests.support.polling import wait_until

pytestmark = pytest.mark.root

#: Connects N times as a user and holds that; then prints what comes on each, as `slug` or `end`, until its stdin ends.
_CALLER = """
import os, socket, sys
path, uid, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
os.setgroups([]); os.setgid(uid); os.setuid(uid)
held = []
for _ in range(count):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(path)
    held.append(sock)
print("connected", flush=True)
for line in sys.stdin:
    packet = held[int(line)].recv(65536)
    print(packet.split(b"slug=")[-1].split(b"\\0")[0].decode() or "end", flush=True)
"""


@dataclass(kw_only=True)
class Sessions:
    """Stands for sessions: each lasts until it is released."""

    begun: list[int] = field(default_factory=list)
    doors: list[session.Door] = field(default_factory=list)
    release: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def serve(self, door: session.Door, peer: socket.socket, caller: Caller) -> None:
        with self.lock:
            self.begun.append(caller.uid)
            self.doors.append(door)
        assert self.release.acquire(timeout=60)

    def count(self, uid: int) -> int:
        with self.lock:
            return self.begun.count(uid)


@dataclass(kw_only=True)
class Serving:
    """A gateway at work."""

    gateway: Gateway
    path: str
    sessions: Sessions
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def call(self, uid: int, count: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", _CALLER, self.path, str(uid), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "connected\n"
        return process


def _hears(process: subprocess.Popen[str], number: int) -> str:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{number}\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.fixture
def limits() -> LimitSettings:
    return LimitSettings(sessions=4, sessions_per_uid=3, waiting_per_uid=2)


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: LimitSettings) -> Iterator[Serving]:
    os.chmod(tmp_path, 0o755)
    os.chmod(tmp_path.parent, 0o755)
    os.chmod(tmp_path.parent.parent, 0o755)
    sessions = Sessions()
    monkeypatch.setattr(session, "serve", sessions.serve)
    path = str(tmp_path / "s")
    gateway = Gateway(Site(limits=limits), nodes=None)  # type: ignore[arg-type]
    bell, ringer = os.pipe()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        os.chmod(path, 0o666)
        listener.listen(128)
        accepting = threading.Thread(target=gateway.accept, args=(listener, bell))
        accepting.start()
        made = Serving(gateway=gateway, path=path, sessions=sessions)
        yield made
        for process in made.processes:
            process.communicate(timeout=20)
        os.write(ringer, b"\x0f")
        accepting.join(20)
        sessions.release.release(10_000)
        assert gateway.drain(20) == 0
        assert not gateway._users
    os.close(bell)
    os.close(ringer)


def test_what_a_user_has_beyond_the_limit_waits_in_line_and_is_served_in_turn(serving: Serving) -> None:
    serving.call(61001, 5)
    wait_until(lambda: serving.sessions.count(61001) == 3)
    serving.sessions.release.release()
    wait_until(lambda: serving.sessions.count(61001) == 4)
    serving.sessions.release.release()
    wait_until(lambda: serving.sessions.count(61001) == 5)


def test_beyond_the_line_they_are_told_so(serving: Serving) -> None:
    process = serving.call(61001, 7)
    assert [_hears(process, number) for number in (5, 6)] == ["engine-busy", "engine-busy"]
    assert serving.sessions.count(61001) == 3


def test_who_has_no_session_gets_one_however_many_others_have(serving: Serving) -> None:
    serving.call(61001, 5)
    wait_until(lambda: serving.sessions.count(61001) == 3)
    for uid in (61002, 61003, 61004):
        serving.call(uid, 2)
        wait_until(lambda uid=uid: serving.sessions.count(uid) == 1)  # type: ignore[misc]
    # The node's own limit of four is reached: seconds wait, until somebody's session ends.
    assert sum(serving.sessions.count(uid) for uid in (61002, 61003, 61004)) == 3
    serving.sessions.release.release(20)
    for uid in (61002, 61003, 61004):
        wait_until(lambda uid=uid: serving.sessions.count(uid) == 2)  # type: ignore[misc]


def test_who_waits_too_long_is_told_so_though_nobody_ends(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LINE_SECONDS", 0.1)
    process = serving.call(61001, 4)
    wait_until(lambda: serving.sessions.count(61001) == 3)
    assert _hears(process, 3) == "engine-busy"
    serving.sessions.release.release(3)
    wait_until(lambda: not serving.gateway._threads)
    assert serving.sessions.count(61001) == 3


def test_new_limits_are_in_force_at_once_and_the_old_sessions_go_on(serving: Serving) -> None:
    serving.call(61001, 5)
    wait_until(lambda: serving.sessions.count(61001) == 3)
    site = Site(carry=("/scratch",), limits=LimitSettings(sessions=8, sessions_per_uid=8, waiting_per_uid=2))
    serving.gateway.settle(site)
    wait_until(lambda: serving.sessions.count(61001) == 5)
    assert [door.site.carry for door in serving.sessions.doors] == [()] * 3 + [("/scratch",)] * 2


def test_a_session_that_fails_in_an_unforeseen_way_costs_nobody_a_place(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(door: session.Door, peer: socket.socket, caller: Caller) -> None:
        raise ZeroDivisionError("unforeseen")

    monkeypatch.setattr(session, "serve", fail)
    process = serving.call(61001, 5)
    assert [_hears(process, number) for number in range(5)] == ["end"] * 5
    assert "unforeseen" in capfd.readouterr().err


@pytest.mark.parametrize("limits", [LimitSettings(launches_per_second=50.0)])
def test_who_is_too_fast_waits_and_nobody_else_does(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, limits: LimitSettings
) -> None:
    monkeypatch.setattr(serving.gateway, "_pace", Pace(burst=2))
    serving.sessions.release.release(1000)
    began = time.monotonic()
    serving.call(61001, 52)
    serving.call(61002, 1)
    wait_until(lambda: serving.sessions.count(61002) == 1)
    others_seconds = time.monotonic() - began
    wait_until(lambda: serving.sessions.count(61001) == 52)
    # Two at once, fifty more at fifty a second.
    assert time.monotonic() - began >= 0.98
    assert others_seconds < time.monotonic() - began


def test_closing_a_connection_that_takes_long_is_its_users_time_alone(serving: Serving) -> None:
    # A descriptor in flight whose last close waits: a TCP socket with unsent data and a linger time. The listener here
    # has not been told to refuse descriptors, as before Linux 6.16.
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        lingering = [_lingering(server.getsockname()) for _ in range(6)]
        accepted = [server.accept()[0] for _ in lingering]
        for sock in lingering:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
                client.connect(serving.path)
                socket.send_fds(client, [b"x"], [sock.fileno()])
            sock.close()
        # Three sessions of root's end, and their connections are closed.
        serving.sessions.release.release(10_000)
        wait_until(lambda: serving.sessions.count(0) >= 3)
        began = time.monotonic()
        serving.call(61001, 1)
        wait_until(lambda: serving.sessions.count(61001) == 1)
        assert time.monotonic() - began < 10
        # Those of root's are stuck still: three threads, and three in line.
        assert serving.gateway._users[0].threads == 3
        for sock in accepted:
            sock.close()


def _lingering(address: tuple[str, int]) -> socket.socket:
    sock = socket.create_connection(address)
    sock.setblocking(False)
    try:
        while True:
            sock.send(b"x" * 65536)
    except BlockingIOError:
        pass
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 30))
    return sock


def test_the_kernel_refuses_descriptors_where_it_can(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        refuse_descriptors(listener)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(str(tmp_path / "s"))
            release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
            if release >= (6, 16):
                with pytest.raises(PermissionError):
                    socket.send_fds(client, [b"x"], [0])
            else:
                socket.send_fds(client, [b"x"], [0])
            client.sendall(Frame("run").pack())
            peer, _ = listener.accept()
            with peer:
                assert peer.recv(FRAME_MAX)
