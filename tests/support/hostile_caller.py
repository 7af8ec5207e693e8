"""A hostile caller: a client of the engine in a few words of Python, which a test tells what to do as it goes.

The code of an attack finds PRELUDE's functions: it dials, asks with the request it was given, and goes in.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

from hpcctr.errand import Errand
from hpcctr.request import ExecRequest, LaunchRequest
from tests.support.node import Node, node
from tests.support.polling import wait_until
from tests.support.scratch import scratch
from tests.support.users import User

PRELUDE = """
import array, ctypes, errno, os, platform, signal, socket, struct, subprocess, sys, threading, time
sys.path.insert(0, sys.argv[1])
from hpcctr.client import carry, enter
from hpcctr.wire import ENGINE_SOCKET, Frame
REQUEST = bytes.fromhex(sys.argv[2])
UID, GID, GROUPS = int(sys.argv[3]), int(sys.argv[4]), [int(word) for word in sys.argv[5].split(",")]
ENTER = sys.argv[6]
words = sys.argv[7:]
libc = ctypes.CDLL(None, use_errno=True)
IS_X86 = platform.machine() == "x86_64"
CLONE_NEWUSER = 0x10000000

def done(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def call(x86, other, *arguments):
    # Of this thread alone: the C library's functions change all threads.
    return done(libc.syscall(x86 if IS_X86 else other, *map(ctypes.c_long, arguments)))

def set_ids(real, effective, saved, group=None):
    if group is not None:
        call(119, 149, group, group, group)
    call(117, 147, real, effective, saved)

def become(uid=UID, gid=GID, groups=GROUPS):
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)

def prctl(*arguments):
    done(libc.prctl(*map(ctypes.c_ulong, (*arguments, 0, 0, 0, 0)[:5])))

def capset(effective, permitted, inheritable=0):
    done(libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", effective, permitted, inheritable, 0, 0, 0)))

def seqpacket():
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

def dial():
    sock = seqpacket()
    sock.connect(ENGINE_SOCKET)
    return sock

def ask(sock):
    try:
        sock.send(REQUEST)
        reply = Frame.unpack(sock.recv(65536))
    except OSError as error:
        return errno.errorcode[error.errno]
    return f"refused {reply.text('slug')}" if reply.verb == "error" else reply.verb

def answer(sock):
    # Whatever comes of asking for a namespace.
    packet, descriptors, _, _ = socket.recv_fds(sock, 5000, 4)
    return f"{len(descriptors)} descriptors {packet[1:]!r}"

def go_in(sock, *command):
    number = os.dup(sock.fileno())
    os.set_inheritable(number, True)
    # /proc as the kernel has it is all that the view needs.
    plan = enter.plan(number, [], b"/", list(command or (b"echo", b"inside")), b"/bin", kernel_trees=carry.KERNEL_TREES)
    os.execve(ENTER, plan, {})

def say(*words):
    print(*words, flush=True)

def is_zombie(pid):
    return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] == "Z"

def until(condition):
    late = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < late
        time.sleep(0.01)

def with_number(number, work):
    # A process whose pid is `number`, which runs `work`: the kernel gives the number after ns_last_pid. The machine is
    # shared, so another process may be quicker.
    for _ in range(500):
        open("/proc/sys/kernel/ns_last_pid", "w").write(str(number - 1))
        pid = os.fork()
        if pid == 0:
            if os.getpid() == number:
                work()
            os._exit(0)
        if pid == number:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.waitpid(pid, 0)
    raise SystemExit("the number could not be had again")
"""

NUMBER_IS_GONE = b"the number could not be had again"

REFUSED = "refused caller-refused\n"
"""What an attack says that asked and was refused for who it is."""


@contextlib.contextmanager
def asked_node(image: str) -> Iterator[Node]:
    """A node with ``image`` in its store and limits in nobody's way; its engine may come to no traceback."""
    limits = "[limits]\nsessions = 200\nsessions-per-uid = 100\n"
    with scratch("asked") as place, node(place, linger_seconds=600, more=limits) as made:
        made.pull(image)
        yield made
        assert "Traceback" not in made.engine.log()


@contextlib.contextmanager
def requests_of(node: Node, user: User, image: str) -> Iterator[dict[str, bytes]]:
    """One request of each verb, all of which ``user`` may make: verb to packet."""
    program = node.popen(
        "run", image, "--", "sh", "-c", "echo; exec cat", user=user, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert program.stdout is not None and program.stdout.readline() == b"\n"
    yield {
        "run": LaunchRequest(image=image).frame().pack(),
        "exec": ExecRequest(pid=program.pid).frame().pack(),
        "store": Errand(task="images").frame().pack(),
    }
    program.communicate()


def argv(node: Node, user: User, code: str, packet: bytes, *words: str) -> list[str]:
    import hpcctr

    packages = str(Path(hpcctr.__file__).parents[1])
    groups = ",".join(map(str, user.groups))
    facts = (packages, packet.hex(), str(user.uid), str(user.gid), groups, str(node.site.enter))
    return ["/usr/bin/python3", "-c", PRELUDE + textwrap.dedent(code), *facts, *words]


def attack(
    node: Node, user: User, code: str, packet: bytes, *words: str, as_root: bool = False, prefix: tuple[str, ...] = ()
) -> str:
    """What an attack prints, `code` run by ``user``, or by root with ``user`` as the account to take."""
    command = [*prefix, *argv(node, user, code, packet, *words)]
    for _ in range(5):
        done = node.host.run(command, user=None if as_root else user, cwd="/", check=False)
        # Another process of the machine's has taken the number, and keeps it: with another number, then.
        if NUMBER_IS_GONE not in done.stderr:
            break
    return done.stdout.decode() + (done.stderr.decode() if done.returncode not in (0, 126) else "")


def answers(node: Node, user: User, code: str, requests: Mapping[str, bytes], **options: object) -> dict[str, str]:
    """The answers, verb by verb."""
    return {verb: attack(node, user, code, packet, **options) for verb, packet in requests.items()}  # type: ignore[arg-type]


def all_of(requests: Mapping[str, bytes], text: str) -> dict[str, str]:
    return dict.fromkeys(requests, text)


@contextlib.contextmanager
def started(
    node: Node, user: User, code: str, packet: bytes, *words: str, as_root: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """An attack in several steps: it says a line when it is ready, and goes on when a line comes."""
    process = node.host.popen(
        argv(node, user, code, packet, *words),
        user=None if as_root else user,
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    yield process
    process.kill()
    process.communicate()


@contextlib.contextmanager
def stopped(node: Node) -> Iterator[None]:
    """The engine looks at nothing meanwhile."""
    pid = node.engine.process.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: state_of(pid) == "T")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def line_of(process: subprocess.Popen[bytes]) -> str:
    """The next line, within a time: byte by byte, as only what the kernel still has can be waited for."""
    assert process.stdout is not None
    line = b""
    while not line.endswith(b"\n"):
        assert select.select([process.stdout], [], [], 20)[0], f"no line came after {line!r}"
        byte = os.read(process.stdout.fileno(), 1)
        assert byte, process.communicate()[1].decode()
        line += byte
    return line.decode().strip()


def go_on(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"go\n")
    process.stdin.flush()
