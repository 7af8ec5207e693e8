"""From inside the converter nothing can be reached: not as root's child, not as a user's, not where the kernel gives no
user namespace. And whoever is killed there, the puller gets an error and nothing is left."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hpcctr.errors import ConversionFailed
from hpcctr.image import confinement
from hpcctr.image.conversion import Converter, convert
from hpcctr.image.progress import ProgressReport
from hpcctr.image.record import ImageConfig, Platform
from hpcctr.image.source import LayerBlob, SourceImage
from tests.support.linked_images import library
from tests.support.oci import digest_of, file, symlink, tar
from tests.support.polling import wait_until
from tests.support.scratch import scratch
from tests.support.users import User

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="starts converters as several accounts")

#: What a hostile image would do once it has taken the converter over.
PROBE = """
import json, os, resource, socket, subprocess, sys

def outcome(call, *arguments):
    try:
        return repr(call(*arguments))
    except OSError as error:
        return type(error).__name__
    except Exception as error:
        return repr(error)

peer = socket.socket(fileno=int(sys.argv[1]))
peer.send(b"running")
wanted = json.loads(peer.recv(65536))
status = dict(line.rstrip("\\n").split(":", 1) for line in open("/proc/self/status"))
seen = {
    "status": {key: value.split() for key, value in status.items()},
    "root": sorted(os.listdir("/")),
    "processes": sorted(name for name in os.listdir("/proc") if name.isdigit()),
    "mounts": [line.split()[4:6] for line in open("/proc/self/mountinfo")],
    "open": sorted(outcome(os.readlink, "/proc/self/fd/" + name) for name in os.listdir("/proc/self/fd")),
    "namespaces": {name: os.readlink("/proc/self/ns/" + name) for name in os.listdir("/proc/self/ns")},
    "limits": {str(limit): resource.getrlimit(limit) for limit in wanted["limits"]},
    "environment": dict(os.environ),
    "nice": os.getpriority(os.PRIO_PROCESS, 0),
    "processors": sorted(os.sched_getaffinity(0)),
    "read": {path: outcome(os.open, path, os.O_RDONLY) for path in wanted["read"]},
    "write": {path: outcome(os.open, path, os.O_RDWR | os.O_CREAT, 0o600) for path in wanted["write"]},
    "signal": [outcome(os.kill, pid, 0) for pid in wanted["pids"]],
    "pidfd": [outcome(os.pidfd_open, pid) for pid in wanted["pids"]],
    "trace": [outcome(os.open, "/proc/%d/mem" % pid, os.O_RDWR) for pid in wanted["pids"]],
    "roots": [outcome(os.listdir, "/proc/%d/root/" % pid) for pid in wanted["pids"]],
    "network": outcome(socket.socket),
    "setuid": outcome(os.setuid, 0),
    "memory": outcome(bytearray, 1 << 38),
    "su": subprocess.run(["/usr/bin/su", "-c", "true"], stdin=0, capture_output=True).returncode != 0,
}
peer.send(json.dumps(seen).encode())
"""

PRIVATE = ("mnt", "net", "pid", "ipc", "uts", "cgroup")


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What a converter of one starter could see and do."""

    seen: dict[str, Any]
    uid: int
    gid: int
    #: As root's child it has an account of its own.
    has_account: bool
    has_namespaces: bool


#: Starts a probe and prints what it says; the starter is the puller it would attack.
DRIVER = f"""
import json, os, sys
from hpcctr.image import confinement
uid, gid, wanted = json.loads(sys.argv[1])
wanted["pids"] = [os.getpid(), 1]
secret = os.open("/etc/hostname", os.O_RDONLY)
os.set_inheritable(secret, True)
peer, process = confinement.start(uid=uid, gid=gid, code={PROBE!r})
def sessions(pid):
    # As the starter sees them: the converter has process numbers of its own.
    with open(f"/proc/{{pid}}/task/{{pid}}/children") as children:
        below = [number for child in children.read().split() for number in sessions(int(child))]
    return [os.getsid(pid), *below]
peer.recv(8)  # it runs
outside = {{"sessions": sessions(process.pid), "starters": os.getsid(0)}}
peer.send(json.dumps(wanted).encode())
print(json.dumps(json.loads(peer.recv(1 << 20)) | outside))
peer.close()
process.wait(20)
"""


