"""Attacks by places: targets, working directories and volumes that lead where they should not, the directory of the
engine, and what a program can do to the layer below its root."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcctr.engine.layers import HELD_MAX
from hpcctr.wire import ENGINE_SOCKET
from tests.support import oci
from tests.support.engine import HPCCTR
from tests.support.node import Node, node
from tests.support.polling import wait_until
from tests.support.scratch import scratch
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]

LIMIT = 3


@pytest.fixture(scope="module")
def attacked(busybox_image: str) -> Iterator[Node]:
    """A node on which a user may have few containers."""
    with scratch("paths") as place, node(place, more=f"[limits]\ncontainers-per-uid = {LIMIT}\n") as started:
        started.pull(busybox_image)
        yield started


@pytest.fixture(scope="module")
def image(attacked: Node, busybox_image: str) -> str:
    return busybox_image


@pytest.fixture(scope="module")
def tools(attacked: Node, debian_tools_image: str) -> str:
    """An image with Python."""
    attacked.pull(debian_tools_image)
    return debian_tools_image


@pytest.fixture
def desk(alice: User) -> Iterator[Path]:
    """A directory of alice's, in her home."""
    path = alice.home / "desk"
    path.mkdir()
    os.chown(path, alice.uid, alice.gid)
    yield path
    shutil.rmtree(path)


# the engine's directory


@pytest.mark.parametrize("place", ["/run/hpcctr", "/run/hpcctr/state"])
def test_a_working_directory_of_the_engines_is_not_carried_in(
    attacked: Node, image: str, alice: User, place: str
) -> None:
    # A process may keep a directory it could not enter any more; here it is root who leaves it there.
    become = f"setpriv --reuid={alice.uid} --regid={alice.gid} --clear-groups --inh-caps=-all"
    script = f'cd {place} && exec {become} "$@"'
    words = ["sh", "-c", script, "sh", str(HPCCTR), "run", image, "--", "ls", "-a", "."]
    env = attacked.environment({"HOME": str(alice.home), "USER": alice.name})
    done = attacked.host.run(words, env=env, check=False)
    assert done.returncode == 125 and done.stderr.startswith(b"hpcctr: error[cwd]: "), done
    assert done.stdout == b""


REQUEST = b"hpcctr/1 run\0image=x:1\0".hex()
ASK = (
    "import socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect(sys.argv[1]); "
    f"s.sendall(bytes.fromhex('{REQUEST}')); print(s.recv(65536))"
)
#: Inside, with the host's tree at /host.
INSIDE = f"""
import subprocess, sys
def tried(*words):
    done = subprocess.run(words, capture_output=True, text=True)
    print((done.stdout + done.stderr).strip().splitlines()[-1])
ask = ["-c", {ASK!r}]
for path in sys.argv[1:]:
    tried("python3", *ask, path)
tried("ls", "/host/run/hpcctr/state")
tried("cat", "/host/etc/shadow")
# With the host's tree for a root, which is the root directory of the engine's.
tried("unshare", "-Ur", "-R", "/host", "/usr/bin/python3", *ask, {ENGINE_SOCKET!r})
tried("unshare", "-Ur", "-R", "/host", "/bin/cat", "/etc/shadow")
"""


def test_with_the_whole_host_carried_in_the_engine_answers_nobody_inside(
    attacked: Node, tools: str, alice: User
) -> None:
    sockets = [ENGINE_SOCKET, f"/host{ENGINE_SOCKET}", "/host/run/hpcctr/state/control.sock"]
    flags = ["-v", "/:/host", "-v", "/run:/run"]
    done = attacked.run(tools, "python3", "-c", INSIDE, *sockets, user=alice, flags=flags, timeout=60)
    *answers, state, shadow, chrooted, chrooted_shadow = done.stdout.decode().splitlines()
    assert ["slug=caller-refused" in answer for answer in answers] == [True, True, False], answers
    for text in (answers[2], state, shadow, chrooted_shadow):
        assert "Permission denied" in text or "Errno 13" in text, text
    assert "slug=caller-refused" in chrooted, chrooted


