"""Attacks on what is somebody else's on the node: another user's programs and images, and the engine's own things."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.engine import HPCCTR
from tests.support.node import Node, node
from tests.support.polling import wait_until
from tests.support.processes import ENDED_LEADER, processes
from tests.support.scratch import scratch
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]


@pytest.fixture(scope="module")
def shared(busybox_image: str) -> Iterator[Node]:
    """A node two users are on."""
    with scratch("others") as place, node(place, linger_seconds=1, carry=("/work-of-all",)) as started:
        started.pull(busybox_image)
        yield started
        assert "Traceback" not in started.engine.log()


def _anchor(node: Node, user: User) -> int:
    """The init of the only container of a user's."""
    rows = [row.split() for row in node.containerd.ctr("tasks", "list").splitlines()[1:]]
    (found,) = [int(row[1]) for row in rows if Path(f"/proc/{row[1]}").stat().st_uid == user.uid]
    return found


def _shims(node: Node) -> list[int]:
    return [
        process.pid
        for process in processes()
        if process.name.startswith("containerd-shim") and str(node.containerd.socket) in process.command
    ]


def _denied(node: Node, user: User, *argv: str) -> None:
    done = node.host.run(argv, user=user, check=False)
    assert done.returncode != 0, (argv, done.stdout)
    assert b"ermission denied" in done.stderr or b"not permitted" in done.stderr, (argv, done.stderr)


# what others see


def test_ps_shows_nobody_elses_programs_images_or_words(
    shared: Node, alice: User, bob: User, busybox_image: str
) -> None:
    secret = "a-word-of-alices"
    with shared.held(busybox_image, "sh", "-c", "echo; exec cat", secret, user=alice) as process:
        mine = json.loads(shared.hpcctr("ps", "--format", "json", user=alice).stdout)
        assert [row["pid"] for row in mine] == [process.pid]
        for flags in ((), ("--all",)):
            done = shared.hpcctr("ps", *flags, "--format", "json", user=bob)
            assert json.loads(done.stdout) == []
            assert done.stderr == b""


def test_no_answer_to_a_user_depends_on_what_another_runs(
    shared: Node, alice: User, bob: User, busybox_image: str
) -> None:
    """The same requests, word by word, while another user is in a container of the same image and when nobody is."""

    def answers() -> list[tuple[int, bytes, bytes]]:
        found = []
        for arguments in (
            ("run", "--explain", busybox_image, "--", "true"),
            ("run", "no/such:1", "--", "true"),
            ("run", "--pull=never", "@" + alice.name + "/app:1", "--", "true"),
            ("inspect", "@" + alice.name + "/app:1"),
            ("exec", "4194304", "--", "true"),
            ("exec", "1", "--", "true"),
            ("ps", "--all"),
        ):
            done = shared.hpcctr(*arguments, user=bob, check=False)
            found.append((done.returncode, done.stdout, done.stderr))
        return found

    nobody = answers()
    with shared.held(busybox_image, user=alice):
        assert answers() == nobody


def test_a_views_mount_table_names_nothing_of_another_users(
    shared: Node, alice: User, bob: User, busybox_image: str
) -> None:
    """Neither containers of others nor the engine's directory, which the node's own table does name."""
    with shared.held(busybox_image, user=alice):
        (container,) = shared.containerd.containers()
        table = shared.run(busybox_image, "cat", "/proc/self/mountinfo", user=bob).stdout.decode()
        assert container not in table
        lines = [line for line in table.splitlines() if "/run/hpcctr" in line]
        # Its own root alone.
        assert [line.split()[4] for line in lines] == ["/"]


