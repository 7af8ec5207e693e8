"""Attacks on the engine: real processes of ordinary users against a real engine, containerd and enter."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcctr.request import LaunchRequest
from hpcctr.wire import ENGINE_SOCKET, FRAME_MAX, Frame
from tests.support import oci
from tests.support.node import Node, node
from tests.support.polling import wait_until
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]

IMAGE = "local/hostile:1"
#: What a user's own client would do, up to the point where it becomes enter: `sock` is granted, `argv` is enter's.
CLIENT = """
import os, socket, subprocess, sys, array
sys.path.insert(0, sys.argv[1])
from hpcctr.client import carry, connect, enter
from hpcctr.request import LaunchRequest
sock = connect.connect()
granted = connect.ask(sock, LaunchRequest(image=sys.argv[2]).frame())
os.set_inheritable(sock.fileno(), True)
program = granted.one("enter")
number = sock.fileno()
assert number >= 3
def argv(number):
    return enter.plan(number, [], b"/", [b"echo", b"inside"], b"/bin", kernel_trees=carry.KERNEL_TREES)
"""


@pytest.fixture(scope="module")
def hostile() -> oci.Image:
    """An image that claims what an attacker would have it claim."""
    members = [
        *oci.busybox_members(),
        oci.file("bin/suid", b"#!/bin/sh\nid -u\n", mode=0o4755),
        oci.file("etc/ld.so.preload", b"/evil.so\n"),
    ]
    config = {
        "User": "0:0",
        "Env": ["PATH=/bin", "LD_PRELOAD=/evil.so", "HPCCTR_SITE=/evil", "PYTHONPATH=/evil"],
        "WorkingDir": "/proc/self/fd/8",
        "Cmd": ["sh"],
        "Labels": {
            "containerd.io/restart.status": "running",
            "containerd.io/restart.loguri": "binary:///bin/sh?-c=id",
            "hpcctr.uid": "0",
            "hpcctr.key": "0" * 32,
        },
        "Volumes": {"/etc": {}},
        "StopSignal": "SIGKILL",
    }
    return oci.Image(layers=(oci.tar(*members),), config=config)


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory, hostile: oci.Image) -> Iterator[Node]:
    """A node whose store has the hostile image, with small limits."""
    from tests.support.scratch import scratch

    limits = "[limits]\nsessions = 64\nsessions-per-uid = 8\nwaiting-per-uid = 16\n"
    with scratch("attacked") as place, node(place, more=limits) as started:
        layout = oci.write_layout(place / "layout", hostile)
        started.hpcctr("pull", "--name", IMAGE, f"oci:{layout}")
        yield started


def _packages() -> str:
    import hpcctr

    return str(Path(hpcctr.__file__).parents[1])


def _attack(node: Node, user: User, code: str, *words: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    """Run CLIENT and then ``code`` as a user; anything may come of it."""
    argv = ["/usr/bin/python3", "-c", CLIENT + code, _packages(), IMAGE, *words]
    return node.host.run(argv, user=user, check=False, **options)  # type: ignore[arg-type]


def test_the_client_of_these_attacks_goes_in_when_it_behaves(attacked: Node, alice: User) -> None:
    done = _attack(attacked, alice, "os.execve(program, argv(number), {})")
    assert done.stdout == b"inside\n", done.stderr


def test_a_granted_socket_is_worth_nothing_to_another_process_of_the_same_user(attacked: Node, alice: User) -> None:
    done = _attack(
        attacked, alice, "sys.exit(subprocess.run(argv(number), executable=program, pass_fds=[number]).returncode)"
    )
    assert done.returncode == 126
    assert b"another process than the one that connected" in done.stderr
    assert b"inside" not in done.stdout


def test_a_granted_socket_is_worth_nothing_to_another_user(attacked: Node, alice: User, bob: User) -> None:
    code = """
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[3])
listener.listen()
os.chmod(sys.argv[3], 0o666)
peer, _ = listener.accept()
socket.send_fds(peer, [b"x"], [number])
peer.recv(1)
"""
    receive = """