def probe(
    place: Path, *, uid: int | None = None, gid: int | None = None, before: Sequence[str] = (), **popen: Any
) -> dict[str, Any]:
    (place / "store").mkdir(exist_ok=True, mode=0o755)
    (place / "store/readable").write_text("everybody's")
    (place / "store/writable").touch()
    (place / "store").chmod(0o777)
    (place / "store/writable").chmod(0o666)
    wanted = {
        "limits": list(confinement.LIMITS),
        "read": [str(place / "store/readable"), str(place), "/etc/passwd", "/proc/1/environ", "/dev/null", "/sys"],
        "write": [str(place / "store/writable"), str(place / "store/new"), "/tmp/new", "/new", "/usr/new", "/proc/new"],
    }
    argv = [*before, sys.executable, "-c", DRIVER, json.dumps([uid, gid, wanted])]
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"], "SECRET": "token"}
    run = subprocess.run(
        argv, env=environment, cwd="/", capture_output=True, text=True, timeout=60, start_new_session=True, **popen
    )
    answer = run.stdout
    assert answer.startswith("{"), (answer, run.stderr)
    return dict(json.loads(answer))


STARTERS = ("root", "root for another account", "user", "user without namespaces")


@pytest.fixture(params=STARTERS, scope="module")
def probed(request: pytest.FixtureRequest, alice: User) -> Iterator[Probed]:
    """As every kind of starter in turn."""
    with scratch("probed") as place:
        found = _probed(request.param, place, alice)
        # Without namespaces it could make files, as long as it has not begun to read.
        assert sorted(os.listdir(place / "store")) == ["readable", "writable"] or not found.has_namespaces
        yield found


def _probed(starter: str, place: Path, alice: User) -> Probed:
    as_alice: dict[str, Any] = {"user": alice.uid, "group": alice.gid, "extra_groups": alice.groups}
    if starter == "root":
        return Probed(seen=probe(place), uid=65534, gid=65534, has_account=True, has_namespaces=True)
    if starter == "root for another account":
        seen = probe(place, uid=61501, gid=61502)
        return Probed(seen=seen, uid=61501, gid=61502, has_account=True, has_namespaces=True)
    if starter == "user":
        seen = probe(place, **as_alice)
        return Probed(seen=seen, uid=alice.uid, gid=alice.gid, has_account=False, has_namespaces=True)
    # One user namespace may be made in this one, which the starter lives in; the converter gets no second.
    script = "echo 1 >/proc/sys/user/max_user_namespaces && "
    script += 'exec unshare --user --map-user="$0" --map-group="$1" "${@:2}"'
    before = ["unshare", "--user", "--map-root-user", "bash", "-c", script, str(alice.uid), str(alice.gid)]
    seen = probe(place, before=before, **as_alice)
    return Probed(seen=seen, uid=alice.uid, gid=alice.gid, has_account=False, has_namespaces=False)


def test_it_is_nobody_and_has_no_way_to_be_more(probed: Probed) -> None:
    status = probed.seen["status"]
    assert status["Uid"] == [str(probed.uid)] * 4
    assert status["Gid"] == [str(probed.gid)] * 4
    if probed.has_account:
        assert status["Groups"] == []
    empty = ["CapInh", "CapPrm", "CapEff", "CapAmb", *(["CapBnd"] if probed.has_namespaces else [])]
    assert {key: status[key] for key in empty} == {key: ["0" * 16] for key in empty}
    assert status["NoNewPrivs"] == ["1"]
    assert status["Seccomp"] == ["2"]
    # EINVAL in a user namespace that has no 0.
    assert probed.seen["setuid"] in ("PermissionError", "OSError")
    assert probed.seen["su"]


def test_it_holds_nothing_but_its_socket(probed: Probed) -> None:
    targets = [target.strip("'") for target in probed.seen["open"]]
    others = [target for target in targets if "/dev/null" not in target and "FileNotFound" not in target]
    assert len(others) == 1
    assert others[0].startswith("socket:")
    assert probed.seen["environment"].keys() <= {"PATH", "LC_ALL", "LC_CTYPE"}