def test_a_link_to_the_engines_directory_is_no_way_to_it(attacked: Node, image: str, alice: User, desk: Path) -> None:
    (desk / "link").symlink_to("/run/hpcctr")
    (desk / "state").symlink_to("/run/hpcctr/state")
    for volume in (f"{desk}/state:/s", f"{desk}/link/state/containers:/s", "/run/../run/hpcctr/state:/s"):
        done = attacked.run(image, "ls", "/s", user=alice, flags=["-v", volume], check=False)
        assert done.returncode and done.stdout == b"" and b"hpcctr: error[" in done.stderr, done
    for target in ("/run/hpcctr", "/run/hpcctr/x", "/run/./hpcctr", "/run//hpcctr", "/x/../run/hpcctr"):
        done = attacked.run(image, "ls", "/run", user=alice, flags=["-v", f"{desk}:{target}"], check=False)
        assert done.returncode and b"hpcctr: error[" in done.stderr, target


# targets


@pytest.mark.parametrize(
    "target",
    ["/proc/1", "/proc/self/root/etc", "/sys/kernel", "/dev/shm", "/dev/fd", "/", "//", "/.", "/..", "/proc/../etc"],
)
def test_a_volume_never_goes_onto_the_nodes_trees_or_the_root(
    attacked: Node, image: str, alice: User, desk: Path, target: str
) -> None:
    before = attacked.containerd.created()
    done = attacked.run(image, "true", user=alice, flags=["-v", f"{desk}:{target}"], check=False)
    assert done.returncode in (125, 126) and done.stderr.startswith(b"hpcctr: error["), done
    assert attacked.containerd.created() == before


def test_what_is_missing_below_a_callers_directory_is_made_by_nobody(
    attacked: Node, image: str, alice: User, desk: Path
) -> None:
    theirs = attacked.host.root / "theirs"
    theirs.mkdir(mode=0o777)
    theirs.chmod(0o1777)
    for parent in (desk, theirs, Path("/tmp")):
        flags = ["-v", f"{parent}:{parent}", "-v", f"/usr/share:{parent}/hpcctr-missing/deep"]
        done = attacked.run(image, "true", user=alice, flags=flags, check=False)
        assert done.returncode in (125, 126) and done.stderr.startswith(b"hpcctr: error["), done
        assert not (parent / "hpcctr-missing").exists()
        assert not attacked.host.path(parent / "hpcctr-missing").exists()


def test_a_link_in_a_callers_directory_leads_no_mount_out_of_it(
    attacked: Node, image: str, alice: User, desk: Path
) -> None:
    for number, goal in enumerate(("/", "/etc", "/proc/self/root", "../../../..", "/run/hpcctr", "/dev")):
        (desk / f"link{number}").symlink_to(goal)
        done = attacked.run(
            image, "true", user=alice, flags=["-v", f"/usr/share:{desk}/link{number}", "-v", str(desk)], check=False
        )
        assert done.returncode in (125, 126) and done.stderr.startswith(b"hpcctr: error["), done
        deeper = f"/usr/share:{desk}/link{number}/etc"
        done = attacked.run(image, "true", user=alice, flags=["-v", deeper, "-v", str(desk)], check=False)
        assert done.returncode in (125, 126) and done.stderr.startswith(b"hpcctr: error["), done