import os, socket, sys
sys.path.insert(0, sys.argv[1])
from hpcctr.client import carry, enter
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[2])
_, (number,), _, _ = socket.recv_fds(s, 1, 1)
os.set_inheritable(number, True)
plan = enter.plan(number, [], b"/", [b"echo", b"inside"], b"/bin", kernel_trees=carry.KERNEL_TREES)
os.execve(sys.argv[3], plan, {})
"""
    meeting = attacked.host.root / "meeting"
    meeting.mkdir(exist_ok=True)
    meeting.chmod(0o777)
    place = meeting / "socket"
    giver = attacked.host.popen(
        ["/usr/bin/python3", "-c", CLIENT + code, _packages(), IMAGE, str(place)], user=alice, stderr=subprocess.DEVNULL
    )
    wait_until(lambda: place.exists() and place.stat().st_mode & 0o666 == 0o666)
    taker = attacked.host.run(
        ["/usr/bin/python3", "-c", receive, _packages(), str(place), str(attacked.site.enter)], user=bob, check=126
    )
    assert b"another process than the one that connected" in taker.stderr
    giver.wait(20)


def test_a_copy_of_enter_gets_no_namespace(attacked: Node, alice: User) -> None:
    # Even one made by root with the same bytes and capabilities: the engine knows one file.
    copy = attacked.host.root / "copied-enter"
    copy.write_bytes(attacked.site.enter.read_bytes())
    copy.chmod(0o711)
    os.setxattr(copy, "security.capability", os.getxattr(attacked.site.enter, "security.capability"))
    done = _attack(attacked, alice, "os.execve(sys.argv[3], argv(number), {})", str(copy))
    assert done.returncode == 126
    assert b"not the installed enter" in done.stderr


def test_a_program_that_asks_in_enters_place_gets_no_namespace(attacked: Node, alice: User) -> None:
    code = """
sock.send(b"E")
packet, descriptors, _, _ = socket.recv_fds(socket.socket(fileno=number), 5000, 4)
print(descriptors, packet)
"""
    done = _attack(attacked, alice, code)
    assert done.stdout.startswith(b"[] b'~"), done.stdout


def test_a_caller_that_becomes_traced_after_its_grant_gets_no_namespace(attacked: Node, alice: User) -> None:
    # strace -D: the tracer is a child, and this very process, which has the grant, becomes the traced enter.
    code = 'os.execvp("strace", ["strace", "-D", "-o", "/dev/null", "--", program, *argv(number)[1:]])'
    done = _attack(attacked, alice, code)
    assert b"inside" not in done.stdout
    assert done.returncode in (125, 126), done.stderr


def test_one_users_silent_connections_keep_nobody_else_out(attacked: Node, alice: User, bob: User) -> None:
    code = f"""
import socket, sys
held = []
for _ in range(40):
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    s.connect({ENGINE_SOCKET!r})
    held.append(s)
print("held", flush=True)
sys.stdin.read()
"""
    holder = attacked.host.popen(
        ["/usr/bin/python3", "-c", code], user=alice, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    refused = attacked.run(IMAGE, "echo", "hello", user=alice, check=125)
    assert b"error[engine-busy]" in refused.stderr
    assert attacked.run(IMAGE, "echo", "hello", user=bob, env={"LD_PRELOAD": ""}).stdout == b"hello\n"
    holder.communicate()


def test_garbage_and_passed_descriptors_leave_the_engine_as_it_was(attacked: Node, alice: User) -> None:
    engine = attacked.engine.process.pid
    attacked.run(IMAGE, "true", user=alice)

    def descriptors() -> int:
        return len(list(Path(f"/proc/{engine}/fd").iterdir()))

    wait_until(lambda: not attacked.containerd.containers())
    before = descriptors()
    code = f"""
import os, socket
for number in range(300):
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    s.connect({ENGINE_SOCKET!r})
    try:
        packet = os.urandom(number * 200 + 1) if number % 2 else {LaunchRequest(image="x").frame().pack()!r}
        socket.send_fds(s, [packet], [0, 1, 2] * (number % 3))
        if number % 5:
            s.recv(100000)
    except OSError:
        pass
    s.close()
"""
    attacked.host.run(["/usr/bin/python3", "-c", code], user=alice)
    wait_until(lambda: descriptors() <= before, what=lambda: f"{descriptors()} descriptors to become {before}")
    assert attacked.run(IMAGE, "echo", "hello", user=alice).stdout == b"hello\n"


def test_a_request_cannot_say_more_than_its_four_keys(attacked: Node, alice: User) -> None:
    for extra in ("uid", "user", "env", "hook", "mount", "annotation", "runtime", "stdout", "label"):
        packet = Frame("run", [("image", IMAGE.encode()), (extra, b"0")]).pack()
        code = f"""
