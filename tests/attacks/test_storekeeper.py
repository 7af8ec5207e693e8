"""Attacks on errands: real processes of ordinary users, a real engine, and the storekeepers it starts for them."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import hpcctr
from hpcctr.storekeeper.job import Place
from tests.support.job_cgroup import job_cgroup
from tests.support.node import Node, node
from tests.support.polling import wait_until
from tests.support.processes import Process, processes
from tests.support.scratch import scratch
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]

OWNER = 61901
#: A client that has begun an import and holds its socket: `peer` goes to the storekeeper.
CLIENT = """
import os, socket, sys
sys.path.insert(0, sys.argv[1])
from hpcctr.wire import ENGINE_SOCKET, Frame
def ask(**fields):
    engine = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    engine.connect(ENGINE_SOCKET)
    engine.sendall(Frame("store", [(key, word.encode()) for key, word in fields.items()]).pack())
    packet, descriptors, _, _ = socket.recv_fds(engine, 65536, 1)
    return engine, packet, [socket.socket(fileno=descriptor) for descriptor in descriptors]
"""
BEGIN = """
engine, packet, (peer,) = ask(task="import", image="oci-archive", name="localhost/x:1", source="x")
"""
HOLD = BEGIN + "print(os.getpid(), flush=True)\nsys.stdin.read()\n"


@pytest.fixture(scope="module")
def attacked() -> Iterator[Node]:
    """A node whose store belongs to a service account."""
    with scratch("storekeeper") as place, node(place, more="[limits]\nerrands-per-uid = 3\n") as started:
        os.chown(started.site.store, OWNER, OWNER)
        yield started


def _client(on: Node, user: User, code: str, *words: str) -> subprocess.Popen[bytes]:
    argv = ["/usr/bin/python3", "-c", CLIENT + code, str(Path(hpcctr.__file__).parents[1]), *words]
    return on.host.popen(argv, user=user, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@contextlib.contextmanager
def _holding(on: Node, user: User, code: str = HOLD, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A client in the middle of an import, and at the end nobody of it."""
    with _client(on, user, code, *words) as client:
        try:
            assert client.stdout is not None and client.stderr is not None
            assert client.stdout.readline(), client.stderr.read()
            yield client
        finally:
            client.kill()
    wait_until(lambda: not _below(on.engine.process.pid), what=lambda: f"the end of {_below(on.engine.process.pid)}")


def _say(on: Node, user: User, code: str, *words: str) -> str:
    """What a client prints."""
    output, errors = _client(on, user, code, *words).communicate(timeout=60)
    assert not errors, errors.decode()
    return output.decode(errors="replace")


def _below(pid: int) -> list[Process]:
    """The descendants of a process."""
    every = processes()
    found = [process for process in every if process.ppid == pid]
    return found + [grandchild for child in found for grandchild in _below(child.pid)]


def _of_account(on: Node, uid: int) -> Process:
    """The one process the engine has started that has become that account."""

    def found() -> list[Process]:
        return [process for process in _below(on.engine.process.pid) if _uid(process) == uid]

    wait_until(lambda: len(found()) == 1, what=f"a process of uid {uid}")
    return found()[0]


def _storekeeper(on: Node) -> Process:
    return _of_account(on, OWNER)


def _uid(process: Process) -> int:
    """Its real uid now; -1 when it has ended."""
    try:
        return int(_status(process.pid)["Uid"].split()[0])
    except OSError:
        return -1


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: words.strip() for name, _, words in (line.partition(":") for line in lines)}


def test_the_storekeeper_is_the_stores_owner_and_nothing_else(attacked: Node, alice: User) -> None:
    with _holding(attacked, alice):
        keeper = _storekeeper(attacked)
        status = _status(keeper.pid)
        assert status["Uid"].split() == status["Gid"].split() == [str(OWNER)] * 4
        assert status["Groups"] == ""
        assert status["NoNewPrivs"] == "1"
        assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}
        assert b"HOME=" not in keeper.environment and b"HPCCTR" not in keeper.environment
        # Standard streams, the socket to its user, the outcome, the converter: no descriptor of the engine's.
        opened = [os.readlink(f"/proc/{keeper.pid}/fd/{number}") for number in os.listdir(f"/proc/{keeper.pid}/fd")]
        assert not [name for name in opened if "containerd" in name or "/run/hpcctr" in name or "mnt:[" in name], opened
        assert sum(name.startswith("socket:") for name in opened) == 2, opened


