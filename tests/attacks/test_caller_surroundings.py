"""Attacks with what is around a caller: namespaces, roots, capabilities, numbers, names, and tables of any length."""

from __future__ import annotations

import os
import subprocess
import textwrap
from pathlib import Path

import pytest

from tests.support.engine import HPCCTR
from tests.support.hostile_caller import (
    REFUSED,
    all_of,
    answers,
    attack,
)
from tests.support.node import Node
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]


# namespaces and roots


def _as(user: User) -> list[str]:
    groups = ",".join(map(str, user.groups))
    return ["setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", f"--groups={groups}", "--inh-caps=-all"]


@pytest.mark.parametrize("when", ["before it connects", "before it asks", "before it goes in"])
def test_a_caller_in_a_user_namespace_of_its_own_is_refused(
    asked: Node, alice: User, requests: dict[str, bytes], when: str
) -> None:
    code = """
    def leave(now):
        if words[0] == now:
            done(libc.unshare(CLONE_NEWUSER))
    leave("before it connects")
    s = dial()
    leave("before it asks")
    say(ask(s))
    leave("before it goes in")
    go_in(s)
    """
    for verb, packet in requests.items():
        said = attack(asked, alice, code, packet, when)
        assert "inside" not in said
        if when != "before it goes in":
            assert said.startswith(REFUSED), verb


def test_a_caller_in_a_pid_namespace_of_its_own_is_refused(
    asked: Node, alice: User, requests: dict[str, bytes]
) -> None:
    prefix = ("unshare", "--pid", "--fork", "--mount-proc", *_as(alice))
    code = "say(ask(dial()))"
    assert answers(asked, alice, code, requests, as_root=True, prefix=prefix) == all_of(requests, REFUSED)


def test_a_program_stays_in_the_namespaces_of_its_caller(asked: Node, alice: User, busybox_image: str) -> None:
    """Network, IPC, UTS, cgroup and time are the job's own; so they are for what is joined later."""
    kinds = ("net", "ipc", "uts", "cgroup", "time", "user", "pid")
    look = f"for kind in {' '.join(kinds)}; do readlink /proc/self/ns/$kind; done"
    script = f"{look}; {HPCCTR} run {busybox_image} -- sh -c '{look}; hostname'"
    argv = ["unshare", "--net", "--ipc", "--uts", "--cgroup", "--time", "sh", "-c"]
    inner = " ".join(_as(alice)) + ' sh -c "$1"'
    done = asked.host.run(
        [*argv, f"hostname jobs-own; {inner}", "sh", script], env=asked.environment({"HOME": str(alice.home)}), cwd="/"
    )
    lines = done.stdout.decode().splitlines()
    assert lines[: len(kinds)] == lines[len(kinds) : -1]
    assert lines[-1] == "jobs-own"
    # And they are others than the node's, but for the two that have to be.
    nodes = asked.host.run(["sh", "-c", look]).stdout.decode().splitlines()
    assert [ours == its for ours, its in zip(lines, nodes, strict=False)] == [False] * 5 + [True] * 2


ROOTS = {
    "a mount of the node's root": "mkdir -p $1; mount --rbind / $1; exec chroot $1",
    "a tmpfs after pivot_root": (
        "mkdir -p $1; mount -t tmpfs tmpfs $1; cd $1; mkdir -p usr etc proc run var opt root old; "
        "for d in bin sbin lib lib64; do [ -L /$d ] && cp -a /$d .; done; "
        "for d in usr etc proc run var opt root; do mount --rbind /$d $d; done; "
        "pivot_root . old; umount -l old; exec"
    ),
}


@pytest.mark.parametrize("root", list(ROOTS))
def test_what_root_a_caller_has_is_told_by_the_kernel(
    asked: Node, alice: User, requests: dict[str, bytes], root: str
) -> None:
    place = asked.host.root / "new-root"
    script = f'mount --make-rprivate /; {ROOTS[root].replace("$1", str(place))} "$@"'
    prefix = ("unshare", "--mount", "sh", "-ec", script, "sh", *_as(alice))
    code = "s = dial(); say(ask(s)); go_in(s)"
    said = attack(asked, alice, code, requests["run"], as_root=True, prefix=prefix)
    if "pivot_root" in root:
        assert said.startswith(REFUSED)
    else:
        # Its content is root's making, as every mount of a caller's in the node's own user namespace.
        assert said.startswith("granted\n"), said
    place.rmdir()