def test_it_reaches_no_network(probed: Probed) -> None:
    assert probed.seen["network"] == "PermissionError"


def test_it_cannot_signal_or_trace_the_puller_or_anybody(probed: Probed) -> None:
    assert set(probed.seen["signal"]) == {"PermissionError"}
    if probed.has_namespaces:
        # Pid 1 is itself there.
        assert probed.seen["processes"] == ["1"]
        assert probed.seen["trace"][0] == "FileNotFoundError"
        assert probed.seen["pidfd"][0] == "ProcessLookupError"
        assert probed.seen["roots"][0] == "FileNotFoundError"


def test_it_has_namespaces_of_its_own(probed: Probed) -> None:
    ours = {name: os.readlink(f"/proc/self/ns/{name}") for name in (*PRIVATE, "user")}
    different = {name for name in PRIVATE if probed.seen["namespaces"][name] != ours[name]}
    assert different == (set(PRIVATE) if probed.has_namespaces else set())
    assert (probed.seen["namespaces"]["user"] == ours["user"]) == probed.has_account


def test_it_sees_no_file_of_the_store_and_writes_nowhere(probed: Probed) -> None:
    seen = probed.seen
    if not probed.has_namespaces:
        # The same uid in the same view. What is held back there is names: the filter denies to change any.
        assert seen["write"]["/usr/new"] == "PermissionError"
        return
    # Pid 1 is itself there.
    readable = {path for path, said in seen["read"].items() if said != "FileNotFoundError"}
    assert readable <= {"/proc/1/environ"}
    assert set(seen["write"].values()) <= {"FileNotFoundError", "OSError", "PermissionError"}
    assert all({"ro", "nosuid", "nodev"} <= set(options.split(",")) for _, options in seen["mounts"])
    allowed = {"bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr", "etc", "proc"}
    code = {Path(path).parts[1] for path in (*sys.path, sys.base_prefix) if path.startswith("/")}
    assert set(seen["root"]) <= allowed | code


def test_its_limits_are_set_for_good(probed: Probed) -> None:
    for limit, value in confinement.LIMITS.items():
        soft, hard = probed.seen["limits"][str(int(limit))]
        outer = resource.getrlimit(limit)[1]
        assert soft == hard == (value if outer == resource.RLIM_INFINITY else min(value, outer))
    assert probed.seen["memory"].startswith("MemoryError")


def test_it_stays_in_the_starters_place_but_not_in_its_session(place: Path) -> None:
    seen = probe(place, before=["taskset", "-c", "0", "nice", "-n", "7"])
    assert (seen["nice"], seen["processors"]) == (7, [0])
    # The starter, the converter's first process, and the one in its process namespace.
    assert seen["starters"] > 0 and len(seen["sessions"]) == 2 and seen["starters"] not in seen["sessions"]


# ends


def inside(peer_code: str) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    before = "import os, resource, socket, sys, time\npeer = socket.socket(fileno=int(sys.argv[1]))\n"
    return confinement.start(code=before + textwrap.dedent(peer_code))


