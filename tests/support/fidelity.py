"""Comparing a process with the caller's own: the probe, started by an odd caller natively and through a launcher.

A report is what tests/probe/probe.c prints. Two reports of one caller are compared attribute by attribute; what differs
must be in :data:`REASONS`. `document` makes docs/fidelity.md out of what a run of tests/e2e/test_fidelity.py found.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import fnmatch
import hashlib
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpcctr.client import environment
from hpcctr.client.run import DIGEST_VARIABLE, IMAGE_VARIABLE
from tests.support.host import PATH, Host
from tests.support.images import CACHE
from tests.support.odd_caller import CALLERS, OddCaller
from tests.support.users import User

DOCUMENT = Path(__file__).parents[2] / "docs/fidelity.md"
SOURCE = Path(__file__).parents[1] / "probe/probe.c"
ODD_CALLER = Path(__file__).with_name("odd_caller.py")
Report = Mapping[str, str]

UNSTABLE = (
    "status.Tgid", "status.Ngid", "status.Pid", "status.PPid", "status.NStgid", "status.NSpid", "status.NSpgid",
    "status.NSsid", "status.Vm[PHRSDE]*", "status.VmLib", "status.Rss*", "status.voluntary_ctxt_switches",
    "status.nonvoluntary_ctxt_switches", "status.State",
)  # fmt: skip
"""Numbers that differ between two native runs: ids (`family` tells whether they are the caller's), sizes, counters."""


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why attributes differ."""

    attributes: tuple[str, ...]
    modes: tuple[str, ...]
    why: str

    def explains(self, attribute: str, mode: str) -> bool:
        return mode in self.modes and any(fnmatch.fnmatchcase(attribute, glob) for glob in self.attributes)


_BOTH = ("gateway", "direct")
REASONS = (
    Reason(
        attributes=("namespace.mnt", "view.root"),
        modes=_BOTH,
        why="The point of it: the root filesystem is the image's, in a mount namespace of the process's own.",
    ),
    Reason(
        attributes=("status.NoNewPrivs", "prctl.no_new_privs"),
        modes=_BOTH,
        why="Set by enter, so that no set-user-ID program of the image or of a carried directory gives anything.",
    ),
    Reason(
        attributes=("environ.all",),
        modes=_BOTH,
        why="PATH and other variables that describe the host's files are the image's, HPCCTR_IMAGE and "
        "HPCCTR_IMAGE_DIGEST are added (`hpcctr run --explain` shows all). All others are compared as environ.own.",
    ),
    Reason(
        attributes=("status.CapInh",),
        modes=("gateway",),
        why="enter gives up every capability it holds, and with its own the caller's inheritable ones; with "
        "no_new_privs they would have no effect.",
    ),
    Reason(
        attributes=("status.CapPrm", "status.CapEff", "confinement.unshare_mounts", "prctl.io_flusher",
                    "confinement.acct"),
        modes=("direct",),
        why="In a container root has no capability: what an image does as root is done to the image's view only.",
    ),
    Reason(
        attributes=("family.flags",),
        modes=("gateway",),
        why="The kernel's mark that this process has once used a capability (PF_SUPERPRIV, process accounting's "
        "column S): enter did, before it gave them up.",
    ),
    Reason(
        attributes=("personality", "proc.personality", "memory.addresses", "memory.stack_protection", "family.flags"),
        modes=("direct",),
        why="The kernel clears parts of the personality (no random addresses among them) whenever root without "
        "capabilities executes a program (cap_bprm_creds_from_file, security/commoncap.c), and sets PF_RANDOMIZE then.",
    ),
    Reason(
        attributes=("family.process", "family.start_time", "family.parent"),
        modes=("direct",),
        why="Root's command is a child of hpcctr, which takes the container down after it.",
    ),
    Reason(
        attributes=("signal.pending", "status.SigPnd", "status.ShdPnd", "timer.*", "locks", "prctl.child_subreaper",
                    "scheduling.flags", "scheduling.policy", "status.FDSize"),
        modes=("direct",),
        why="A child does not inherit these (fork(2)): pending signals, timers, record locks, the role of subreaper, "
        "a policy to be reset on fork, the size of the descriptor table. They are the hpcctr process's still.",
    ),
)  # fmt: skip


def probe() -> Path:
    """The compiled probe, static, in a directory everyone may walk through."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:20]
    target = CACHE / "probe" / digest / "probe"
    if not target.exists():
        target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        unfinished = target.with_name(f"probe.{os.getpid()}")
        flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static"]
        done = subprocess.run(["gcc", *flags, "-o", unfinished, SOURCE], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        unfinished.replace(target)
    return target


# ---- one run ----


class NoReport(AssertionError):
    """The probe did not run; the text is what the launcher said, `status` how it ended."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"status {status}: {said}")
        self.status = status
        self.said = said


@dataclass(kw_only=True)
class Place:
    """What the runs of one caller share: the probe, the FIFO for its report, and every object it is handed."""

    directory: Path
    host: Host
    stack: contextlib.ExitStack
    holder: subprocess.Popen[bytes]
    cgroups: tuple[Path, ...]
    held: dict[int, int] = field(default_factory=dict)

    @property
    def report(self) -> Path:
        return self.directory / "report"

    @property
    def probe(self) -> Path:
        return self.directory / "probe"


@contextlib.contextmanager
def place(directory: Path, host: Host) -> Iterator[Place]:
    """Make what the runs share. `directory` must be one that launches carry in by themselves."""
    with contextlib.ExitStack() as stack:
        (directory / "probe").write_bytes(probe().read_bytes())
        (directory / "probe").chmod(0o755)
        os.mkfifo(directory / "report")
        (directory / "report").chmod(0o622)
        (directory / "tmp").mkdir()
        (directory / "tmp").chmod(0o1777)
        (directory / "lock").write_bytes(b"x" * 100)
        (directory / "lock").chmod(0o666)
        holder = host.popen(["unshare", "--ipc", "--net", "--cgroup", "sleep", "infinity"])
        stack.callback(holder.wait)
        stack.callback(holder.kill)
        made = Place(
            directory=directory, host=host, stack=stack, holder=holder, cgroups=tuple(_cgroups(host, directory.name))
        )
        for cgroup in made.cgroups:
            cgroup.mkdir()
            stack.callback(_remove_cgroup, cgroup)
        yield made


def _cgroups(host: Host, name: str) -> Iterator[Path]:
    """Groups of our own to make, as outside paths: in cgroup2, and where the host has it in a v1 hierarchy."""
    points = {mount.target: mount.kind for mount in host.mounts()}
    for point, kind in points.items():
        # Not those that another mount hides.
        if host.path(point).is_dir() and (kind == "cgroup2" or (kind == "cgroup" and point.endswith("/pids"))):
            yield host.path(point) / f"hpcctr-{name}"


def _remove_cgroup(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.rmdir()


def hold(made: Place) -> None:
    """Open one of every kind, at a number of its own; every run gets the very same ones."""
    plain = made.directory / "held"
    plain.write_bytes(b"0123456789")
    made.stack.callback(plain.unlink)
    libc = ctypes.CDLL(None, use_errno=True)
    first, second = socket.socketpair()
    read, write = os.pipe()
    os.set_blocking(write, False)
    memory = os.memfd_create("fidelity", os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, 4096)
    os.lseek(memory, 77, os.SEEK_SET)
    fcntl.fcntl(memory, 1033, 1)  # F_ADD_SEALS, F_SEAL_SEAL
    gone = os.open(made.directory / "gone", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    (made.directory / "gone").unlink()
    opened = [
        os.open(plain, os.O_RDWR | os.O_APPEND),
        os.open(plain, os.O_RDONLY | os.O_NONBLOCK),
        os.open(plain, os.O_WRONLY | os.O_SYNC),
        os.open(made.directory, os.O_RDONLY | os.O_DIRECTORY),
        os.open(made.directory, os.O_PATH),
        os.open("/proc/self/status", os.O_RDONLY),
        gone, read, write, first.detach(), second.detach(), memory,
        os.eventfd(3), libc.epoll_create1(0), os.pidfd_open(made.holder.pid),
        libc.inotify_init1(0), libc.timerfd_create(1, 0),
    ]  # fmt: skip
    os.lseek(opened[0], 4, os.SEEK_SET)
    os.lseek(opened[1], 9, os.SEEK_SET)
    fcntl.fcntl(read, fcntl.F_SETPIPE_SZ, 8192)
    for place_, descriptor in enumerate(opened):
        # Out of the way of the numbers that starting a program uses, and one far up.
        number = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 700 if place_ == 0 else 40 + 3 * place_)
        os.close(descriptor)
        made.held[number] = number
        made.stack.callback(os.close, number)


@dataclass(kw_only=True)
class Stdio:
    """Descriptors 0, 1 and 2 of runs; the same objects for all runs of a caller."""

    numbers: tuple[int, int, int]
    log: Path


@contextlib.contextmanager
def stdio(caller: OddCaller, made: Place) -> Iterator[Stdio]:
    """Open what the caller is to have. A controlling terminal ends with its session: each run needs a new one."""
    with contextlib.ExitStack() as stack:

        def kept(descriptor: int) -> int:
            stack.callback(os.close, descriptor)
            return descriptor

        log = made.directory / "log"
        stack.callback(log.unlink)
        to_log = kept(os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC, 0o600))
        if caller.stdio in ("terminal", "controlling terminal"):
            main, sub = map(kept, pty.openpty())
            os.set_blocking(main, False)
            numbers = (sub, sub, sub)
        elif caller.stdio == "socket":
            ours, its = socket.socketpair()
            kept(ours.detach())
            number = kept(its.detach())
            numbers = (number, number, number)
        elif caller.stdio == "pipe":
            (read, _), (_, write) = [tuple(map(kept, os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC))) for _ in range(2)]
            numbers = (read, write, write)
        else:
            numbers = (kept(os.open("/dev/null", os.O_RDONLY)), to_log, to_log)
        yield Stdio(numbers=numbers, log=log)


def report_of(
    made: Place,
    name: str,
    launcher: Sequence[str],
    *,
    user: User | None,
    streams: Stdio,
    env: Mapping[str, str],
    forbidden: Path,
    program: str | None = None,
    timeout: float = 60,
) -> Report:
    """What the probe reports when the odd caller NAME starts it with LAUNCHER before it; natively for no words."""
    caller = CALLERS[name]
    uid, gid, groups = (0, 0, (0,)) if user is None else (user.uid, user.gid, user.groups)
    words = [str(uid), str(made.directory / "tmp"), str(made.holder.pid), ":".join(map(str, made.cgroups))]
    words += [str(made.directory / "lock"), str(gid), ",".join(map(str, groups))]
    base = {} if caller.bare_environment else made.host.environment(user, None)
    about = {"PROBE_REPORT": str(made.report), "PROBE_FORBIDDEN": str(forbidden)}
    variables = [os.fsencode(f"{key}={value}") for key, value in {**base, **env, **about}.items()]
    # The odd caller searches no PATH: it has the environment of the test only later.
    found = [shutil.which(word, path=PATH) or word for word in launcher[:1]]
    command = [*map(os.fsencode, (*found, *launcher[1:])), os.fsencode(program or made.probe), *caller.arguments]
    argv = [b"/usr/bin/python3", b"-IS", os.fsencode(ODD_CALLER), name.encode(), *map(os.fsencode, words), b"--"]
    argv += [*variables, *caller.environment, b"--", *command]
    fifo = os.open(made.report, os.O_RDWR | os.O_NONBLOCK)
    try:
        # The whole report fits: nobody has to read while the probe runs.
        fcntl.fcntl(fifo, fcntl.F_SETPIPE_SZ, 1 << 20)
        process = subprocess.Popen(
            [*map(os.fsencode, made.host.argv([], cwd=made.directory)), *argv],
            env=made.host.environment(None, None),
            stdin=streams.numbers[0],
            stdout=streams.numbers[1],
            stderr=streams.numbers[2],
            pass_fds=list(made.held),
            start_new_session=True,
        )
        status = _end_of(process, timeout)
        raw = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                raw += os.read(fifo, 1 << 20)
    finally:
        os.close(fifo)
    if not raw:
        raise NoReport(status, streams.log.read_text(errors="replace"))
    return _parse(raw)


def _end_of(process: subprocess.Popen[bytes], seconds: float) -> int:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise AssertionError(f"still running after {seconds} s: {process.args!r}") from None


def _parse(raw: bytes) -> Report:
    found: dict[str, str] = {}
    entries: list[str] = []
    for line in raw.decode("ascii").splitlines():
        name, _, value = line.partition(" ")
        if name.startswith("environ."):
            entries.append(value)
        else:
            assert name not in found, name
            found[name] = value
    found["environ.all"] = " ".join(entries)
    found["environ.own"] = " ".join(entry for entry in entries if _is_callers_own(entry))
    # The number is the session's, which each run has anew.
    found["scheduling.autogroup"] = re.sub(r"autogroup-\d+", "autogroup", found["scheduling.autogroup"])
    # Signals queued for the whole user, and how many may be.
    found["status.SigQ"] = found["status.SigQ"].partition("/")[2]
    return found


#: IMAGE_VARIABLE is in the image of the tests.
_NOT_THE_CALLERS = environment.Globs(
    (*environment.OF_THE_HOST, IMAGE_VARIABLE, DIGEST_VARIABLE, b"PYTHONNOUSERSITE", b"IMAGE_VARIABLE")
)


def _is_callers_own(entry: str) -> bool:
    name = entry.partition("=")[0].encode()
    return name not in _NOT_THE_CALLERS


# ---- comparing ----


def is_unstable(attribute: str) -> bool:
    return any(fnmatch.fnmatchcase(attribute, glob) for glob in UNSTABLE)


def compared(native: Report, new_each_time: Iterable[str] = ()) -> list[str]:
    """The attributes that can be equal."""
    return [name for name in native if not is_unstable(name) and name not in new_each_time]


def differences(native: Report, inside: Report, new_each_time: Iterable[str] = ()) -> dict[str, str]:
    """Attribute to both values, for all that are not equal."""
    names = dict.fromkeys([*compared(native, new_each_time), *compared(inside, new_each_time)])
    return {
        name: f"natively {native.get(name, 'absent')!r}, inside {inside.get(name, 'absent')!r}"
        for name in names
        if native.get(name) != inside.get(name)
    }


def unexplained(found: Mapping[str, str], mode: str) -> dict[str, str]:
    """Those of `differences` that are in nobody's row of the table."""
    return {
        name: values for name, values in found.items() if not any(reason.explains(name, mode) for reason in REASONS)
    }


# ---- docs/fidelity.md ----


@dataclass(kw_only=True)
class Findings:
    """What a run of all callers in all modes found."""

    #: (attribute, mode) of everything that differed, and of every launch that was refused its slug.
    differed: set[tuple[str, str]] = field(default_factory=set)
    refused: dict[tuple[str, str], str] = field(default_factory=dict)
    equal: set[tuple[str, str]] = field(default_factory=set)
    attributes: tuple[str, ...] = ()

    def is_complete(self) -> bool:
        wanted = {(name, mode) for name, caller in CALLERS.items() for mode in caller.modes}
        return wanted <= self.equal | set(self.refused)


_HEAD = """# Fidelity

A program started by hpcctr is the caller's own process. `tests/e2e/test_fidelity.py` proves it: a probe
(`tests/probe/probe.c`) runs natively and through hpcctr, from the same deliberately odd callers, as an ordinary user
through the gateway and as root in direct mode, with runc where both versions of cgroups are mounted and with crun where
only version 2 is. Every attribute must be equal, or is in the first table. This document is written by that test; the
test compares it with what it found.

Python, in which hpcctr's client is written, ignores SIGPIPE and SIGXFSZ at its start, and the kernel clears the parent
death signal and parts of the personality when a program with capabilities starts. The command gets all of them back:
the start script of hpcctr begins with `#!…/front …/python`, and front, a small static program
(`src/hpcctr/client/front.c`), notes the signals before Python runs; the personality is read from /proc. Behind pip's
own start script, before `hpcctr engine install`, the two signals get their default action and the parent death signal
is lost; `hpcctr doctor` says so. front costs a launch 70 µs (Linux 6.18, median of 3000 starts with and without it in
turns).

`scripts/fidelity` compares hpcctr with `ctr run`, `podman run` and `ch-run` in the same way.
"""


def document(findings: Findings) -> str:
    """docs/fidelity.md."""
    lines = [_HEAD, "## What differs, and why", "", "| Attribute | Gateway | Direct | Why |", "|---|---|---|---|"]
    for reason in REASONS:
        rows: dict[tuple[str, str], list[str]] = {}
        for attribute in sorted({name for name, mode in findings.differed if reason.explains(name, mode)}):
            gateway, direct = (
                "differs" if mode in reason.modes and (attribute, mode) in findings.differed else "equal"
                for mode in _BOTH
            )
            rows.setdefault((gateway, direct), []).append(f"`{attribute}`")
        lines += [f"| {', '.join(names)} | {marks[0]} | {marks[1]} | {reason.why} |" for marks, names in rows.items()]
    lines += ["", "## Callers", "", "Equal: every attribute but those above.", ""]
    lines += ["| Caller | Gateway | Direct |", "|---|---|---|"]
    for name, caller in CALLERS.items():
        cells = []
        for mode in _BOTH:
            slug = findings.refused.get((name, mode))
            cells.append(f"refused, `{slug}`" if slug else "equal" if (name, mode) in findings.equal else "–")
        lines.append(f"| {caller.what} | {cells[0]} | {cells[1]} |")
    lines += ["", "## What is compared", "", "Every line of /proc/self/status but ids, sizes and counters, and:", ""]
    groups: dict[str, list[str]] = {}
    for attribute in findings.attributes:
        group, _, rest = attribute.partition(".")
        if group not in ("status", "descriptor"):
            groups.setdefault(group, []).append(rest)
    groups["descriptor"] = [
        "leads_to", "identity", "offset", "flags", "close_on_exec", "signal", "lease", "seals", "pipe_size", "socket",
        "terminal",
    ]  # fmt: skip
    for group, names in sorted(groups.items()):
        lines.append(f"- `{group}`" + (": " + ", ".join(names) if any(names) else ""))
    return "\n".join(lines) + "\n"


def landlock_version() -> int:
    """Of the running kernel; 0 without it (landlock_create_ruleset(2))."""
    return max(0, int(ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint(1))))
