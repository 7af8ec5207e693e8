"""Attacks by way of ``exec``: whose view somebody gets, and what can be passed off as one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcctr.request import ExecRequest
from hpcctr.wire import ENGINE_SOCKET, FRAME_MAX, Frame
from tests.support.node import Node, node
from tests.support.polling import wait_until
from tests.support.scratch import scratch
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]

WAITING = ("sh", "-c", "echo $$; exec cat")


@pytest.fixture(scope="module")
def attacked(busybox_image: str) -> Iterator[Node]:
    """A node of its own: what these tests send its engine is nobody else's."""
    with scratch("joined") as place, node(place, linger_seconds=600) as started:
        started.pull(busybox_image)
        yield started


@contextlib.contextmanager
def _running(
    node: Node, user: User | None, image: str, *words: str, flags: tuple[str, ...] = ()
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A program in a container, and its pid."""
    process = node.popen(
        "run", *flags, image, "--", *(words or WAITING), user=user, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    yield process, int(process.stdout.readline())
    process.communicate()


def _refusal(node: Node, user: User, pid: int) -> str:
    done = node.hpcctr("exec", str(pid), "--", "echo", "inside", user=user, check=126)
    assert done.stdout == b""
    text = done.stderr.decode()
    assert text.startswith("hpcctr: error[not-your-program]: ")
    return text


NOT_THEIRS = "is not a living process of yours"


def test_another_users_program_cannot_be_joined_and_looks_like_none(
    attacked: Node, alice: User, bob: User, busybox_image: str
) -> None:
    with _running(attacked, alice, busybox_image) as (_, pid):
        theirs = _refusal(attacked, bob, pid)
        assert NOT_THEIRS in theirs
        # Nothing tells a process of somebody else's from a number nobody has: hidepid stays what it is.
        assert theirs.replace(str(pid), "N") == _refusal(attacked, bob, 4194304).replace("4194304", "N")
        assert attacked.hpcctr("exec", str(pid), "--", "echo", "mine", user=alice).stdout == b"mine\n"


def test_roots_program_cannot_be_joined_by_a_user(attacked: Node, alice: User, busybox_image: str) -> None:
    with _running(attacked, None, busybox_image) as (_, pid):
        assert NOT_THEIRS in _refusal(attacked, alice, pid)
        assert attacked.hpcctr("exec", str(pid), "--", "echo", "mine").stdout == b"mine\n"
    for pid in (1, attacked.engine.process.pid, attacked.containerd.process.pid):
        assert NOT_THEIRS in _refusal(attacked, alice, pid)


def test_a_users_program_is_not_roots(attacked: Node, alice: User, busybox_image: str) -> None:
    with _running(attacked, alice, busybox_image) as (_, pid):
        done = attacked.hpcctr("exec", str(pid), "--", "true", check=126)
        assert NOT_THEIRS.encode() in done.stderr


def test_a_process_in_no_container_cannot_be_joined(attacked: Node, alice: User) -> None:
    native = attacked.host.popen(["cat"], user=alice, stdin=subprocess.PIPE)
    wait_until(lambda: os.readlink(f"/proc/{native.pid}/exe").endswith("/cat"))
    assert "it is in no container of hpcctr" in _refusal(attacked, alice, native.pid)
    native.communicate()


def test_a_private_mount_namespace_of_roots_making_is_no_container(
    attacked: Node, alice: User, busybox_image: str
) -> None:
    # As Slurm, PAM and systemd make them for users: no_new_privs, no capability, and still not ours.
    argv = ["unshare", "--mount", *_as(alice), "--no-new-privs", "cat"]
    private = attacked.host.popen(argv, stdin=subprocess.PIPE)
    wait_until(lambda: os.readlink(f"/proc/{private.pid}/exe").endswith("/cat"))
    assert "it is in no container the engine of this node keeps" in _refusal(attacked, alice, private.pid)
    private.communicate()


def _as(user: User) -> list[str]:
    return ["setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", "--clear-groups", "--inh-caps=-all"]


def test_the_anchor_cannot_be_joined(attacked: Node, alice: User, busybox_image: str) -> None:
    with _running(attacked, alice, busybox_image):
        rows = attacked.containerd.ctr("tasks", "list").splitlines()[1:]
        anchors = [int(row.split()[1]) for row in rows]
        mine = [pid for pid in anchors if Path(f"/proc/{pid}").stat().st_uid == alice.uid]
        assert mine
        for pid in mine:
            _refusal(attacked, alice, pid)


def test_a_zombie_cannot_be_joined(attacked: Node, alice: User, busybox_image: str) -> None:
    script = "sleep 0 & echo $!; exec cat"
    with _running(attacked, alice, busybox_image, "sh", "-c", script) as (_, pid):
        # cat, which the shell has become, does not know that it has a child.
        wait_until(lambda: Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z")
        assert NOT_THEIRS in _refusal(attacked, alice, pid)


LEADER_ENDS = """
import ctypes, os, sys, threading, time
threading.Thread(target=lambda: (time.sleep(60), os._exit(0)), daemon=False).start()
print(os.getpid(), flush=True)
ctypes.CDLL(None).syscall(60, 0)
"""


def test_a_zombie_leader_with_a_living_thread_cannot_be_joined(attacked: Node, alice: User) -> None:
    process = attacked.host.popen(["/usr/bin/python3", "-c", LEADER_ENDS], user=alice, stdout=subprocess.PIPE)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    wait_until(lambda: "Z" in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0])
    assert NOT_THEIRS in _refusal(attacked, alice, pid)
    process.kill()
    process.wait(20)


def test_a_thread_is_not_a_process(attacked: Node, alice: User) -> None:
    code = (
        "import threading, time\n"
        "t = threading.Thread(target=lambda: time.sleep(60), daemon=True)\nt.start()\n"
        "print(t.native_id, flush=True)\ntime.sleep(60)"
    )
    process = attacked.host.popen(["/usr/bin/python3", "-c", code], user=alice, stdout=subprocess.PIPE)
    assert process.stdout is not None
    thread = int(process.stdout.readline())
    assert thread != process.pid
    assert NOT_THEIRS in _refusal(attacked, alice, thread)
    process.kill()
    process.wait(20)


#: What a user's own client would do, up to the point where it becomes enter.
CLIENT = """
import os, sys
sys.path.insert(0, sys.argv[1])
from hpcctr.client import connect, enter
from hpcctr.request import ExecRequest
sock = connect.connect()
granted = connect.ask(sock, ExecRequest(pid=int(sys.argv[2])).frame())
os.set_inheritable(sock.fileno(), True)
print("granted", flush=True)
sys.stdin.readline()
argv = enter.plan(sock.fileno(), [], b"/", [b"echo", b"inside"], b"/bin", kernel_trees=())
os.execv(granted.one("enter"), argv)
"""


@contextlib.contextmanager
def _granted(node: Node, user: User, pid: int) -> Iterator[subprocess.Popen[bytes]]:
    """A client of ``user``'s that has been granted to go to ``pid`` and goes when a line comes."""
    import hpcctr

    packages = str(Path(hpcctr.__file__).parents[1])
    process = node.host.popen(
        ["/usr/bin/python3", "-c", CLIENT, packages, str(pid)],
        user=user,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"granted\n", process.communicate()[1]
    yield process


def test_the_client_of_these_attacks_goes_in_when_it_behaves(attacked: Node, alice: User, busybox_image: str) -> None:
    with _running(attacked, alice, busybox_image) as (_, pid), _granted(attacked, alice, pid) as client:
        assert client.communicate(b"\n", timeout=20)[0] == b"inside\n"


def test_a_grant_ends_with_the_process_it_was_about(attacked: Node, alice: User, busybox_image: str) -> None:
    with _running(attacked, alice, busybox_image) as (process, pid), _granted(attacked, alice, pid) as client:
        process.communicate()
        out, err = client.communicate(b"\n", timeout=20)
    assert (out, client.returncode) == (b"", 126)
    assert NOT_THEIRS.encode() in err


def test_a_number_that_changes_hands_after_the_grant_leads_nowhere(
    attacked: Node, alice: User, busybox_image: str
) -> None:
    with _running(attacked, alice, busybox_image) as (process, pid), _granted(attacked, alice, pid) as client:
        process.communicate()
        # Even when its next owner is a program of the same user in the same container.
        taker = _program_with_number(attacked, pid, alice, busybox_image)
        out, err = client.communicate(b"\n", timeout=20)
        taker.communicate()
    assert (out, client.returncode) == (b"", 126)
    assert b"error[not-your-program]" in err


def _program_with_number(node: Node, pid: int, user: User, image: str) -> subprocess.Popen[bytes]:
    """A program in a container whose pid is ``pid``: the kernel gives the next process the number after ns_last_pid."""
    for _ in range(200):
        # The machine is shared: another process may be quicker.
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        process = node.popen("run", image, "--", *WAITING, user=user, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if process.pid == pid:
            assert process.stdout is not None
            assert int(process.stdout.readline()) == pid
            return process
        process.communicate()
    raise AssertionError(f"pid {pid} could not be had again")


IMITATION = r"""
set -e
mount -t tmpfs tmpfs "$1"
mkdir "$1/lower" "$1/run" "$1/new"
cp /bin/busybox "$1/lower/sh"
mount --bind "$1/run" /run
mkdir -p "$2" "${2%/upper}/work"
mount -t overlay -o "lowerdir=$1/lower,upperdir=$2,workdir=${2%/upper}/work" overlay "$1/new"
exec chroot "$1/new" /sh -c 'echo $$; read x'
"""


def test_a_mount_table_that_imitates_a_container_is_not_one(
    attacked: Node, alice: User, bob: User, busybox_image: str
) -> None:
    """A user namespace lets anybody make an overlay whose table names another's upper layer; the kernel knows whose
    namespace it is.
    """
    with _running(attacked, alice, busybox_image) as (_, pid):
        options = next(
            line.split(" - ")[1] for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines() if " / / " in line
        )
        upper = next(word for word in options.replace(" ", ",").split(",") if word.startswith("upperdir="))[9:]
        place = attacked.host.root / "imitation"
        place.mkdir(exist_ok=True)
        os.chown(place, bob.uid, bob.gid)
        fake = attacked.host.popen(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", IMITATION, "sh", str(place), upper],
            user=bob,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert fake.stdout is not None
        line = fake.stdout.readline()
        assert line, fake.communicate()[1]
        # It does imitate.
        assert f"upperdir={upper}" in Path(f"/proc/{fake.pid}/mountinfo").read_text()
        assert "user namespace of its own" in _refusal(attacked, bob, fake.pid)
        fake.communicate()


def test_a_program_that_makes_a_user_namespace_inside_cannot_be_joined_there(
    attacked: Node, alice: User, busybox_image: str
) -> None:
    script = 'echo $$; exec unshare -U -r sh -c "exec cat"'
    with _running(attacked, alice, busybox_image, "sh", "-c", script) as (_, pid):
        wait_until(lambda: os.readlink(f"/proc/{pid}/ns/user") != os.readlink("/proc/self/ns/user"))
        assert "user namespace of its own" in _refusal(attacked, alice, pid)


def test_a_program_that_is_not_dumpable_stays_closed_to_its_own_user(
    attacked: Node, alice: User, debian12_mpi_image: str
) -> None:
    """As for gdb: the kernel lets nobody but root look into it."""
    attacked.pull(debian12_mpi_image)
    program = alice.home / "busybox"
    program.write_bytes(Path("/bin/busybox").read_bytes())
    os.chown(program, 0, 0)
    program.chmod(0o711)
    try:
        with _running(attacked, alice, debian12_mpi_image, "sh", "-c", f"echo $$; exec {program} cat") as (_, pid):
            wait_until(lambda: os.readlink(f"/proc/{pid}/exe") == str(program))
            assert "it is not dumpable" in _refusal(attacked, alice, pid)
            native = attacked.host.run(["cat", f"/proc/{pid}/maps"], user=alice, check=False)
            assert b"ermission denied" in native.stderr
    finally:
        program.unlink()


def test_a_program_with_another_group_stays_closed_as_it_is_to_a_debugger(
    attacked: Node, alice: User, busybox_image: str
) -> None:
    other = next(gid for gid in alice.groups if gid != alice.gid)
    with _running(attacked, alice, busybox_image) as (_, pid):
        changed = User(name=alice.name, uid=alice.uid, gid=other, groups=alice.groups, home=alice.home)
        assert "its group ids are" in _refusal(attacked, changed, pid)
        native = attacked.host.run(["ls", f"/proc/{pid}/root/"], user=changed, check=False)
        assert b"ermission denied" in native.stderr


def test_no_new_right_comes_with_the_view(attacked: Node, alice: User, busybox_image: str, place: Path) -> None:
    """A directory behind one that only the program's user could pass stays what its own mode says."""
    (place / "closed").mkdir(mode=0o700)
    with _running(attacked, alice, busybox_image, flags=("-v", "/var:/there:ro")) as (_, pid):
        script = "grep -E '^(Cap|NoNew)' /proc/self/status; mount -t tmpfs x /srv; cat /proc/1/environ; ls /there/lib"
        done = attacked.hpcctr("exec", str(pid), "--", "sh", "-c", script, user=alice, check=False)
        lines = done.stdout.decode().splitlines()
        assert [line.split()[1] for line in lines[:6] if not line.startswith("CapBnd")] == ["0" * 16] * 4 + ["1"]
        assert done.stderr.count(b"ermission denied") >= 2
        touched = attacked.hpcctr("exec", str(pid), "--", "touch", "/there/tmp/x", user=alice, check=1)
        assert b"Read-only" in touched.stderr
        options = attacked.hpcctr("exec", str(pid), "--", "cat", "/proc/self/mountinfo", user=alice).stdout.decode()
        for line in options.splitlines():
            assert "nosuid" in line.split()[5].split(","), line
            assert "shared:" not in line, line


RAW = """
import os, sys
sys.path.insert(0, sys.argv[1])
from hpcctr.client import connect, enter
from hpcctr.request import LaunchRequest
sock = connect.connect()
granted = connect.ask(sock, LaunchRequest(image=sys.argv[2]).frame())
os.set_inheritable(sock.fileno(), True)
words = [b"sh", b"-c", b"cat /proc/self/mountinfo; touch /bin/x; mount -t tmpfs x /srv; echo $$"]
os.execv(granted.one("enter"), enter.plan(sock.fileno(), [], b"/", words, b"/bin", kernel_trees=()))
"""


def test_a_plan_without_mounts_changes_nothing_in_a_container_others_enter(
    attacked: Node, alice: User, busybox_image: str
) -> None:
    """What exec's plan looks like, sent for a new program: it is in the container's own namespace, or refused."""
    import hpcctr

    packages = str(Path(hpcctr.__file__).parents[1])
    with _running(attacked, alice, busybox_image) as (_, pid):
        before = Path(f"/proc/{pid}/mountinfo").read_text()
        argv = ["/usr/bin/python3", "-c", RAW, packages, busybox_image]
        done = attacked.host.run(argv, user=alice, check=False)
        if done.returncode == 0:
            (root,) = [line for line in done.stdout.decode().splitlines() if line.split()[4:5] == ["/"]]
            assert {"ro", "nosuid", "nodev"} <= set(root.split()[5].split(","))
            assert b"Read-only" in done.stderr
        else:
            assert b"error[view]: /: nosuid, nodev or read-only is not in force" in done.stderr
            assert done.stdout == b""
        assert Path(f"/proc/{pid}/mountinfo").read_text() == before
        assert attacked.run(busybox_image, "echo", "next", user=alice).stdout == b"next\n"


@pytest.mark.parametrize("pid", ["0", "-1", "01", "1 ", "+1", "4194305", "99999999999999999999", "self", "1/../2", ""])
def test_a_pid_is_a_plain_number(attacked: Node, alice: User, pid: str) -> None:
    packet = Frame(ExecRequest.VERB, [("pid", pid.encode())]).pack()
    assert b"slug=protocol" in _answer(attacked, alice, packet)


def test_the_request_cannot_say_more_than_its_two_keys(attacked: Node, alice: User) -> None:
    for extra in ("uid", "namespace", "mount", "target", "container", "digest", "env", "root"):
        packet = Frame(ExecRequest.VERB, [("pid", b"1"), (extra, b"0")]).pack()
        assert b"slug=protocol" in _answer(attacked, alice, packet)


def _answer(node: Node, user: User, packet: bytes) -> bytes:
    code = f"""
import socket
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.connect({ENGINE_SOCKET!r})
s.send({packet!r})
print(s.recv({FRAME_MAX}))
"""
    return node.host.run(["/usr/bin/python3", "-c", code], user=user).stdout


def test_a_name_that_is_claimed_does_not_change_the_image(attacked: Node, alice: User, busybox_image: str) -> None:
    """HPCCTR_IMAGE belongs to the program, which may write anything into it."""
    for claim in ("no/such:1", "..", "sha256:00", "\n"):
        with _running(
            attacked, alice, busybox_image, "env", f"HPCCTR_IMAGE={claim}", "sh", "-c", "echo $$; exec cat"
        ) as (_, pid):
            done = attacked.hpcctr("exec", str(pid), "--", "env", user=alice)
            assert b"IMAGE_VARIABLE=from-the-image" in done.stdout
            assert f"HPCCTR_IMAGE={claim}\n".encode() not in done.stdout


def test_engines_descriptors_stay_as_many_whatever_is_asked(attacked: Node, alice: User, busybox_image: str) -> None:
    engine = attacked.engine.process.pid

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{engine}/fd"))

    with _running(attacked, alice, busybox_image) as (_, pid):
        wait_until(lambda: attacked.hpcctr("exec", str(pid), "--", "true", user=alice).returncode == 0)
        before = descriptors()
        for other in (1, os.getpid(), 4194304):
            for _ in range(5):
                _refusal(attacked, alice, other)
        for _ in range(5):
            with _granted(attacked, alice, pid) as client:
                client.send_signal(signal.SIGKILL)
                client.communicate()
        wait_until(lambda: descriptors() <= before, what=lambda: f"{descriptors()} descriptors to become {before}")
