"""Attacks on the engine's knowledge of who asks: callers who change, end, lend and disguise themselves.

Where the moment matters the engine is stopped (SIGSTOP) while it passes: then the worst moment is the one there is.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.hostile_caller import (
    NUMBER_IS_GONE,
    REFUSED,
    all_of,
    answers,
    argv,
    attack,
    go_on,
    line_of,
    started,
    state_of,
    stopped,
)
from tests.support.node import Node
from tests.support.polling import wait_until
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]


def test_the_client_of_these_attacks_is_served_when_it_behaves(
    asked: Node, alice: User, requests: dict[str, bytes]
) -> None:
    said = answers(asked, alice, "say(ask(dial()))", requests)
    # The store of this node is root's, which users bring nothing to, whoever they are.
    assert said == {"run": "granted\n", "exec": "granted\n", "store": "refused pull-refused\n"}
    for code in ("s = dial(); ask(s); go_in(s)", "become(); s = dial(); ask(s); go_in(s)"):
        as_root = code.startswith("become")
        assert attack(asked, alice, code, requests["run"], as_root=as_root) == "inside\n"


# threads


def test_a_thread_that_outlives_its_leader_is_refused(asked: Node, alice: User, requests: dict[str, bytes]) -> None:
    code = """
    before = dial()
    def work():
        until(lambda: is_zombie(os.getpid()))
        say(ask(before))
        say(ask(dial()))
        os._exit(0)
    threading.Thread(target=work).start()
    libc.pthread_exit(None)
    """
    assert answers(asked, alice, code, requests) == all_of(requests, REFUSED * 2)


def test_a_leader_that_ends_after_the_grant_leaves_its_threads_nothing(
    asked: Node, alice: User, requests: dict[str, bytes]
) -> None:
    code = """
    s = dial()
    assert ask(s) == "granted"
    def work():
        until(lambda: is_zombie(os.getpid()))
        s.send(b"E")
        say(answer(s))
        os._exit(0)
    threading.Thread(target=work).start()
    libc.pthread_exit(None)
    """
    for verb in ("run", "exec"):
        said = attack(asked, alice, code, requests[verb])
        assert said.startswith("0 descriptors ") and "is a zombie" in said


def test_a_thread_is_never_served_as_another_user_than_its_process(
    asked: Node, alice: User, bob: User, requests: dict[str, bytes]
) -> None:
    """Servers of files take a user's identity in one thread; who asks is the process, with one identity."""
    code = """
    leader, threads = words[0], words[1]
    ids = {"root": (0, 0), "mine": (UID, GID), "other": (int(words[2]), int(words[3]))}
    def work():
        os.setgroups([])
        uid, gid = ids[threads]
        set_ids(uid, uid, uid, gid)
        ready.wait()
        say(ask(dial()))
        os._exit(0)
    ready = threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    uid, gid = ids[leader]
    set_ids(uid, uid, uid, gid)
    ready.set()
    thread.join()
    """
    for leader, thread in (("root", "mine"), ("mine", "root"), ("other", "mine"), ("mine", "other")):
        for packet in requests.values():
            ids = (leader, thread, str(bob.uid), str(bob.gid))
            assert attack(asked, alice, code, packet, *ids, as_root=True) == REFUSED, (leader, thread)


def test_a_thread_that_becomes_enter_while_others_go_on_is_alone_when_it_does(
    asked: Node, alice: User, requests: dict[str, bytes]
) -> None:
    code = """
    s = dial()
    assert ask(s) == "granted"
    def spin():
        while True:
            for _ in range(1000):
                pass
    def meddle():
        while True:
            try:
                s.send(b"E")
            except OSError:
                return
            time.sleep(0.001)
    for work in (spin, spin):
        threading.Thread(target=work, daemon=True).start()
    if words[0] == "meddle":
        threading.Thread(target=meddle, daemon=True).start()
        time.sleep(0.01)
    threading.Thread(target=lambda: go_in(s, b"sh", b"-c", b"echo inside $$; ls /proc/$$/task | wc -l")).start()
    time.sleep(20)
    """
    for _ in range(5):
        with started(asked, alice, code, requests["run"], "") as process:
            assert line_of(process) == f"inside {process.pid}"
            assert line_of(process) == "1"
        # Who asks too early, as another program than enter, has used up what was granted.
        assert "inside" not in attack(asked, alice, code, requests["run"], "meddle")