def test_what_is_mounted_over_proc_for_a_caller_is_not_what_the_engine_reads(
    asked: Node, alice: User, requests: dict[str, bytes]
) -> None:
    """A process that may not be served, in mounts where /proc says the opposite."""
    script = """
    mount --make-rprivate /
    mount -t tmpfs tmpfs /proc
    mkdir -p /proc/self/ns /proc/$$/ns
    for place in /proc/self /proc/$$; do
        printf 'State:\\tR (running)\\nUid:\\t%s\\nGid:\\t%s\\nCapEff:\\t0\\nTracerPid:\\t0\\nNoNewPrivs:\\t0\\n' \
            "$1 $1 $1 $1" "$2 $2 $2 $2" > $place/status
        ln -s / $place/root
    done
    shift 2
    exec "$@"
    """
    prefix = ("unshare", "--mount", "sh", "-ec", script, "sh", str(alice.uid), str(alice.gid), *_as(alice))
    for more, slug in ((("--no-new-privs",), "no-new-privs"), (("--ambient-caps=+net_raw",), "caller-refused")):
        argv = (*prefix[:-1], "--inh-caps=+net_raw" if "ambient" in more[0] else prefix[-1], *more)
        said = attack(asked, alice, "say(ask(dial()))", requests["run"], as_root=True, prefix=argv)
        assert said == f"refused {slug}\n"


def test_another_file_at_the_path_of_enter_is_not_enter(asked: Node, alice: User, requests: dict[str, bytes]) -> None:
    """In a mount namespace where somebody has covered it, even with all its bytes and capabilities."""
    copy = asked.host.root / "enter-for-one-namespace"
    copy.write_bytes(asked.site.enter.read_bytes())
    copy.chmod(0o711)
    os.setxattr(copy, "security.capability", os.getxattr(asked.site.enter, "security.capability"))
    script = f'mount --make-rprivate /; mount --bind {copy} {asked.site.enter}; exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-ec", script, "sh", *_as(alice))
    code = """
    s = dial()
    say(ask(s))
    os.dup2(1, 2)
    go_in(s)
    """
    said = attack(asked, alice, code, requests["run"], as_root=True, prefix=prefix)
    assert "is not the installed enter" in said and "inside" not in said


def test_a_program_in_a_container_that_finds_the_engines_socket_is_refused(
    asked: Node, alice: User, busybox_image: str, debian_tools_image: str, requests: dict[str, bytes]
) -> None:
    """Through the root directory of a process of its user's outside, which the kernel lets it look into."""
    asked.pull(debian_tools_image)
    outside = asked.host.popen(["cat"], user=alice, stdin=subprocess.PIPE)
    code = (
        "import os, socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET);"
        "os.chdir(f'/proc/{sys.argv[1]}/root/run/hpcctr'); s.connect('engine.sock');"
        "s.send(bytes.fromhex(sys.argv[2])); print(s.recv(65536))"
    )
    for packet in requests.values():
        done = asked.run(
            debian_tools_image, "python3", "-c", code, str(outside.pid), packet.hex(), user=alice, check=False
        )
        assert b"another root directory" in done.stdout or b"ermission denied" in done.stderr, done
    outside.communicate()


# capabilities, no_new_privs, dumpable


def test_capabilities_a_caller_holds_back_reach_neither_enter_nor_the_program(
    asked: Node, alice: User, requests: dict[str, bytes]
) -> None:
    code = """
    prctl(8, 1)
    become()
    # CAP_SYS_TIME and others: permitted, not effective.
    capset(0, (1 << 25) | (1 << 21) | (1 << 10))
    s = dial()
    say(ask(s))
    go_in(s, b"grep", b"-E", b"^Cap(Inh|Prm|Eff|Amb)", b"/proc/self/status")
    """
    said = attack(asked, alice, code, requests["run"], as_root=True).splitlines()
    assert said[0] == "granted"
    assert [int(line.split()[1], 16) for line in said[1:]] == [0] * 4