def test_launches_at_once_with_other_images_and_targets_each_see_their_own(
    attacked: Node, alice: User, bob: User, desk: Path
) -> None:
    """One name that changes its meaning meanwhile, and two users: what the view holds is what was granted."""
    for edition in ("one", "two"):
        layers = [oci.tar(oci.file("etc/edition", edition.encode()))]
        layout = oci.write_layout(attacked.host.root / edition, oci.busybox(layers=layers))
        attacked.hpcctr("pull", "--name", f"localhost/{edition}:1", f"oci:{layout}")
    problems: list[str] = []

    def launch(user: User, edition: str, target: str) -> None:
        for _ in range(3):
            script = f"cat /etc/edition; id -u; cat {target}/os-release >/dev/null && ls -d {target}"
            flags = ["-v", f"/usr/lib:{target}"]
            name = f"localhost/{edition}:1"
            done = attacked.run(name, "sh", "-c", script, user=user, flags=flags, check=False)
            if done.stdout != f"{edition}{user.uid}\n{target}\n".encode():
                problems.append(f"{edition} {user.name} {target}: {done}")

    jobs = [(user, edition, target) for user in (alice, bob) for edition in ("one", "two") for target in ("/a",)]
    threads = [threading.Thread(target=launch, args=job) for job in [*jobs, *jobs]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


# the layer below


WRITES = r"""
import ctypes, errno, os, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
def attempt(what, call):
    try:
        call()
    except OSError as error:
        print(what, errno.errorcode.get(error.errno, error.errno))
    except subprocess.CalledProcessError as error:
        print(what, "refused")
    else:
        print(what, "DONE")
def done(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
for path in ("/new", "/etc/new", "/proc/self/root/new", "/proc/self/root/etc/passwd", "/etc/passwd", "/.hpcctr-anchor"):
    attempt("open " + path, lambda: os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
root = os.open("/", os.O_RDONLY)
attempt("fchmod", lambda: os.fchmod(root, 0o777))
attempt("xattr", lambda: os.setxattr("/etc/passwd", "user.x", b"1"))
attempt("utime", lambda: os.utime("/etc/passwd"))
attempt("truncate", lambda: os.truncate("/etc/passwd", 0))
attempt("rename", lambda: os.rename("/etc/passwd", "/etc/x"))
attempt("unlink", lambda: os.unlink("/etc/passwd"))
attempt("rmdir", lambda: os.rmdir("/POINT"))
attempt("mknod", lambda: os.mknod("/fifo", 0o10666))
attempt("link", lambda: os.link("/etc/passwd", "/etc/y"))
attempt("remount", lambda: done(libc.mount(b"none", b"/", None, 0x20 | 0x1000, None)))
attempt("umount", lambda: done(libc.umount2(b"/POINT", 2)))
handle = ctypes.create_string_buffer(136)
ctypes.c_uint.from_buffer(handle).value = 128
mount_id = ctypes.c_int()
attempt("handle", lambda: done(libc.open_by_handle_at(root, handle, os.O_RDWR)))
script = "mount -o remount,rw,bind / 2>/dev/null && touch /new || mount -o remount,rw / 2>/dev/null && touch /new"
attempt("userns remount", lambda: subprocess.run(["unshare", "-Urm", "sh", "-c", script], check=True))
attempt("userns umount", lambda: subprocess.run(
    ["unshare", "-Urm", "sh", "-c", "umount -l /POINT 2>/dev/null"], check=True))
overlay = "mount -t overlay x -o lowerdir=/,upperdir=/tmp,workdir=/tmp /mnt && touch /mnt/../new"
attempt("userns overlay", lambda: subprocess.run(["unshare", "-Urm", "sh", "-c", overlay], check=True, stderr=-3))
for pid in sys.argv[1:]:
    attempt("another's root", lambda: os.open(f"/proc/{pid}/root/new", os.O_WRONLY | os.O_CREAT))
"""


def test_no_program_writes_to_the_layer_below_its_root_by_any_door(
    attacked: Node, tools: str, alice: User, desk: Path
) -> None:
    attacked.run(tools, "true", user=alice, flags=["-v", f"{desk}:/POINT"])
    with attacked.held(tools, user=alice, flags=["-v", f"{desk}:/POINT"]) as held:
        line = next(one for one in Path(f"/proc/{held.pid}/mountinfo").read_text().splitlines() if "upperdir=" in one)
        upper = attacked.host.path(line.partition("upperdir=")[2].partition(",")[0])
        rows = [row.split() for row in attacked.containerd.ctr("tasks", "list").splitlines()]
        (anchor,) = [row[1] for row in rows if row[0] == upper.parent.name]

        def state() -> list[tuple[str, int, int, bytes]]:
            paths = sorted([upper, *upper.rglob("*")])
            return [
                (
                    str(path),
                    path.lstat().st_mode,
                    path.lstat().st_mtime_ns,
                    path.read_bytes() if path.is_file() else b"",
                )
                for path in paths
            ]

        before = state()
        done = attacked.run(
            tools,
            "python3",
            "-c",
            WRITES,
            anchor,
            str(held.pid),
            user=alice,
            flags=["-v", f"{desk}:/POINT"],
            timeout=60,
        )
        assert b"DONE" not in done.stdout, done.stdout.decode()
        assert done.stdout.count(b"\n") == 23, done.stdout.decode()
        assert state() == before
        # Nor from outside, through the program's own root.
        for path in (f"/proc/{held.pid}/root/new", f"/proc/{held.pid}/root/etc/passwd", f"/proc/{anchor}/root/new"):
            attacked.host.run(["sh", "-c", f"echo x >> {path}"], user=alice, check=2)
        attacked.host.run(["rmdir", f"/proc/{held.pid}/root/POINT"], user=alice, check=1)
        assert state() == before


# memory


def _deep(number: int) -> list[str]:
    """Volumes whose mount points take most of a layer's inodes."""
    below = "/d" * 15
    return [word for at in range(100) for word in ("-v", f"/usr/share/doc:/{number:03}{at:03}{below}")]


#: A program in the background whose view is its own, so that it is in no container any more, and one that is in it.
IN_A_VIEW_OF_ITS_OWN = (
    "unshare -Urm sleep 1000 </dev/null >/dev/null 2>&1 & while ! grep -q sleep /proc/$!/comm; do true; done"
)
IN_ITS_CONTAINER = "sleep 1000 </dev/null >/dev/null 2>&1 & true"


def _fill(node: Node, image: str, user: User, script: str, *, count: int) -> tuple[int, bytes]:
    """Launch with other targets each time: how many were granted, and the text of the first refusal."""
    for number in range(count):
        done = node.run(image, "sh", "-c", script, user=user, flags=_deep(number), check=False, timeout=60)
        if done.returncode:
            return number, done.stderr
    return count, b""


def _end_sleepers(node: Node, image: str, user: User) -> None:
    node.host.run(["pkill", "-KILL", "-x", "-U", str(user.uid), "sleep"], check=False)
    wait_until(lambda: node.run(image, "true", user=user, flags=_deep(999), check=False).returncode == 0)


def test_a_user_can_make_the_engine_keep_only_so_many_layers(
    attacked: Node, image: str, alice: User, bob: User
) -> None:
    """What is held after its container has gone no table of the engine's shows. Each layer is full of mount points."""
    try:
        granted, refused = _fill(attacked, image, alice, IN_A_VIEW_OF_ITS_OWN, count=LIMIT + HELD_MAX + 3)
        assert b"hpcctr: error[engine-busy]" in refused and b"have been removed" in refused, refused
        assert HELD_MAX <= granted <= HELD_MAX + LIMIT + 1
        # Nobody else is any the worse.
        held = attacked.popen(
            "run", image, "--", "sh", "-c", "id -u; exec cat", user=bob, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert held.stdout is not None and held.stdout.readline() == b"%d\n" % bob.uid
        # And each is small, which the next test but one tries out.
        layers = [mount for mount in attacked.host.mounts() if mount.target.startswith("/run/hpcctr/state/containers/")]
        assert 0 < len(layers) <= LIMIT + 1
        for layer in layers:
            status = os.statvfs(attacked.host.path(layer.target))
            assert (layer.kind, status.f_files, status.f_blocks * status.f_frsize) == ("tmpfs", 2048, 8 << 20)
        held.communicate()
    finally:
        _end_sleepers(attacked, image, alice)


def test_programs_in_the_background_keep_the_containers_they_are_in(attacked: Node, image: str, alice: User) -> None:
    try:
        granted, refused = _fill(attacked, image, alice, IN_ITS_CONTAINER, count=LIMIT + 2)
        assert b"hpcctr: error[engine-busy]" in refused and b"in use" in refused, refused
        assert granted <= LIMIT
    finally:
        _end_sleepers(attacked, image, alice)


def test_more_mount_points_than_a_layer_has_room_for_are_refused_by_name(
    attacked: Node, image: str, alice: User
) -> None:
    below = "/d" * 62
    flags = [word for at in range(110) for word in ("-v", f"/usr/share/doc:/{at:03}{below}")]
    done = attacked.run(image, "true", user=alice, flags=flags, check=126)
    assert b"hpcctr: error[mount-target]" in done.stderr and b"more directories" in done.stderr