def test_a_thread_that_is_traced_alone_gets_no_namespace(asked: Node, alice: User, requests: dict[str, bytes]) -> None:
    """The status of a process tells who traces its first thread."""
    code = """
    def tracer_of(task):
        return [line.split()[1] for line in open(f"/proc/self/task/{task}/status") if line.startswith("TracerPid")][0]
    def work():
        me = threading.get_native_id()
        subprocess.Popen(["strace", "-p", str(me), "-o", "/dev/null"], stderr=subprocess.DEVNULL)
        until(lambda: tracer_of(me) != "0")
        assert tracer_of(os.getpid()) == "0"
        s = dial()
        say(ask(s))
        go_in(s)
    threading.Thread(target=work).start()
    time.sleep(20)
    """
    said = attack(asked, alice, code, requests["run"])
    assert said.startswith("granted\n") and "inside" not in said


# set-user-ID programs and other changes of identity


@pytest.fixture(scope="module")
def privileged_programs(asked: Node, alice: User) -> tuple[Path, ...]:
    """cat with set-user-ID root; with set-group-ID root, and of a group of alice's."""
    made = []
    for name, group, mode in (("u", 0, 0o4755), ("g", 0, 0o2755), ("h", alice.groups[-1], 0o2755)):
        path = asked.host.root / f"cat-{name}"
        path.write_bytes(Path("/bin/cat").read_bytes())
        os.chown(path, 0, group)
        path.chmod(mode)
        made.append(path)
    assert alice.groups[-1] != alice.gid
    return tuple(made)


def test_a_set_user_id_program_between_connecting_and_asking_is_refused(
    asked: Node, alice: User, requests: dict[str, bytes], privileged_programs: tuple[Path, ...]
) -> None:
    # Its child speaks on the socket that it keeps; passwd waits for a password meanwhile.
    code = """
    def is_readable(pid):
        try:
            open(f"/proc/{pid}/maps").read(1)
        except OSError:
            return False
        return True
    s = dial()
    reading, writing = os.pipe()
    if os.fork() == 0:
        until(lambda: not is_readable(os.getppid()))
        say(ask(s))
        os._exit(0)
    os.set_inheritable(writing, True)
    s.set_inheritable(True)
    os.dup2(reading, 0)
    os.dup2(os.open("/dev/null", os.O_WRONLY), 2)
    os.execv(words[0], [words[0]])
    """
    for program in (*privileged_programs, Path("/usr/bin/passwd")):
        for verb, packet in requests.items():
            with started(asked, alice, code, packet, str(program)) as process:
                assert line_of(process) == REFUSED.strip(), (program, verb)


def test_a_set_user_id_program_between_asking_and_going_in_is_refused(
    asked: Node, alice: User, requests: dict[str, bytes], privileged_programs: tuple[Path, ...]
) -> None:
    code = """
    s = dial()
    say(ask(s))
    sys.stdin.readline()
    reading, writing = os.pipe()
    if os.fork() == 0:
        say(answer(s))
        os._exit(0)
    os.set_inheritable(writing, True)
    s.set_inheritable(True)
    os.dup2(reading, 0)
    # From here on the engine is asked by this very process, whatever it has become.
    s.send(b"E")
    os.execv(words[0], [words[0]])
    """
    for program in privileged_programs:
        for verb in ("run", "exec"):
            with started(asked, alice, code, requests[verb], str(program)) as process:
                assert line_of(process) == "granted"
                with stopped(asked):
                    go_on(process)
                    wait_until(lambda: os.readlink(f"/proc/{process.pid}/exe") == str(program))  # noqa: B023
                said = line_of(process)
                assert said.startswith("0 descriptors ") and "mixed or changed" in said