@pytest.mark.parametrize("when", ["before it asks", "before it goes in"])
def test_no_new_privs_is_noticed_whenever_it_comes(
    asked: Node, alice: User, requests: dict[str, bytes], when: str
) -> None:
    code = """
    s = dial()
    if words[0] == "before it asks":
        prctl(38, 1)
    said = ask(s)
    prctl(38, 1)
    say(said)
    os.dup2(1, 2)
    go_in(s)
    """
    for verb in ("run", "exec"):
        said = attack(asked, alice, code, requests[verb], when)
        assert "inside" not in said
        assert said.startswith("refused no-new-privs\n" if when == "before it asks" else "granted\n")


def test_a_caller_that_is_not_dumpable_is_served_as_any_other(
    asked: Node, alice: User, requests: dict[str, bytes]
) -> None:
    code = "prctl(4, 0); s = dial(); say(ask(s)); go_in(s)"
    assert attack(asked, alice, code, requests["run"]) == "granted\ninside\n"


# numbers at the ends of their ranges


@pytest.mark.parametrize("uid", [1, 65534, 2**31 - 1])
def test_every_uid_the_kernel_takes_for_one_is_that_uid_inside(
    asked: Node, alice: User, requests: dict[str, bytes], uid: int
) -> None:
    """Also nobody's, and one no name service knows."""
    code = """
    become(int(words[0]), int(words[1]), [int(words[1])])
    s = dial()
    say(ask(s))
    go_in(s, b"id")
    """
    for gid in (uid, 2**32 - 2) if uid == 65534 else (uid,):
        said = attack(asked, alice, code, requests["run"], str(uid), str(gid), as_root=True)
        assert said.startswith("granted\n"), said
        numbers = {part.split("(")[0] for part in said.splitlines()[1].split()}
        assert {f"uid={uid}", f"gid={gid}"} <= numbers


@pytest.mark.parametrize("uid", [0, 2**31, 2**31 + 1, 2**32 - 2])
def test_root_and_uids_that_others_take_for_negative_are_refused(
    asked: Node, alice: User, requests: dict[str, bytes], uid: int
) -> None:
    code = f"become({uid}, GID); say(ask(dial()))"
    assert answers(asked, alice, code, requests, as_root=True) == all_of(requests, REFUSED)


@pytest.mark.parametrize("count", [300, 65536])
def test_a_caller_keeps_every_one_of_its_groups(
    asked: Node, alice: User, requests: dict[str, bytes], count: int
) -> None:
    """65536 are the most a process can have (NGROUPS_MAX)."""
    code = """
    become(UID, GID, range(100000, 100000 + int(words[0])))
    s = dial()
    say(ask(s))
    go_in(s, b"id", b"-G")
    """
    said = attack(asked, alice, code, requests["run"], str(count), as_root=True).splitlines()
    assert said[0] == "granted", said
    assert set(map(int, said[1].split())) == {alice.gid, *range(100000, 100000 + count)}


# what the engine reads of a caller


@pytest.mark.parametrize(
    "name", [b"\rUid:\t0\t0\t0\t0", b"\rState:\tZ", b") Z 1 1 (", b"\nTracerPid:\t1", b"\x1b[2J\x07", b"\xff\xfe", b""]
)
def test_no_name_of_a_process_disguises_it(asked: Node, alice: User, requests: dict[str, bytes], name: bytes) -> None:
    code = f"""
    libc.prctl(15, {name!r}, 0, 0, 0)
    s = dial()
    say(ask(s))
    go_in(s)
    """
    assert attack(asked, alice, code, requests["run"]) == "granted\ninside\n"
    # Nor what may not be served.
    assert attack(asked, alice, "prctl(38, 1)" + textwrap.dedent(code), requests["run"]).startswith(
        "refused no-new-privs\n"
    )