import socket
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.connect({ENGINE_SOCKET!r})
s.send({packet!r})
print(s.recv({FRAME_MAX}))
"""
        assert b"slug=protocol" in attacked.host.run(["/usr/bin/python3", "-c", code], user=alice).stdout


def test_labels_user_and_directories_of_an_image_reach_neither_containerd_nor_the_launcher(
    attacked: Node, alice: User
) -> None:
    process = attacked.popen(
        "run",
        IMAGE,
        "--",
        "sh",
        "-c",
        "id -u; pwd; exec cat",
        user=alice,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == f"{alice.uid}\n".encode()
    assert process.stdout.readline() == f"{alice.home}\n".encode()
    (container,) = attacked.containerd.containers()
    facts = json.loads(attacked.containerd.ctr("containers", "info", container))
    assert set(facts["Labels"]) == {"hpcctr.key", "hpcctr.uid", "hpcctr.digest", "hpcctr.owner"}
    assert facts["Labels"]["hpcctr.uid"] == str(alice.uid)
    spec = facts["Spec"]
    assert spec["process"]["user"]["uid"] == alice.uid
    assert spec["process"].get("env", []) == []
    assert "hooks" not in spec
    assert "annotations" not in spec
    assert list(attacked.containerd.tasks().values()) == ["CREATED"]
    process.communicate()


def test_a_preload_of_the_image_meets_only_the_program_it_shapes(attacked: Node, alice: User) -> None:
    """LD_PRELOAD of an image is in the command's environment, as the image wants it, and nowhere before."""
    done = attacked.run(IMAGE, "env", user=alice)
    assert b"LD_PRELOAD=/evil.so" in done.stdout
    assert b"error" not in done.stderr
    assert "evil" not in attacked.engine.log()


def test_a_set_user_id_program_of_an_image_gives_nothing(attacked: Node, alice: User) -> None:
    done = attacked.run(IMAGE, "sh", "-c", "stat -c %a /bin/suid; suid", user=alice)
    assert done.stdout == f"755\n{alice.uid}\n".encode()


def test_the_engines_directory_is_not_seen_inside_and_not_carried_in(attacked: Node, alice: User) -> None:
    assert b"No such file" in attacked.run(IMAGE, "ls", "/run/hpcctr", user=alice, check=1).stderr
    for word in ("/run/hpcctr", "/run/hpcctr/engine.sock:/s", "/run/hpcctr/state:/s"):
        done = attacked.run(IMAGE, "ls", "/s", user=alice, flags=["-v", word], check=False)
        assert done.returncode != 0 or b"engine" not in done.stdout
    # The socket may be named by its owner's path; it is everybody's anyway. State is root's.
    assert (
        b"ermission denied"
        in attacked.run(IMAGE, "ls", "/s", user=alice, flags=["-v", "/run/hpcctr/state:/s"], check=False).stderr
    )


@pytest.mark.parametrize("place", ["proc", "sys", "dev", "etc"])
def test_an_image_whose_system_directories_are_links_builds_no_container(
    attacked: Node, alice: User, place: str, tmp_path: Path
) -> None:
    members = [member for member in oci.busybox_members() if member.name.strip(b"/").split(b"/")[0] != place.encode()]
    image = oci.Image(layers=(oci.tar(*members, oci.symlink(place, "/tmp")),), config={"Env": ["PATH=/bin"]})
    layout = oci.write_layout(tmp_path / "layout", image)
    attacked.hpcctr("pull", "--name", "local/links:1", f"oci:{layout}")
    done = attacked.run("local/links:1", "true", user=alice, check=126)
    assert b"error[mount-target]" in done.stderr and f"/{place}".encode() in done.stderr
    assert not Path("/tmp/passwd").exists()
    attacked.hpcctr("rm", "local/links:1")


def test_a_user_at_the_engines_socket_cannot_reach_another_users_container(
    attacked: Node, alice: User, bob: User
) -> None:
    mine = attacked.popen(
        "run", IMAGE, "--", "sh", "-c", "echo; exec cat", user=alice, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert mine.stdout is not None
    mine.stdout.readline()
    (container,) = attacked.containerd.containers()
    theirs = attacked.popen(
        "run", IMAGE, "--", "sh", "-c", "echo; exec cat", user=bob, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert theirs.stdout is not None
    theirs.stdout.readline()
    assert len(attacked.containerd.containers()) == 2
    # Nor through /proc, though both are ordinary processes on the same node.
    for name in ("root", "ns/mnt", "cwd"):
        done = attacked.host.run(["ls", f"/proc/{mine.pid}/{name}/"], user=bob, check=False)
        assert b"ermission denied" in done.stderr
    assert container
    mine.communicate()
    theirs.communicate()


def test_the_listening_socket_is_the_engines(attacked: Node, alice: User) -> None:
    for command in (["rm", "-f", ENGINE_SOCKET], ["mv", ENGINE_SOCKET, "/run/hpcctr/x"], ["touch", "/run/hpcctr/x"]):
        attacked.host.run(command, user=alice, check=1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.connect(str(attacked.host.path(ENGINE_SOCKET)))