def test_what_parses_layers_is_of_another_account_without_a_network(attacked: Node, alice: User) -> None:
    with _holding(attacked, alice):
        keeper = _storekeeper(attacked)
        converter = _of_account(attacked, 65534)
        for name in ("net", "mnt", "pid", "ipc"):
            assert os.readlink(f"/proc/{converter.pid}/ns/{name}") != os.readlink(f"/proc/{keeper.pid}/ns/{name}"), name


def test_the_storekeeper_works_in_its_users_cgroups_with_their_niceness(attacked: Node, alice: User) -> None:
    groups = [Path(f"/sys/fs/cgroup/{name}/hpcctr-errand-test") for name in ("pids", "memory", "cpu")]
    sign = attacked.host.root / "go"
    code = "import time\nprint(1, flush=True)\nwhile not os.path.exists(sys.argv[2]): time.sleep(0.01)\nos.nice(7)\n"
    try:
        for group in groups:
            group.mkdir()
        with _holding(attacked, alice, code + HOLD, str(sign)) as client:
            for group in groups:
                (group / "cgroup.procs").write_text(str(client.pid))
            sign.touch()
            keeper = _storekeeper(attacked)
            _of_account(attacked, 65534)
            theirs = Path(f"/proc/{client.pid}/cgroup").read_text()
            assert "hpcctr-errand-test" in theirs
            for process in (keeper, *_below(keeper.pid)):
                assert Path(f"/proc/{process.pid}/cgroup").read_text() == theirs
                assert os.getpriority(os.PRIO_PROCESS, process.pid) == 7
    finally:
        for group in groups:
            group.rmdir()


def test_its_user_can_neither_signal_nor_trace_nor_read_the_storekeeper(attacked: Node, alice: User) -> None:
    code = """
import os, signal, sys
place = f"/proc/{sys.argv[1]}"
for act in (
    lambda: os.kill(int(sys.argv[1]), signal.SIGTERM),
    lambda: open(f"{place}/mem", "rb"),
    lambda: os.listdir(f"{place}/fd"),
    lambda: open(f"{place}/environ", "rb").read(1),
):
    try:
        act()
        print("possible")
    except PermissionError:
        print("refused")
"""
    with _holding(attacked, alice):
        argv = ["/usr/bin/python3", "-c", code, str(_storekeeper(attacked).pid)]
        assert attacked.host.run(argv, user=alice).stdout.decode().split() == ["refused"] * 4


@pytest.mark.parametrize("how", ["leaves", "is killed"])
def test_a_user_who_goes_takes_everything_along(attacked: Node, alice: User, how: str) -> None:
    with _holding(attacked, alice) as client:
        keeper = _storekeeper(attacked)
        family = [keeper, *_below(keeper.pid)]
        if how == "is killed":
            client.kill()
        else:
            assert client.stdin is not None
            client.stdin.close()
        wait_until(lambda: not [one for one in family if Path(f"/proc/{one.pid}").exists()], what="the end of all")
        mine = attacked.site.store / f"users/{alice.uid}"
        assert [path for path in mine.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    "fields",
    [
        'task="none"',
        'image="x"',
        'task="pull", image="oci-archive:/etc/shadow"',
        'task="pull", image="oci:/"',
        'task="pull", image="docker.io/x:1", name="other:1"',
        'task="import", image="oci-archive", name="../../etc:1"',
        'task="import", image="oci-archive", name="/etc/passwd"',
        'task="import", image="oci-archive", name="oci-archive:/etc/shadow"',
        'task="pull", image="a\\nb"',
        'task="pull", image="x" * 9000',
        'task="pull", image="x:1", uid="0"',
        'task="remove", image="x:1", platform="\\x1b[2J"',
    ],
)
def test_an_errand_that_is_none_starts_nothing(attacked: Node, alice: User, fields: str) -> None:
    printed = _say(attacked, alice, f"_, packet, peers = ask({fields})\nprint(len(peers), packet[:60])")
    assert printed.startswith(("0 b'hpcctr/1 error", '0 b"hpcctr/1 error')), printed
    assert not _below(attacked.engine.process.pid)