def test_hidden_processes_stay_hidden_inside_and_by_way_of_the_engine(
    alice: User, bob: User, busybox_image: str, place: Path
) -> None:
    """A node whose /proc shows a user nothing but what they may trace (hidepid=4 of proc(5))."""
    with node(place) as hidden:
        hidden.pull(busybox_image)
        hidden.host.run(["mount", "-t", "proc", "-o", "hidepid=4", "proc", "/proc"])
        hidden.engine.restart()
        with hidden.held(busybox_image, user=alice) as process:
            assert hidden.hpcctr("exec", str(process.pid), "--", "echo", "mine", user=alice).stdout == b"mine\n"
            (row,) = json.loads(hidden.hpcctr("ps", "--format", "json", user=alice).stdout)
            assert row["pid"] == process.pid
            for look in (
                hidden.run(busybox_image, "ls", "/proc", user=bob).stdout,
                hidden.host.run(["ls", "/proc"], user=bob).stdout,
            ):
                assert str(process.pid).encode() not in look.split()
                assert b"self" in look.split()
            # A number another user has is as good as none.
            texts = {
                hidden.hpcctr("exec", str(pid), "--", "true", user=bob, check=126).stderr.replace(
                    str(pid).encode(), b"N"
                )
                for pid in (process.pid, hidden.engine.process.pid, 4194304)
            }
            assert len(texts) == 1
            assert json.loads(hidden.hpcctr("ps", "--all", "--format", "json", user=bob).stdout) == []


def test_a_proc_without_anything_but_processes_is_enough_for_a_caller(
    shared: Node, alice: User, busybox_image: str
) -> None:
    """As ProcSubset=pid with ProtectProc= of systemd gives it to a service; the program sees that very /proc."""
    mount = "mount --make-rprivate /; mount -t proc -o hidepid=4,subset=pid proc /proc"
    groups = ",".join(map(str, alice.groups))
    account = f"setpriv --reuid={alice.uid} --regid={alice.gid} --groups={groups} --inh-caps=-all"
    look = "ls -A /proc | grep -vE ^[0-9]+$ | tr '\\n' ' '; cat /proc/1/comm"
    script = f'{mount}; exec {account} {HPCCTR} run {busybox_image} -- sh -c "{look}"'
    env = shared.environment({"HOME": str(alice.home)})
    done = shared.host.run(["unshare", "--mount", "sh", "-c", script], env=env, cwd="/", check=False)
    assert done.stdout.split() == [b"self", b"thread-self"], done
    assert b"/proc/1/comm" in done.stderr


# the anchor, the shim, and what the engine keeps


def test_the_owner_of_an_anchor_can_end_it_and_nothing_else(
    shared: Node, alice: User, bob: User, busybox_image: str
) -> None:
    with shared.held(busybox_image, user=alice) as process:
        anchor = _anchor(shared, alice)
        for user in (alice, bob):
            for name in ("root/", "cwd/", "ns/mnt", "fd/", "mem", "environ", "maps", "exe", "map_files/"):
                _denied(shared, user, "ls" if name.endswith("/") else "dd", *(
                    [f"/proc/{anchor}/{name}"]
                    if name.endswith("/")
                    else [f"if=/proc/{anchor}/{name}", "of=/dev/null", "count=1"]
                ))  # fmt: skip
            _denied(shared, user, "touch", f"/proc/{anchor}/root/tmp/x")
            _denied(shared, user, "strace", "-p", str(anchor), "-o", "/dev/null")
        _denied(shared, bob, "kill", "-0", str(anchor))
        shared.host.run(["kill", "-KILL", str(anchor)], user=alice)
        wait_until(lambda: list(shared.containerd.tasks().values()) == ["STOPPED"], what="the end of the anchor")
        # The engine goes on with what it holds, and so does who is inside.
        assert shared.run(busybox_image, "echo", "next", user=alice).stdout == b"next\n"
        assert shared.hpcctr("exec", str(process.pid), "--", "echo", "joined", user=alice).stdout == b"joined\n"
        assert shared.run(busybox_image, "echo", "other", user=bob).stdout == b"other\n"
    wait_until(lambda: not shared.containerd.containers(), what="the removal")