def test_a_mount_table_of_any_length_costs_the_engine_nothing(
    asked: Node, alice: User, busybox_image: str, debian_tools_image: str
) -> None:
    """In namespaces of their own a user's programs have as many mounts as they like, with names of any length."""
    asked.pull(debian_tools_image)
    code = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def done(result):
    assert result == 0, os.strerror(ctypes.get_errno())
uid, gid = os.getuid(), os.getgid()
done(libc.unshare(0x10000000 | 0x20000))
for name, text in (("uid_map", f"0 {uid} 1"), ("setgroups", "deny"), ("gid_map", f"0 {gid} 1")):
    with open(f"/proc/self/{name}", "w") as file:
        file.write(text)
flags = ctypes.c_ulong(0)
done(libc.mount(b"x", b"/tmp", b"tmpfs", flags, None))
os.chdir("/tmp")
name = b"n" * 200
for _ in range(10):
    os.mkdir(name)
    os.chdir(name)
for number in range(10000):
    done(libc.mount(b"upperdir=x", b".", b"tmpfs", flags, None))
print(flush=True)
sys.stdin.read()
"""
    process = asked.popen(
        "run", debian_tools_image, "--", "python3", "-c", code, user=alice, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"\n", process.communicate()
    with Path(f"/proc/{process.pid}/mountinfo").open("rb") as table:
        assert sum(map(len, table)) > 20_000_000
    status = Path(f"/proc/{asked.engine.process.pid}/status")

    def peak() -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))

    before = peak()
    for _ in range(3):
        done = asked.hpcctr("exec", str(process.pid), "--", "true", user=alice, check=126, timeout=20)
        assert b"user namespace of its own" in done.stderr
    # Cleaning up looks for members in /proc.
    asked.hpcctr("cleanup", timeout=60)
    assert peak() - before < 20_000
    asked.engine.restart()
    assert asked.run(busybox_image, "echo", "next", user=alice).stdout == b"next\n"
    process.communicate()


def test_a_process_that_changes_all_it_can_while_it_is_looked_at_confuses_nobody(
    asked: Node, alice: User, requests: dict[str, bytes]
) -> None:
    """Names, threads, user namespaces, ends and beginnings, while an engine is asked about them all the time."""
    code = """
    import random
    late = time.monotonic() + 6
    targets = []
    def restless(seed):
        random.seed(seed)
        names = [b"\\rUid:\\t0\\t0\\t0\\t0", b") R 1 (", b"\\n"]
        while time.monotonic() < late:
            libc.prctl(15, random.choice(names), 0, 0, 0)
            libc.prctl(4, random.randrange(2), 0, 0, 0)
            pid = os.fork()
            if pid == 0:
                libc.unshare(random.choice((CLONE_NEWUSER, CLONE_NEWUSER | 0x20000, 0x400)))
                threading.Thread(target=time.sleep, args=(random.random() / 50,)).start()
                libc.pthread_exit(None)
            os.waitpid(pid, 0)
    for seed in range(2):
        pid = os.fork()
        if pid == 0:
            restless(seed)
            os._exit(0)
        targets.append(pid)
    answers = set()
    rounds = 0
    while time.monotonic() < late:
        rounds += 1
        pid = random.choice((*targets, targets[-1] + random.randrange(1, 50)))
        # The child asks, and is another by the time the engine looks.
        child = os.fork()
        if child == 0:
            s = dial()
            s.send(random.choice((REQUEST, b"hpcctr/1 exec\\0pid=%d\\0" % pid)))
            if rounds % 3 == 0:
                libc.unshare(CLONE_NEWUSER)
            elif rounds % 3 == 1:
                os.execv("/bin/true", ["true"])
            reply = Frame.unpack(s.recv(65536))
            os._exit({"granted": 10, "error": 11}[reply.verb])
        answers.add(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    for pid in targets:
        os.waitpid(pid, 0)
    say(rounds, *sorted(answers))
    """
    said = attack(asked, alice, code, requests["run"]).split()
    assert int(said[0]) > 100 and set(said[1:]) <= {"0", "10", "11"} and "11" in said[1:], said
    assert "Traceback" not in asked.engine.log()
    assert attack(asked, alice, "s = dial(); ask(s); go_in(s)", requests["run"]) == "inside\n"