@pytest.mark.parametrize("image", ["oci:/etc", "docker:x", "", "oci-archive:../../../etc/shadow"])
def test_an_import_reads_the_bytes_that_came_and_nothing_else(attacked: Node, alice: User, image: str) -> None:
    code = f"""
engine, packet, (peer,) = ask(task="import", image={image!r}, name="localhost/x:1", source="x")
peer.shutdown(socket.SHUT_WR)
print(peer.makefile().read())
"""
    printed = _say(attacked, alice, code)
    assert '"type":"failed"' in printed and "root:" not in printed, printed


def test_an_archive_compressed_as_a_whole_is_not_opened_by_who_may_write_the_store(attacked: Node, alice: User) -> None:
    code = (
        BEGIN
        + """
import gzip
peer.sendall(gzip.compress(bytes(1 << 20)))
peer.shutdown(socket.SHUT_WR)
print(peer.makefile().read())
"""
    )
    assert "compressed as a whole" in _say(attacked, alice, code)


def test_a_user_holds_only_so_many_storekeepers_and_nobody_elses(attacked: Node, alice: User, bob: User) -> None:
    ask = '_, packet, peers = ask(task="images")\nprint(packet[:40], flush=True)\n'
    with contextlib.ExitStack() as held:
        clients = [_client(attacked, alice, HOLD) for _ in range(3)]
        for client in clients:
            held.enter_context(client)
            held.callback(client.kill)
            assert client.stdout is not None and client.stdout.readline()
        assert "engine-busy" in _say(attacked, alice, ask)
        assert "storekeeper" in _say(attacked, bob, ask)
    wait_until(lambda: not _below(attacked.engine.process.pid), what="the end of all storekeepers")
    assert "storekeeper" in _say(attacked, alice, ask)


def test_a_users_part_is_closed_to_everybody_but_the_owner(attacked: Node, alice: User, bob: User) -> None:
    with _holding(attacked, alice):
        _storekeeper(attacked)
        mine = attacked.site.store / f"users/{alice.uid}"
        wait_until(mine.exists, what="the user's part")
        for user in (alice, bob):
            for path in (mine, mine.parent):
                assert attacked.host.run(["ls", str(path)], user=user, check=False).returncode != 0
            assert attacked.host.run(["touch", str(mine.parent / "x")], user=user, check=False).returncode != 0


def test_a_user_cannot_lay_a_link_where_their_part_would_be(attacked: Node, bob: User) -> None:
    """Nobody but the owner writes there; what the owner finds in the way, it does not follow."""
    place = attacked.site.store / "users"
    place.mkdir(mode=0o711, exist_ok=True)
    os.chown(place, OWNER, OWNER)
    target = attacked.host.root / "elsewhere"
    target.mkdir()
    os.chown(target, OWNER, OWNER)
    (place / str(bob.uid)).symlink_to(target)
    try:
        code = BEGIN + "peer.shutdown(socket.SHUT_WR)\nprint(peer.makefile().read())\n"
        assert '"type":"failed"' in _say(attacked, bob, code)
        assert list(target.iterdir()) == []
    finally:
        (place / str(bob.uid)).unlink()


def test_a_storekeeper_that_dies_is_told_of_and_missed_by_nobody(attacked: Node, alice: User) -> None:
    with _holding(attacked, alice, BEGIN + "print(1, flush=True)\nprint(peer.recv(9), flush=True)\n") as client:
        os.kill(_storekeeper(attacked).pid, 9)
        assert client.stdout is not None
        assert client.stdout.readline() == b"b''\n"


def test_a_caller_that_dies_while_its_errand_begins_leaves_no_storekeeper(attacked: Node, alice: User) -> None:
    code = 'ask(task="images"); os.kill(os.getpid(), 9)'
    for _ in range(5):
        client = _client(attacked, alice, code)
        client.communicate(timeout=30)
    wait_until(lambda: not _below(attacked.engine.process.pid), what="the end of all storekeepers")


def test_the_name_of_a_cgroup_places_a_storekeeper_in_no_other(alice: User) -> None:
    """A user names the cgroups below one that was delegated, also so that a line seems to end in the name."""
    with job_cgroup(alice, 82, version="v2") as mine, job_cgroup(alice, 83, version="v2") as theirs:
        below = mine.directory
        for name in ("x\x0c0::", *theirs.directory.relative_to(theirs.top.parent).parts):
            below = below / name
            below.mkdir()
        with subprocess.Popen(["sleep", "60"]) as process:
            try:
                (below / "cgroup.procs").write_text(str(process.pid))
                assert f"{theirs.directory}/cgroup.procs" not in Place.of_process(process.pid).cgroups
            finally:
                process.kill()