def children_of(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def descendants(pid: int) -> list[int]:
    return [found for child in children_of(pid) for found in (child, *descendants(child))]


def processes_in(pid_namespace: str) -> list[str]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.readlink(f"/proc/{name}/ns/pid") == pid_namespace:
                    found.append(name)
            except OSError:
                continue
    return found


@pytest.fixture
def daemons() -> Iterator[tuple[socket.socket, subprocess.Popen[bytes], str]]:
    """A converter that ignores everything and has left children in sessions of their own; and its pid namespace."""
    peer, process = inside(
        """
        import signal
        for number in set(range(1, 65)) - {9, 19, 32, 33}:
            signal.signal(number, signal.SIG_IGN)
        for _ in range(3):
            if not os.fork():
                os.setsid()
                if os.fork():
                    os._exit(0)
                break
        else:
            peer.send(b"ready")
        while True:
            time.sleep(60)
        """
    )
    assert peer.recv(9) == b"ready"
    (first,) = children_of(process.pid)
    namespace = os.readlink(f"/proc/{first}/ns/pid")
    wait_until(lambda: len(processes_in(namespace)) >= 4, what="the daemons")
    yield peer, process, namespace
    peer.close()
    process.wait(20)


@pytest.mark.parametrize("end", ["close", "shutdown", "kill supervisor", "kill program"])
def test_nothing_of_it_outlives_its_socket_or_its_supervisor(
    daemons: tuple[socket.socket, subprocess.Popen[bytes], str], end: str
) -> None:
    peer, process, namespace = daemons
    if end == "close":
        peer.close()
    elif end == "shutdown":
        peer.shutdown(socket.SHUT_WR)
    else:
        os.kill(process.pid if end == "kill supervisor" else children_of(process.pid)[0], signal.SIGKILL)
    wait_until(lambda: not processes_in(namespace), what="the end of all of it")
    process.wait(20)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("resource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile True: pass", "killed by SIGKILL"),
        ("import ctypes; ctypes.string_at(1)", "killed by SIGSEGV"),
        ("os.abort()", "killed by SIG"),
        ("import ctypes; ctypes.CDLL(None).syscall(0x40000000)", "killed by SIGSYS"),
    ],
)
def test_every_violent_end_is_told(code: str, says: str) -> None:
    if "0x40000000" in code and os.uname().machine != "x86_64":
        pytest.skip("x32 is of x86_64")
    peer, process = inside(code)
    with peer:
        untrusted = peer.recv(9999)
    assert says in json.loads(untrusted[1:])["message"]
    assert process.wait(20) == 1


# a conversion whose processes are looked at, or killed

LAYERS = (tar(file("a", b"1" * 5000)), tar(file("b", os.urandom(8 << 20))))


def with_writer(place: Path, look: Callable[[int], Any]) -> Any:
    """What ``look`` finds at the supervisor of a conversion that has read one layer and waits for the other."""
    described = []
    for number, layer in enumerate(LAYERS):
        (place / f"layer{number}").write_bytes(layer)
        described.append(LayerBlob(digest=digest_of(layer), size=len(layer), diff_id=digest_of(layer)))
    image = SourceImage(
        digest=digest_of(b""),
        platform=Platform(os="linux", architecture="amd64"),
        config=ImageConfig(),
        layers=tuple(described),
    )
    workspace = place / "workspace"
    workspace.mkdir(mode=0o700)
    before = set(children_of(os.getpid()))
    seen: list[Any] = []

    def open_blob(layer: LayerBlob) -> io.FileIO:
        if layer is described[1]:
            (supervisor,) = set(children_of(os.getpid())) - before
            wait_until(lambda: writers_of(supervisor), what="a writer")
            seen.append(look(supervisor))
        return io.FileIO(place / f"layer{described.index(layer)}")

    try:
        convert(image, open_blob, str(workspace), ProgressReport(lambda _: None))
    except ConversionFailed:
        assert not os.listdir(workspace)
        raise
    finally:
        assert set(children_of(os.getpid())) == before
    (found,) = seen
    return found