@pytest.mark.parametrize("what", ["anchor", "program"])
def test_what_a_user_stops_keeps_nobody_waiting(
    shared: Node, alice: User, bob: User, busybox_image: str, what: str
) -> None:
    with shared.held(busybox_image, user=alice) as process:
        stopped = _anchor(shared, alice) if what == "anchor" else process.pid
        shared.host.run(["kill", "-STOP", str(stopped)], user=alice)
        for user in (alice, bob):
            assert shared.run(busybox_image, "echo", "next", user=user, timeout=20).stdout == b"next\n"
        assert shared.hpcctr("exec", str(process.pid), "--", "echo", "in", user=alice, timeout=20).stdout == b"in\n"
        shared.engine.restart()
        for user in (alice, bob):
            assert shared.run(busybox_image, "echo", "next", user=user, timeout=20).stdout == b"next\n"
        if what == "anchor":
            assert Path(f"/proc/{stopped}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    # A stopped anchor is no obstacle to removing what it anchors.
    wait_until(lambda: not shared.containerd.containers(), what="the removal")


def test_a_frozen_program_keeps_nobody_waiting(shared: Node, alice: User, bob: User, busybox_image: str) -> None:
    """As a scheduler suspends a job: it neither runs nor ends, not even when it is killed."""
    freezer = Path("/sys/fs/cgroup/freezer")
    if not (freezer / "cgroup.procs").exists():
        freezer = next(Path(mount.target) for mount in shared.host.mounts() if mount.kind == "cgroup2")
    cgroup = freezer / f"hpcctr-test-frozen.{os.getpid()}"
    switch, on, off = (
        (cgroup / "freezer.state", "FROZEN", "THAWED")
        if freezer.name == "freezer"
        else (cgroup / "cgroup.freeze", "1", "0")
    )
    with shared.held(busybox_image, user=alice) as process:
        cgroup.mkdir()
        try:
            (cgroup / "cgroup.procs").write_text(str(process.pid))
            switch.write_text(on)
            for user in (alice, bob):
                assert shared.run(busybox_image, "echo", "next", user=user, timeout=20).stdout == b"next\n"
            done = shared.hpcctr("exec", str(process.pid), "--", "echo", "in", user=alice, timeout=20)
            assert done.stdout == b"in\n"
            shared.engine.restart()
            (row,) = json.loads(shared.hpcctr("ps", "--format", "json", user=alice, timeout=20).stdout)
            assert row["pid"] == process.pid
            # Still a member: its container stays, though all others have left it.
            assert shared.run(busybox_image, "echo", "next", user=alice, timeout=20).stdout == b"next\n"
        finally:
            switch.write_text(off)
            process.kill()
            process.wait(20)
            wait_until(lambda: _rmdir(cgroup), what="the cgroup to be empty")


def _rmdir(path: Path) -> bool:
    with contextlib.suppress(OSError):
        path.rmdir()
    return not path.exists()


def test_users_can_neither_signal_nor_trace_engine_shims_or_containerd(
    shared: Node, alice: User, busybox_image: str
) -> None:
    with shared.held(busybox_image, user=alice):
        shims = _shims(shared)
        assert shims
        for pid in (shared.engine.process.pid, shared.containerd.process.pid, *shims):
            _denied(shared, alice, "kill", "-0", str(pid))
            _denied(shared, alice, "strace", "-p", str(pid), "-o", "/dev/null")
            for name in ("root", "cwd", "fd", "ns"):
                _denied(shared, alice, "ls", f"/proc/{pid}/{name}/")


def test_no_socket_of_a_shim_or_of_containerd_answers_a_user(shared: Node, alice: User, busybox_image: str) -> None:
    """Programs share the node's network namespace, in which an abstract socket is open to whoever knows its name
    (CVE-2020-15257).
    """
    code = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)\n"
        "print(s.connect_ex(sys.argv[1].replace('@', chr(0), 1) if sys.argv[1][0] == '@' else sys.argv[1]))"
    )
    with shared.held(busybox_image, user=alice):
        inodes = set()
        for pid in (*_shims(shared), shared.containerd.process.pid):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes.add(os.readlink(link))
        listening = []
        for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
            fields = line.split()
            # __SO_ACCEPTCON: it listens.
            if len(fields) == 8 and int(fields[3], 16) & 0x10000 and f"socket:[{fields[6]}]" in inodes:
                listening.append(fields[7])
        # A shim's, and two of containerd's.
        assert len(listening) >= 3, listening
        for name in listening:
            done = shared.host.run(["/usr/bin/python3", "-c", code, name], user=alice)
            assert done.stdout == b"13\n", name  # EACCES
            if not name.startswith("@"):
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                    probe.connect(str(shared.host.path(name)))