def test_who_connects_with_privilege_and_drops_it_is_refused(
    asked: Node, alice: User, bob: User, requests: dict[str, bytes]
) -> None:
    code = """
    other = int(words[0])
    s = dial()
    pid = os.fork()
    if pid == 0:
        # The child is not who connected; the one who did was root.
        become()
        say(ask(s))
        os._exit(0)
    os.waitpid(pid, 0)
    if os.fork() == 0:
        os.setresuid(0, UID, 0)
        s = dial()
        os.setresuid(UID, UID, 0)
        say(ask(s))
        os._exit(0)
    os.wait()
    become()
    say(ask(dial()))
    """
    expected = REFUSED * 2
    for verb, packet in requests.items():
        said = attack(asked, alice, code, packet, str(bob.uid), as_root=True)
        assert said.startswith(expected) and said.count("\n") == 3, verb


@pytest.mark.parametrize("which", ["saved uid", "saved gid", "file uid", "file gid", "effective uid", "effective gid"])
def test_one_id_that_differs_is_refused(
    asked: Node, alice: User, bob: User, requests: dict[str, bytes], which: str
) -> None:
    code = """
    which, uid, gid = words[0], int(words[1]), int(words[2])
    os.setgroups(GROUPS)
    gids, uids = [GID] * 3, [UID] * 3
    if not which.startswith("file"):
        (uids if which.endswith("uid") else gids)[1 if which.startswith("effective") else 2] = (
            uid if which.endswith("uid") else gid
        )
    prctl(8, 1)
    os.setresgid(*gids)
    os.setresuid(*uids)
    if which.startswith("file"):
        # Set with a capability that is gone again afterwards.
        capset(0b11000000, 0b11000000)
        libc.setfsuid(uid) if which.endswith("uid") else libc.setfsgid(gid)
    capset(0, 0)
    say(ask(dial()))
    """
    for packet in requests.values():
        said = attack(asked, alice, code, packet, which, str(bob.uid), str(bob.gid), as_root=True)
        # Who has another effective uid is that user to the kernel, and mixed to the engine.
        assert said == REFUSED


def test_who_becomes_another_user_after_connecting_is_neither(
    asked: Node, alice: User, bob: User, requests: dict[str, bytes]
) -> None:
    code = """
    os.setgroups([])
    os.setresgid(GID, GID, GID)
    os.setresuid(UID, UID, 0)
    s = dial()
    os.setresuid(0, 0, 0)
    os.setresgid(int(words[1]), int(words[1]), int(words[1]))
    os.setresuid(int(words[0]), int(words[0]), int(words[0]))
    say(ask(s))
    """
    for packet in requests.values():
        assert attack(asked, alice, code, packet, str(bob.uid), str(bob.gid), as_root=True) == REFUSED


# numbers that change hands

CONNECTED_AND_GONE = """
s = seqpacket()
pid = os.fork()
if pid == 0:
    become()
    s.connect(ENGINE_SOCKET)
    os._exit(0)
os.waitpid(pid, 0)
say(pid)
"""


@pytest.mark.parametrize("successor", ["the same user", "another user", "root"])
def test_a_number_that_changes_hands_before_the_engine_looks_leads_nowhere(
    asked: Node, alice: User, bob: User, requests: dict[str, bytes], successor: str
) -> None:
    code = (
        CONNECTED_AND_GONE
        + """
def work():
    if words[0] == "the same user":
        become()
    elif words[0] == "another user":
        become(int(words[1]), int(words[2]))
    say("ready")
    say(ask(s))
with_number(pid, work)
"""
    )
    for verb, packet in requests.items():
        ids = (successor, str(bob.uid), str(bob.gid))
        with stopped(asked):
            for _ in range(5):
                process = asked.host.popen(
                    argv(asked, alice, code, packet, *ids), cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE
                )
                line_of(process)
                said = line_of(process)
                if said == "ready":
                    break
                assert NUMBER_IS_GONE in process.communicate()[1]
            assert said == "ready"
        out, _ = process.communicate(timeout=20)
        # Nobody answers where even the beginning of a session is refused.
        assert out.decode().strip() in ("refused caller-refused", "EPIPE", "ECONNRESET"), (verb, successor)