def writers_of(supervisor: int) -> list[int]:
    """Not the one that is only asked what it can do."""
    found = []
    for pid in descendants(supervisor):
        # One that has just ended is none.
        with contextlib.suppress(OSError):
            if b"tar2sqfs\0--quiet" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def test_the_writer_is_confined_as_well(place: Path) -> None:
    def look(supervisor: int) -> tuple[dict[str, list[str]], list[str], dict[str, str]]:
        (pid,) = writers_of(supervisor)
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        targets = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
        namespaces = {name: os.readlink(f"/proc/{pid}/ns/{name}") for name in PRIVATE}
        return {key: value.split() for key, _, value in (line.partition(":") for line in lines)}, targets, namespaces

    status, targets, namespaces = with_writer(place, look)
    assert status["Uid"] == status["Gid"] == ["65534"] * 4
    assert status["Groups"] == []
    assert [status[key] for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")] == [["0" * 16]] * 5
    assert (status["NoNewPrivs"], status["Seccomp"]) == (["1"], ["2"])
    assert {target.split(":")[0] for target in targets} == {"pipe", str(place / "workspace/root.squashfs")}
    assert all(namespaces[name] != os.readlink(f"/proc/self/ns/{name}") for name in PRIVATE)


def test_it_can_open_no_file_and_start_no_process_once_it_reads(place: Path) -> None:
    """The filter that the converter installs when its writer runs."""

    def look(supervisor: int) -> bool:
        status = Path(f"/proc/{children_of(supervisor)[0]}/status")
        return wait_until(lambda: "Seccomp_filters:\t2" in status.read_text(), what="the second filter")

    assert with_writer(place, look)


def test_what_others_of_its_account_run_cannot_trace_it(place: Path) -> None:
    def look(supervisor: int) -> list[str]:
        (converter,) = children_of(supervisor)
        argv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat", f"/proc/{converter}/environ"]
        return [subprocess.run(argv, capture_output=True, text=True).stderr]

    assert "Permission denied" in with_writer(place, look)[0]


@pytest.mark.parametrize(
    ("victim", "says"),
    [
        ("writer", "tar2sqfs was killed by SIGKILL"),
        ("converter", "the converter was killed by SIGKILL"),
        ("supervisor", "ended without an answer"),
    ],
)
def test_whoever_is_killed_the_puller_has_an_error_and_nothing_is_left(place: Path, victim: str, says: str) -> None:
    def kill(supervisor: int) -> None:
        pids = {"writer": writers_of(supervisor), "converter": children_of(supervisor), "supervisor": [supervisor]}
        os.kill(pids[victim][0], signal.SIGKILL)

    with pytest.raises(ConversionFailed, match=says):
        with_writer(place, kill)


def test_one_that_is_stopped_is_given_up(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = Converter.run.__kwdefaults__ or {}
    monkeypatch.setitem(defaults, "silence_max", 1.0)

    def stop(supervisor: int) -> None:
        os.kill(children_of(supervisor)[0], signal.SIGSTOP)

    with pytest.raises(ConversionFailed, match="no progress for 1 seconds"):
        with_writer(place, stop)


# two accounts: root starts the converter, the store's owner pulls

PULLER = """
import io, os, socket, sys, time
from hpcctr.image.conversion import convert
from hpcctr.image.progress import ProgressReport
from hpcctr.image.record import ImageConfig, Platform
from hpcctr.image.source import LayerBlob, SourceImage
from tests.support.oci import digest_of
peer, workspace, *paths = sys.argv[1:]
layers = []
for path in paths:
    content = open(path, "rb").read()
    layers.append(LayerBlob(digest=digest_of(content), size=len(content), diff_id=digest_of(content)))
platform = Platform(os="linux", architecture="amd64")
image = SourceImage(digest=digest_of(b""), platform=platform, config=ImageConfig(), layers=tuple(layers))
def open_blob(layer):
    if layer is layers[-1]:
        print("ready", flush=True)
        sys.stdin.readline()
    return io.FileIO(paths[layers.index(layer)])
file, facts = convert(
    image, open_blob, workspace, ProgressReport(lambda _: None), worker=socket.socket(fileno=int(peer))
)
print(file.digest, facts.entries)
"""


@pytest.fixture
def puller(place: Path, alice: User) -> Iterator[tuple[subprocess.Popen[str], Path, int]]:
    """One of the user's, which waits with the last layer; its workspace, and the supervisor of its converter."""
    workspace = place / "workspace"
    workspace.mkdir(mode=0o700)
    os.chown(workspace, alice.uid, alice.gid)
    paths = []
    for number, layer in enumerate(LAYERS):
        paths.append(place / f"layer{number}")
        paths[-1].write_bytes(layer)
        paths[-1].chmod(0o644)
    before = set(children_of(os.getpid()))
    with confinement.spawn() as peer:
        (supervisor,) = set(children_of(os.getpid())) - before
        process = subprocess.Popen(
            [sys.executable, "-c", PULLER, str(peer.fileno()), workspace, *paths],
            user=alice.uid,
            group=alice.gid,
            extra_groups=[],
            pass_fds=[peer.fileno()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env={"PYTHONPATH": os.pathsep.join(sys.path)},
        )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        wait_until(lambda: writers_of(supervisor), what="a writer")
        yield process, workspace, supervisor
        process.kill()
    wait_until(lambda: not Path(f"/proc/{supervisor}").exists(), what="the end of the supervisor")


def test_an_unprivileged_puller_gets_a_file_that_is_its_own_alone(
    puller: tuple[subprocess.Popen[str], Path, int], alice: User
) -> None:
    process, workspace, supervisor = puller
    output = workspace / "root.squashfs"
    for pid in (*children_of(supervisor), *writers_of(supervisor)):
        assert "Uid:\t65534\t65534\t65534\t65534\n" in Path(f"/proc/{pid}/status").read_text()
    answer, _ = process.communicate("\n", timeout=60)
    digest, entries = answer.split()
    assert entries == "3"
    assert digest == digest_of(output.read_bytes())
    status = output.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (alice.uid, alice.gid, 0o644)


def test_a_converter_ends_with_a_puller_that_is_killed(puller: tuple[subprocess.Popen[str], Path, int]) -> None:
    process, _, supervisor = puller
    pids = [supervisor, *descendants(supervisor)]
    process.kill()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), what="the end of the converter")


# libraries that are made to be read wrongly


def bombs() -> list[bytes]:
    """ELF files that claim all that a header can claim: tables without end, loops of versions, names everywhere."""
    good = library("libbomb.so.1", "BOMB_1.0", "BOMB_1.1")
    found = []
    for at in (32, 40, 54, 56):
        # e_phoff, e_shoff, e_phentsize, e_phnum
        claimed = bytearray(good)
        claimed[at : at + 2] = b"\xff\xff"
        found.append(bytes(claimed))
    dynamic = good.index((0x6FFFFFFC).to_bytes(8, "little"))
    for value in (0, 1 << 63, len(good) - 1):
        claimed = bytearray(good)
        claimed[dynamic + 8 : dynamic + 16] = value.to_bytes(8, "little")
        found.append(bytes(claimed))
    number = good.index((0x6FFFFFFD).to_bytes(8, "little"))
    claimed = bytearray(good)
    claimed[number + 8 : number + 16] = b"\xff" * 8
    definitions = good.index(b"\x01\x00\x01\x00\x01\x00\x01\x00")
    # vd_next: the same one again and again.
    claimed[definitions + 16 : definitions + 20] = bytes(4)
    found.append(bytes(claimed))
    texts = (
        b"\x7fELF" + b"\0" * 60 + b"MPI_Init\0MPICH Version\0" + b"\x001:1:1\0" * 400_000 + b"(PMIx Standard" * 100_000
    )
    return [*found, texts, good[:64] + b"\0" * (4 << 20)]


def test_libraries_that_are_bombs_cost_no_more_than_their_bytes(place: Path) -> None:
    names = ("libbomb.so.1", "libmpi.so.12", "libpmix.so.2", "libc.so.6", "libopen-pal.so.40")
    members = [
        file(f"usr/lib/{number}/{name}", content)
        for number, content in enumerate(bombs() * 30)
        for name in names
        if len(content) < 1 << 20 or number < 12
    ]
    members += [symlink(f"lib/liblink{number}.so.1", f"../usr/lib/{number % 9}/libbomb.so.1") for number in range(5000)]
    told = b"".join(b"/usr/lib/%d\n" % number for number in range(300))
    members += [file("etc/ld.so.conf", told + b"include /etc/ld.so.conf\ninclude *\n" * 300)]
    layer = tar(*members)
    (place / "layer").write_bytes(layer)
    image = SourceImage(
        digest=digest_of(b""),
        platform=Platform(os="linux", architecture="amd64"),
        config=ImageConfig(),
        layers=(LayerBlob(digest=digest_of(layer), size=len(layer), diff_id=digest_of(layer)),),
    )
    (place / "workspace").mkdir(mode=0o700)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _, facts = convert(
        image, lambda _: io.FileIO(place / "layer"), str(place / "workspace"), ProgressReport(lambda _: None)
    )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert facts.facts is not None and not facts.facts.libraries
    assert used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime < 20