def test_what_the_engine_and_containerd_keep_is_roots_to_read(shared: Node, alice: User, busybox_image: str) -> None:
    """Bundles hold the specification, state directories every layer; loop devices hold a private image as a whole."""
    with shared.held(busybox_image, user=alice):
        (container,) = shared.containerd.containers()
        task = "io.containerd.runtime.v2.task/hpcctr"
        places = [
            shared.containerd.directory / "state" / task / container,
            shared.containerd.directory / "root",
            shared.containerd.socket,
            Path("/run/hpcctr/state/containers", container),
            Path("/run/hpcctr/state/images"),
            Path("/run/containerd/runc/hpcctr", container),
            Path("/run/containerd/s"),
        ]
        for place in places:
            assert shared.host.path(place).exists(), place
            for flag in ("-r", "-w"):
                shared.host.run(["test", flag, str(place)], user=alice, check=1)
        loops = [entry.source for entry in shared.host.mounts() if entry.target.startswith("/run/hpcctr/state/images")]
        assert loops
        for loop in loops:
            for flag in ("-r", "-w"):
                shared.host.run(["test", flag, loop], user=alice, check=1)


# what a user can do to their own view


def test_what_a_user_takes_away_below_their_view_is_missing_there_alone(
    shared: Node, alice: User, bob: User, busybox_image: str, place: Path
) -> None:
    """A directory somebody mounts onto can be removed where its name is; the mount goes with it, in the view."""
    meeting = place / "meeting"
    meeting.mkdir()
    meeting.chmod(0o777)
    shared.host.run(["mkdir", str(meeting / "point"), str(meeting / "data")], user=alice)
    shared.host.run(["touch", str(meeting / "data/file")], user=alice)
    flags = ("-v", str(meeting), "-v", f"{meeting}/data:{meeting}/point")
    with shared.held(busybox_image, flags=flags, user=alice) as process:
        seen = shared.hpcctr("exec", str(process.pid), "--", "ls", f"{meeting}/point", user=alice)
        assert seen.stdout == b"file\n"
        shared.host.run(["rmdir", str(meeting / "point")], user=alice)
        gone = shared.hpcctr("exec", str(process.pid), "--", "ls", f"{meeting}/point", user=alice, check=False)
        assert gone.returncode != 0
        # What was mounted there is untouched, and so are the program and everybody else.
        assert (meeting / "data/file").exists() and process.poll() is None
        for user in (alice, bob):
            assert shared.run(busybox_image, "echo", "next", user=user).stdout == b"next\n"
    # Through the root of a program of one's own there is only what one may write anyway.
    with shared.held(busybox_image, user=alice) as process:
        for path in ("bin/sh", "etc/passwd", ".hpcctr-anchor", "etc/group"):
            done = shared.host.run(["rm", "-rf", f"/proc/{process.pid}/root/{path}"], user=alice, check=False)
            assert b"Read-only" in done.stderr, path
        _denied(shared, bob, "rm", "-rf", f"/proc/{process.pid}/root/bin")
        assert shared.run(busybox_image, "echo", "next", user=alice).stdout == b"next\n"


# members that are hard to see


def test_a_program_whose_first_thread_has_ended_keeps_its_container(
    shared: Node, alice: User, debian_tools_image: str
) -> None:
    """Also when the engine is another one by then: a zombie in the table of processes, and not ended."""
    shared.pull(debian_tools_image)
    words = ("python3", "-c", ENDED_LEADER)
    with shared.held(debian_tools_image, *words, user=alice) as process:
        wait_until(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
        before = shared.containerd.containers()
        assert len(before) == 1
        # A new engine removes what has no member at once.
        shared.engine.restart(kill=True)
        assert shared.run(debian_tools_image, "echo", "next", user=alice).stdout == b"next\n"
        assert shared.containerd.containers() == before
        assert process.poll() is None
    wait_until(lambda: not shared.containerd.containers(), what="the removal")


def test_a_mount_point_whose_name_breaks_lines_stops_nobody(
    shared: Node, alice: User, bob: User, busybox_image: str
) -> None:
    """Any user of FUSE names mounts of the node's own namespace, and the kernel escapes no carriage return."""
    source, point = alice.home / "source", alice.home / "a\r1"
    shared.host.run(["mkdir", str(source), str(point)], user=alice)
    shared.host.run(["bindfs", "--no-allow-other", str(source), str(point)], user=alice)
    try:
        for user in (alice, bob):
            assert shared.run(busybox_image, "echo", "next", user=user).stdout == b"next\n"
        shared.hpcctr("cleanup", "--job", "77", timeout=40)
        wait_until(lambda: not shared.containerd.containers(), what="the removal")
    finally:
        shared.host.run(["fusermount3", "-u", "-z", str(point)], user=alice)
    assert "Traceback" not in shared.engine.log()
