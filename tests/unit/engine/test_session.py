"""A session's protocol, up to the point where only the real enter gets further (tests/e2e, tests/attacks)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpcctr.context import Caller
from hpcctr.engine import session
from hpcctr.engine.overdue import Overdue
from hpcctr.engine.session import Door, serve
from hpcctr.launch import prepare
from hpcctr.policy.grant import Grant
from hpcctr.request import LaunchRequest, Target
from hpcctr.site import Site
from hpcctr.wire import FRAME_MAX, Frame
from tests.support.values import a_stored_image, publish_for_test

pytestmark = pytest.mark.root

NAME = "docker.io/library/debian:12"
Serving = Callable[[], socket.socket]


class NoContainers:
    """Stands where node containers are kept; a session that gets this far with a wrong caller has failed."""

    def __init__(self) -> None:
        self.asked: list[Grant] = []
        self.joined = 0
        self.closed = 0

    def get(self, grant: Grant, *, open_image: Callable[[], int]) -> SimpleNamespace:
        self.asked.append(grant)
        return SimpleNamespace(key=grant.key, namespace=-1, close=self.close)

    def join(self, container: SimpleNamespace, caller: Caller) -> None:
        self.joined += 1

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def site(tmp_path: Path) -> Site:
    tmp_path.chmod(0o755)
    enter = tmp_path / "enter"
    enter.write_text("")
    store = tmp_path / "store"
    publish_for_test(str(store), a_stored_image(name=NAME))
    return Site(store=str(store), enter=str(enter), carry=("/scratch",), policy_directory=str(tmp_path / "none"))


@pytest.fixture
def nodes() -> NoContainers:
    return NoContainers()


@pytest.fixture
def serving(site: Site, nodes: NoContainers) -> Iterator[Serving]:
    """serving(): a socket with a session on the other end; the caller is this very process."""
    threads: list[threading.Thread] = []
    sockets: list[socket.socket] = []
    pidfd = os.pidfd_open(os.getpid())
    caller = Caller(pid=os.getpid(), pidfd=pidfd, uid=os.getuid(), gid=os.getgid(), groups=())

    def start() -> socket.socket:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sockets.extend((ours, its))
        door = Door(site=site, nodes=nodes, errands=None, is_gateway=False)  # type: ignore[arg-type]
        threads.append(threading.Thread(target=serve, args=(door, its, caller)))
        threads[-1].start()
        return ours

    yield start
    for sock in sockets:
        sock.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    for sock in sockets:
        sock.close()
    os.close(pidfd)
    # Whatever became of the session, it has let go of the container.
    assert nodes.closed == len(nodes.asked)


def _answer(sock: socket.socket) -> Frame:
    sock.settimeout(20)
    return Frame.unpack(sock.recv(FRAME_MAX))


@pytest.mark.parametrize(
    "packet",
    [
        b"x",
        b"hpcctr/1 run\0",
        b"hpcctr/1 stop\0",
        b"hpcctr/9 run\0image=x\0",
        b"hpcctr/1 run\0image=x\0uid=0\0",
        b"\0" * 70000,
    ],
)
def test_what_is_no_request_is_answered_with_an_error(serving: Serving, nodes: NoContainers, packet: bytes) -> None:
    sock = serving()
    sock.sendall(packet)
    answer = _answer(sock)
    assert (answer.verb, answer.text("slug")) == ("error", "protocol")
    assert not nodes.asked


def test_a_request_with_descriptors_is_refused(serving: Serving, nodes: NoContainers) -> None:
    sock = serving()
    socket.send_fds(sock, [LaunchRequest(image=NAME).frame().pack()], [0, 1, 2])
    assert _answer(sock).text("slug") == "protocol"
    assert not nodes.asked


def test_an_image_that_is_not_there_is_named_with_the_remedy(serving: Serving) -> None:
    sock = serving()
    sock.sendall(LaunchRequest(image="no/such:1").frame().pack())
    answer = _answer(sock)
    assert answer.text("slug") == "image-not-in-store"
    assert "hpcctr pull" in answer.text("hint")


def test_explain_is_answered_without_a_container(serving: Serving, nodes: NoContainers) -> None:
    sock = serving()
    sock.sendall(LaunchRequest(image=NAME, explain=True).frame().pack())
    answer = _answer(sock)
    assert (answer.verb, answer.every("carry")) == ("granted", [b"/scratch"])
    assert not nodes.asked


def test_the_grant_has_the_requests_targets_and_the_sites(serving: Serving, nodes: NoContainers) -> None:
    sock = serving()
    sock.sendall(LaunchRequest(image=NAME, targets=[Target("d", b"/home/u")]).frame().pack())
    assert _answer(sock).verb == "granted"
    assert [target.path for target in nodes.asked[0].targets] == [b"/home/u", b"/scratch"]


def test_a_caller_is_told_when_the_engine_is_stuck_and_the_session_goes_no_further(
    site: Site, nodes: NoContainers, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "PREPARE_PATIENCE", 0.1)
    answers = threading.Event()

    def stuck(request: LaunchRequest, caller: Caller, site: Site) -> Grant:
        assert answers.wait(30)
        return prepare(request, caller, site)

    monkeypatch.setattr(session, "prepare", stuck)
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    caller = Caller(pid=os.getpid(), pidfd=os.pidfd_open(os.getpid()), uid=os.getuid(), gid=os.getgid(), groups=())
    door = Door(site=site, nodes=nodes, errands=None, is_gateway=False, overdue=Overdue())  # type: ignore[arg-type]
    thread = threading.Thread(target=serve, args=(door, its, caller))
    with ours, its:
        thread.start()
        ours.sendall(LaunchRequest(image=NAME).frame().pack())
        answer = _answer(ours)
        assert answer.text("slug") == "deadline"
        assert "looking the image up in the store" in answer.text("message")
        assert ours.recv(FRAME_MAX) == b""
        assert thread.is_alive()
        answers.set()
        thread.join(30)
        assert not thread.is_alive()
    os.close(caller.pidfd)
    assert "overdue slug=deadline" in capfd.readouterr().err
    assert nodes.closed == len(nodes.asked)
    assert nodes.joined == 0


def _refusal_of(sock: socket.socket, send: Callable[[socket.socket], object]) -> bytes:
    sock.sendall(LaunchRequest(image=NAME).frame().pack())
    assert _answer(sock).verb == "granted"
    send(sock)
    packet, descriptors, _, _ = socket.recv_fds(sock, 5000, 4)
    assert descriptors == []
    return packet


def test_a_process_that_is_not_enter_gets_no_namespace(serving: Serving, nodes: NoContainers) -> None:
    packet = _refusal_of(serving(), lambda sock: sock.sendall(b"E"))
    assert packet[0] == 126
    assert b"not the installed enter" in packet
    assert nodes.joined == 0


def test_another_process_than_the_one_that_connected_gets_no_namespace(serving: Serving, nodes: NoContainers) -> None:
    def send_from_a_child(sock: socket.socket) -> None:
        code = "import os, sys; os.write(int(sys.argv[1]), b'E')"
        subprocess.run([sys.executable, "-c", code, str(sock.fileno())], pass_fds=[sock.fileno()], check=True)

    packet = _refusal_of(serving(), send_from_a_child)
    assert packet[0] == 126
    assert b"another process" in packet
    assert nodes.joined == 0


@pytest.mark.parametrize("data", [b"e", b"EE", b"\0"])
def test_enter_asks_with_its_own_byte(serving: Serving, nodes: NoContainers, data: bytes) -> None:
    packet = _refusal_of(serving(), lambda sock: sock.sendall(data))
    assert packet[0] == 125
    assert nodes.joined == 0


def test_enter_sends_no_descriptors(serving: Serving, nodes: NoContainers) -> None:
    packet = _refusal_of(serving(), lambda sock: socket.send_fds(sock, [b"E"], [0]))
    assert packet[0] == 125
    assert nodes.joined == 0


def test_a_caller_that_leaves_leaves_nothing_waiting(serving: Serving, nodes: NoContainers) -> None:
    serving().shutdown(socket.SHUT_RDWR)
    sock = serving()
    sock.sendall(LaunchRequest(image=NAME).frame().pack())
    _answer(sock)
    sock.shutdown(socket.SHUT_RDWR)
    assert nodes.joined == 0
