"""What the engine writes down: one line for each decision, in words that nobody who asks can forge."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import pytest

from hpcctr.request import LaunchRequest
from hpcctr.wire import ENGINE_SOCKET, Frame
from tests.e2e.conftest import OWNER
from tests.support import oci
from tests.support.node import Node, node
from tests.support.polling import wait_until
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]

IMAGE = "local/plain:1"
FORBIDDEN = "local/forbidden:1"
_POLICY = """
[[rule]]
name = "not-this-one"
action = "deny"
images = ["docker.io/local/forbidden*"]

[[rule]]
name = "everything-else"
action = "allow"
"""
#: No name or word of a request breaks out of its quotes, or begins a line.
_FORGED = "local/x:1'\nhpcctr-engine: granted uid=0 gid=0 pid=1 rule='\r\x1b[2J"


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    from tests.support.scratch import scratch

    with scratch("audit") as place, node(place) as started:
        started.site.policy_directory.mkdir(mode=0o755)
        (started.site.policy_directory / "10.toml").write_text(_POLICY)
        layout = oci.write_layout(place / "layout", oci.Image(layers=(oci.tar(*oci.busybox_members()),), config={}))
        for name in (IMAGE, FORBIDDEN):
            started.hpcctr("pull", "--name", name, f"oci:{layout}")
        # A store with an account of its own: users have errands there.
        started.host.run(["chown", "-R", f"{OWNER}:{OWNER}", str(started.site.store)])
        yield started


class _Log:
    """What the engine writes from now on."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._begin = len(node.engine.log())

    def lines(self, pattern: str, *, count: int = 1) -> list[str]:
        def found() -> list[str]:
            return [line for line in self._node.engine.log()[self._begin :].splitlines() if re.search(pattern, line)]

        wait_until(lambda: len(found()) >= count, what=lambda: f"{pattern} in {self._node.engine.log()[self._begin :]}")
        return found()


def _send(node: Node, user: User, packet: bytes) -> None:
    code = f"""
import socket
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect({ENGINE_SOCKET!r})
sock.send({packet!r})
sock.recv(65536)
"""
    node.host.run(["/usr/bin/python3", "-c", code], user=user)


def test_a_launch_is_written_down_with_who_what_and_the_rule(attacked: Node, alice: User) -> None:
    log = _Log(attacked)
    process = attacked.popen(
        "run", IMAGE, "--", "sh", "-c", "echo $$; exec cat", user=alice, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    (line,) = log.lines("granted")
    assert f"uid={alice.uid} gid={alice.gid} pid={pid} auid=" in line
    assert f"image='docker.io/{IMAGE}' digest=sha256:" in line
    assert "rule='10.toml, rule \"everything-else\"'" in line
    attacked.hpcctr("exec", str(pid), "--", "true", user=alice)
    (line,) = log.lines("joined")
    assert f"uid={alice.uid}" in line and "rule=" in line
    process.communicate()


def test_a_denial_is_written_down_with_the_rule_that_denied(attacked: Node, alice: User) -> None:
    log = _Log(attacked)
    attacked.run(FORBIDDEN, "true", user=alice, check=126)
    (line,) = log.lines("refused")
    assert f"uid={alice.uid}" in line and "slug=policy-denied" in line and "not-this-one" in line
    assert not re.search("granted", attacked.engine.log()[-len(line) - 1 :])


def test_an_errand_and_a_question_are_written_down(attacked: Node, alice: User) -> None:
    log = _Log(attacked)
    attacked.run(IMAGE, "true", user=alice, flags=["--explain"])
    log.lines("explained")
    _send(attacked, alice, Frame("store", [("task", b"images")]).pack())
    (line,) = log.lines("errand")
    assert "task=images" in line


@pytest.mark.parametrize("key", ["image", "platform"])
def test_no_word_of_a_request_forges_a_line(attacked: Node, alice: User, key: str) -> None:
    log = _Log(attacked)
    fields = {"image": IMAGE.encode(), key: _FORGED.encode()}
    _send(attacked, alice, Frame(LaunchRequest.VERB, list(fields.items())).pack())
    _send(attacked, alice, Frame("exec", [("pid", b"1"), ("image", _FORGED.encode())]).pack())
    _send(attacked, alice, Frame("store", [("task", b"remove"), ("image", _FORGED.encode())]).pack())
    lines = log.lines("^hpcctr-engine: ", count=3)
    assert not [line for line in lines if "uid=0 " in line.partition("'")[0]]
    assert all(f"uid={alice.uid} " in line for line in lines)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", attacked.engine.log())


def test_every_refusal_before_a_request_is_understood_is_written_down(attacked: Node, alice: User) -> None:
    log = _Log(attacked)
    for packet in (b"garbage\n\nhpcctr-engine: granted", b"hpcctr/1 \nrun\0", b"hpcctr/7\n run\0"):
        _send(attacked, alice, packet)
    lines = log.lines("refused", count=3)
    assert all(f"uid={alice.uid} " in line and "slug=protocol" in line for line in lines)


def test_who_logged_in_is_told_whoever_they_are_by_now(attacked: Node, alice: User) -> None:
    # The kernel keeps the audit id through a change of user (audit_set_loginuid in kernel/auditsc.c): root sets it here
    # as pam_loginuid does, where this kernel audits at all.
    code = f"""
import os, sys
try:
    with open("/proc/self/loginuid", "w") as file:
        file.write("{alice.uid + 7}")
except OSError as error:
    print("no audit", error)
    sys.exit()
os.setgroups([]); os.setgid({alice.gid}); os.setuid({alice.uid})
os.chdir("/")
os.environ["HOME"] = {str(alice.home)!r}
os.execv(sys.argv[1], [sys.argv[1], "run", "{IMAGE}", "--", "cat", "/proc/self/loginuid"])
"""
    from tests.support.engine import HPCCTR

    log = _Log(attacked)
    done = attacked.host.run(["/usr/bin/python3", "-c", code, str(HPCCTR)], env=attacked.environment())
    if b"no audit" in done.stdout:
        assert b"auid=" not in done.stdout
        pytest.skip(f"this kernel does not let a login be set: {done.stdout!r}")
    assert done.stdout == f"{alice.uid + 7}".encode()
    (line,) = log.lines("granted")
    assert f"uid={alice.uid} " in line and f"auid={alice.uid + 7} " in line