@pytest.mark.parametrize("successor", ["the same user", "another user"])
def test_a_number_that_changes_hands_after_the_grant_gets_no_namespace(
    asked: Node, alice: User, bob: User, requests: dict[str, bytes], successor: str
) -> None:
    """The successor is in everything like the one who asked: number, socket, enter; and it is another process."""
    code = """
    s = seqpacket()
    pid = os.fork()
    if pid == 0:
        become()
        s.connect(ENGINE_SOCKET)
        say(ask(s))
        os._exit(0)
    os.waitpid(pid, 0)
    def work():
        become() if words[0] == "the same user" else become(int(words[1]), int(words[2]))
        go_in(s)
    say("status", with_number(pid, work))
    """
    for verb in ("run", "exec"):
        ids = (successor, str(bob.uid), str(bob.gid))
        assert attack(asked, alice, code, requests[verb], *ids, as_root=True) == "granted\nstatus 126\n"


def test_who_has_ended_is_refused_though_a_child_keeps_the_socket(
    asked: Node, alice: User, requests: dict[str, bytes]
) -> None:
    code = """
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        s = dial()
        socket.send_fds(theirs, [b"x"], [s.fileno()])
        os._exit(0)
    _, (number,), _, _ = socket.recv_fds(ours, 1, 1)
    os.waitpid(pid, 0)
    say(ask(socket.socket(fileno=number)))
    """
    for packet in requests.values():
        assert attack(asked, alice, code, packet) in (REFUSED, "EPIPE\n", "ECONNRESET\n")


# sockets that are lent


@pytest.mark.parametrize("speaker", ["another user", "root", "a process in namespaces of its own"])
def test_whoever_speaks_on_a_socket_speaks_for_who_connected(
    asked: Node, alice: User, bob: User, requests: dict[str, bytes], speaker: str
) -> None:
    """Served is the one who connected, to whom only the reply is of use; the speaker gets no namespace."""
    code = """
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        become()
        s = dial()
        socket.send_fds(theirs, [b"x"], [s.fileno()])
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    _, (number,), _, _ = socket.recv_fds(ours, 1, 1)
    s = socket.socket(fileno=number)
    if words[0] == "another user":
        become(int(words[1]), int(words[2]), [int(words[2])])
    elif words[0] != "root":
        become()
        done(libc.unshare(CLONE_NEWUSER | 0x20000 | 0x40000000))
    say(pid, ask(s))
    go_in(s)
    """
    said = attack(asked, alice, code, requests["run"], speaker, str(bob.uid), str(bob.gid), as_root=True)
    assert "inside" not in said
    pid, answered = said.split("\n")[0].split()
    assert answered == "granted"
    # It is written down once the session is over.
    wait_until(lambda: f" pid={pid} " in asked.engine.log())
    lines = [line for line in asked.engine.log().splitlines() if f" pid={pid} " in line]
    assert all(f" uid={alice.uid} gid={alice.gid} " in line for line in lines)


def test_a_namespace_that_another_process_of_the_callers_catches_opens_nothing(
    asked: Node, alice: User, requests: dict[str, bytes]
) -> None:
    """A child that kept the socket may read from it first. A namespace without the right to enter it is a number."""
    code = """
    def result(act):
        try:
            act()
        except OSError as error:
            return errno.errorcode[error.errno]
        return "done"
    s = dial()
    say(ask(s))
    sys.stdin.readline()
    if os.fork() == 0:
        _, (namespace,), _, _ = socket.recv_fds(s, 5000, 4)
        say("caught")
        acts = [lambda: done(libc.setns(namespace, kinds)) for kinds in (0, 0x20000)]
        acts += [lambda: os.listdir(namespace), lambda: os.stat("etc", dir_fd=namespace)]
        # Nor as root of a user namespace of one's own.
        acts += [lambda: done(libc.unshare(CLONE_NEWUSER)), acts[1]]
        say(*map(result, acts))
        os._exit(0)
    go_in(s)
    """
    with started(asked, alice, code, requests["run"]) as process:
        assert line_of(process) == "granted"
        with stopped(asked):
            go_on(process)
            # It has asked, and waits in ppoll(2).
            wait_until(lambda: Path(f"/proc/{process.pid}/syscall").read_text().split()[0] in ("271", "73"))
            os.kill(process.pid, signal.SIGSTOP)
            wait_until(lambda: state_of(process.pid) == "T")
        assert line_of(process) == "caught"
        assert line_of(process) == "EPERM EPERM ENOTDIR ENOTDIR done EPERM"
        os.kill(process.pid, signal.SIGCONT)
        out, err = process.communicate(timeout=20)
        assert (out, process.returncode) == (b"", 125), err
