"""Callers that are deliberately odd. Imported for the list of them; as a program, started by root, it becomes one:

    python3 -IS odd_caller.py NAME UID:GID:GROUP,… WORD… -- ENVIRONMENT… -- COMMAND…

First what needs root is done, then the account is taken (`-`: root's), then the rest, last COMMAND is executed with
ENVIRONMENT (NAME=VALUE words, as they are: twice, without "=", not text). PROBE_CALLER is added, which tells the probe
who its caller was. What Python itself changed at its start is put back before.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import resource
import signal
import struct
import sys
import termios
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

_LIBC = ctypes.CDLL(None, use_errno=True)
_IS_X86 = platform.machine() == "x86_64"
_NR_SET_MEMPOLICY = 238 if _IS_X86 else 237
_NR_IOPRIO_SET = 251 if _IS_X86 else 30
_NR_KEYCTL = 250 if _IS_X86 else 219
_NR_SECCOMP = 317 if _IS_X86 else 277
_NR_ACCT = 163 if _IS_X86 else 89
_NR_SCHED_SETATTR = 314 if _IS_X86 else 274
_NR_EXECVE = 59 if _IS_X86 else 221
_NR_LANDLOCK_CREATE, _NR_LANDLOCK_ADD, _NR_LANDLOCK_RESTRICT = 444, 445, 446
_CLONE_NEWNS, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x20000, 0x1000, 0x4000, 0x40000
_ALL = 1 << 64


def _done(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _call(number: int, *arguments: int | bytes | None) -> int:
    return _done(_LIBC.syscall(number, *[ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]))


def _prctl(*arguments: int) -> int:
    padded = (*arguments, 0, 0, 0, 0)[:5]
    return _done(_LIBC.prctl(ctypes.c_int(padded[0]), *map(ctypes.c_ulong, padded[1:])))


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    _done(_LIBC.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()))


@dataclass(frozen=True, kw_only=True)
class OddCaller:
    """One odd caller. What its functions change is changed in a process that then becomes the launcher."""

    what: str
    #: Done while still root, and done with the caller's own rights. Both get WORD….
    as_root: Callable[[list[str]], None] | None = None
    as_caller: Callable[[list[str]], None] | None = None
    #: Which modes it makes sense in.
    modes: tuple[str, ...] = ("gateway", "direct")
    #: Mode to slug, where the launch has to be refused.
    refused: dict[str, str] = field(default_factory=dict)
    #: Attributes that are new with each run of this caller, natively as well.
    new_each_time: tuple[str, ...] = ()
    arguments: tuple[bytes, ...] = ()
    environment: tuple[bytes, ...] = ()
    #: True: nothing but ENVIRONMENT above.
    bare_environment: bool = False
    #: What the test gives it as descriptors 0, 1 and 2, and beside them.
    stdio: Literal["files", "socket", "pipe", "terminal", "controlling terminal"] = "files"
    holds_descriptors: bool = False
    #: The test mounts such a /proc on the host.
    hides_processes: bool = False
    #: Lowest version of Landlock it needs.
    landlock: int = 0


def _umask(_: list[str]) -> None:
    os.umask(0o137)


def _nice(_: list[str]) -> None:
    os.nice(7)


def _policy(policy: int, priority: int = 0) -> Callable[[list[str]], None]:
    return lambda _: os.sched_setscheduler(0, policy, os.sched_param(priority))


def _reset_on_fork(_: list[str]) -> None:
    os.sched_setscheduler(0, os.SCHED_BATCH | os.SCHED_RESET_ON_FORK, os.sched_param(0))


def _io_priority(value: int) -> Callable[[list[str]], None]:
    def change(_: list[str]) -> None:
        _call(_NR_IOPRIO_SET, 1, 0, value)

    return change


def _affinity(_: list[str]) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def _memory_policy(mode: int) -> Callable[[list[str]], None]:
    def change(_: list[str]) -> None:
        _call(_NR_SET_MEMPOLICY, mode, struct.pack("Q", 1), 64)

    return change


def _personality(value: int) -> Callable[[list[str]], None]:
    def change(_: list[str]) -> None:
        _done(_LIBC.personality(ctypes.c_ulong(value)))

    return change


def _write(path: str, text: str) -> Callable[[list[str]], None]:
    def change(_: list[str]) -> None:
        Path(path).write_text(text)

    return change


def _own_loginuid(words: list[str]) -> None:
    Path("/proc/self/loginuid").write_text(words[0])


LOWERED = {
    "CPU": (500, 600),
    "FSIZE": (1 << 30, 1 << 31),
    "DATA": (3 << 30, 4 << 30),
    "STACK": (4 << 20, 5 << 20),
    "CORE": (0, 4096),
    "RSS": (1 << 30, 1 << 31),
    "NPROC": (5000, 6000),
    "NOFILE": (100, 200),
    "MEMLOCK": (0, 4096),
    "AS": (4 << 30, 5 << 30),
    "LOCKS": (7, 8),
    "SIGPENDING": (10, 20),
    "MSGQUEUE": (1000, 2000),
    "NICE": (3, 4),
    "RTPRIO": (5, 6),
    "RTTIME": (1000000, 2000000),
}
"""Resource limits of a careful site, soft and hard."""
_UNNAMED_LIMITS = {"LOCKS": 10, "RTTIME": 15}


def _lower_limits(_: list[str]) -> None:
    for name, limit in LOWERED.items():
        number: int = getattr(resource, f"RLIMIT_{name}", _UNNAMED_LIMITS.get(name, -1))
        hard = resource.getrlimit(number)[1]
        # No limit can be raised, not even by root where a sandbox took CAP_SYS_RESOURCE.
        most = max(limit) if hard == resource.RLIM_INFINITY else hard
        resource.setrlimit(number, (min(limit[0], most), min(limit[1], most)))


def _no_files(_: list[str]) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def _few_descriptors(_: list[str]) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))


def _ignore(*numbers: int) -> Callable[[list[str]], None]:
    def change(_: list[str]) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)

    return change


_CAN_BE_IGNORED = tuple(number for number in range(1, 65) if number not in (9, 19, 32, 33))


def _block_all(_: list[str]) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _CAN_BE_IGNORED)


def _pending(_: list[str]) -> None:
    numbers = {signal.SIGUSR1, signal.SIGTERM, signal.SIGRTMIN + 5}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    for number in numbers:
        os.kill(os.getpid(), number)


def _timers(_: list[str]) -> None:
    for which, seconds in ((signal.ITIMER_REAL, 4000), (signal.ITIMER_VIRTUAL, 5000), (signal.ITIMER_PROF, 6000)):
        signal.setitimer(which, seconds, seconds / 2)


def _close(*numbers: int) -> Callable[[list[str]], None]:
    def change(_: list[str]) -> None:
        for number in numbers:
            os.close(number)

    return change


def _take_terminal(_: list[str]) -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _set(*arguments: int) -> Callable[[list[str]], None]:
    def change(_: list[str]) -> None:
        _prctl(*arguments)

    return change


def _drop_from_bounding_set(*capabilities: int) -> Callable[[list[str]], None]:
    def change(_: list[str]) -> None:
        for capability in capabilities:
            _prctl(24, capability)

    return change


def _capabilities(*, ambient: bool) -> Callable[[list[str]], None]:
    def change(_: list[str]) -> None:
        # SECBIT_KEEP_CAPS: permitted survives the change of account, until exec.
        bit = 1 << 10  # NET_BIND_SERVICE
        _prctl(8, 1)
        _set_account_of_words(_)
        header = struct.pack("Ii", 0x20080522, 0)
        _done(_LIBC.capset(header, struct.pack("IIIIII", bit, bit, bit, 0, 0, 0)))
        if ambient:
            _prctl(47, 2, 10)

    return change


def _no_new_privileges(_: list[str]) -> None:
    _prctl(38, 1)


def _filter(_: list[str]) -> None:
    """A seccomp filter that answers acct(2) with 77 and lets everything else through."""
    code = struct.pack("HBBI", 0x20, 0, 0, 0)
    code += struct.pack("HBBI", 0x15, 0, 1, _NR_ACCT)
    code += struct.pack("HBBI", 0x06, 0, 0, 0x00050000 | 77)
    code += struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000)
    program = ctypes.create_string_buffer(code, len(code))
    _call(_NR_SECCOMP, 1, 0, struct.pack("HxxxxxxQ", 4, ctypes.addressof(program)))


def _filter_without_privileges(words: list[str]) -> None:
    _no_new_privileges(words)
    _filter(words)


def landlock(*, files: bool) -> Callable[[list[str]], None]:
    """A Landlock domain that rules files, or one that rules network, signals and abstract sockets."""

    def change(_: list[str]) -> None:
        # struct landlock_ruleset_attr: handled_access_fs, handled_access_net, scoped.
        attributes = struct.pack("QQQ", 0x4, 0, 0) if files else struct.pack("QQQ", 0, 3, 3)
        ruleset = _call(_NR_LANDLOCK_CREATE, attributes, len(attributes), 0)
        if files:
            for path in ("/usr", "/opt", "/bin", "/lib", "/lib64", "/etc", "/proc", "/dev", "/var", "/home", "/work"):
                if os.path.isdir(path):
                    directory = os.open(path, os.O_PATH)
                    _call(_NR_LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", 0x4, directory), 0)
                    os.close(directory)
        _call(_NR_LANDLOCK_RESTRICT, ruleset, 0)
        os.close(ruleset)

    return change


def _landlock_of_a_user(words: list[str]) -> None:
    _no_new_privileges(words)
    landlock(files=True)(words)


def _join_keyring(_: list[str]) -> None:
    _call(_NR_KEYCTL, 1, b"hpcctr-fidelity")


def _private_mounts() -> None:
    _done(_LIBC.unshare(_CLONE_NEWNS))
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)


def _private_tmp(words: list[str]) -> None:
    _private_mounts()
    _mount(words[1], "/tmp", "", _MS_BIND)


def _enter_namespaces(words: list[str]) -> None:
    for name in ("ipc", "net", "cgroup"):
        namespace = os.open(f"/proc/{words[2]}/ns/{name}", os.O_RDONLY)
        _done(_LIBC.setns(namespace, 0))
        os.close(namespace)


def _enter_cgroup(words: list[str]) -> None:
    for directory in words[3].split(":"):
        Path(directory, "cgroup.procs").write_text("0")


def _lock(words: list[str]) -> None:
    descriptor = os.open(words[4], os.O_RDWR)
    fcntl.lockf(descriptor, fcntl.LOCK_EX, 10, 5)
    os.set_inheritable(descriptor, True)


def _many(words: list[str]) -> None:
    for change in (
        _umask, _nice, _io_priority(2 << 13 | 6), _affinity, _memory_policy(3), _personality(0x0040000),
        _write("/proc/self/oom_score_adj", "300"), _write("/proc/self/coredump_filter", "0x7f"), _set(29, 123456),
        _set(41, 1), _ignore(signal.SIGPIPE, signal.SIGHUP, signal.SIGUSR2), _set(1, signal.SIGUSR1),
    ):  # fmt: skip
        change(words)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


_REFUSED_AS_USER = {"gateway": "no-new-privs"}

CALLERS: dict[str, OddCaller] = {
    "plain": OddCaller(what="nothing odd"),
    "umask": OddCaller(what="`umask 137`", as_caller=_umask),
    "nice": OddCaller(what="`nice -n 7`", as_caller=_nice),
    "batch": OddCaller(what="`chrt --batch 0`", as_caller=_policy(os.SCHED_BATCH)),
    "idle": OddCaller(what="`chrt --idle 0`", as_caller=_policy(os.SCHED_IDLE)),
    "real-time": OddCaller(what="`chrt --rr 3`, set by root", as_root=_policy(os.SCHED_RR, 3)),
    "reset-on-fork": OddCaller(what="SCHED_RESET_ON_FORK", as_caller=_reset_on_fork),
    "ionice-idle": OddCaller(what="`ionice -c 3`", as_caller=_io_priority(3 << 13)),
    "ionice-best-effort": OddCaller(what="`ionice -c 2 -n 7`", as_caller=_io_priority(2 << 13 | 7)),
    "taskset": OddCaller(what="`taskset -c` of one processor", as_caller=_affinity),
    "numactl-bind": OddCaller(what="`numactl --membind=0`", as_caller=_memory_policy(2)),
    "numactl-interleave": OddCaller(what="`numactl --interleave=0`", as_caller=_memory_policy(3)),
    "setarch": OddCaller(what="`setarch -R`", as_caller=_personality(0x0040000)),
    "setarch-many": OddCaller(what="`setarch -RXLST linux32`", as_caller=_personality(0x6640008 | 0x0040000)),
    "choom": OddCaller(what="`choom -n 500`", as_caller=_write("/proc/self/oom_score_adj", "500")),
    "limits": OddCaller(what="every resource limit lowered, soft and hard", as_root=_lower_limits),
    "no-files": OddCaller(what="`ulimit -f 0`, SIGXFSZ ignored", as_caller=_no_files, modes=("gateway",)),
    "few-descriptors": OddCaller(what="`ulimit -n 24`", as_caller=_few_descriptors, modes=("gateway",)),
    "sigpipe": OddCaller(what="SIGPIPE ignored", as_caller=_ignore(signal.SIGPIPE)),
    "sigxfsz": OddCaller(what="SIGXFSZ ignored", as_caller=_ignore(signal.SIGXFSZ)),
    "nohup": OddCaller(what="SIGHUP ignored (`nohup`)", as_caller=_ignore(signal.SIGHUP)),
    "sigchld": OddCaller(what="SIGCHLD ignored", as_caller=_ignore(signal.SIGCHLD)),
    "ignored": OddCaller(what="every signal ignored that can be", as_caller=_ignore(*_CAN_BE_IGNORED)),
    "blocked": OddCaller(what="every signal blocked that can be", as_caller=_block_all),
    "pending": OddCaller(what="SIGUSR1, SIGTERM and a real-time signal blocked and pending", as_caller=_pending),
    "timers": OddCaller(what="all three interval timers armed", as_caller=_timers),
    "held-descriptors": OddCaller(
        what="files with offsets and flags, pipes, sockets, memfd, eventfd and others held", holds_descriptors=True
    ),
    "closed-stdin": OddCaller(what="0 closed", as_caller=_close(0)),
    "closed-stdio": OddCaller(what="0, 1 and 2 closed", as_caller=_close(0, 1, 2)),
    "sockets": OddCaller(what="0, 1 and 2 are a socket", stdio="socket"),
    "pipes": OddCaller(what="0, 1 and 2 are pipes, not blocking", stdio="pipe"),
    "terminal": OddCaller(what="0, 1 and 2 are a terminal, which is nobody's controlling one", stdio="terminal"),
    "controlling-terminal": OddCaller(
        what="0, 1 and 2 are the controlling terminal, in the foreground",
        stdio="controlling terminal",
        as_root=_take_terminal,
    ),
    "lock": OddCaller(what="a POSIX record lock held", as_caller=_lock),
    "pdeathsig": OddCaller(what="`setpriv --pdeathsig USR1`", as_caller=_set(1, signal.SIGUSR1)),
    "timer-slack": OddCaller(what="timer slack of 123456 ns", as_caller=_set(29, 123456)),
    "no-huge-pages": OddCaller(what="PR_SET_THP_DISABLE", as_caller=_set(41, 1)),
    "subreaper": OddCaller(what="PR_SET_CHILD_SUBREAPER", as_caller=_set(36, 1)),
    "deny-write-execute": OddCaller(what="PR_SET_MDWE", as_caller=_set(65, 1), modes=("gateway",)),
    "memory-merge": OddCaller(what="PR_SET_MEMORY_MERGE, set by root", as_root=_set(67, 1)),
    "machine-check": OddCaller(what="PR_MCE_KILL early", as_caller=_set(33, 1, 1)),
    "coredump-filter": OddCaller(what="coredump_filter 0x7f", as_caller=_write("/proc/self/coredump_filter", "0x7f")),
    "securebits": OddCaller(what="SECBIT_NO_CAP_AMBIENT_RAISE, locked, set by root", as_root=_set(28, 0xC0)),
    "bounding-set": OddCaller(
        what="CAP_SYS_TIME and CAP_WAKE_ALARM dropped from the bounding set by root",
        as_root=_drop_from_bounding_set(25, 35),
    ),
    "bounding-set-needed": OddCaller(
        what="CAP_SYS_ADMIN dropped from the bounding set by root",
        as_root=_drop_from_bounding_set(21),
        modes=("gateway",),
        refused={"gateway": "caller-refused"},
    ),
    "inheritable": OddCaller(
        what="an inheritable capability, given by root", as_root=_capabilities(ambient=False), modes=("gateway",)
    ),
    "ambient": OddCaller(
        what="an ambient capability, given by root",
        as_root=_capabilities(ambient=True),
        modes=("gateway",),
        refused={"gateway": "caller-refused"},
    ),
    "no-new-privs": OddCaller(what="`setpriv --no-new-privs`", as_caller=_no_new_privileges, refused=_REFUSED_AS_USER),
    "seccomp": OddCaller(what="a seccomp filter, set by root without no_new_privs", as_root=_filter),
    "seccomp-of-user": OddCaller(
        what="a seccomp filter with no_new_privs", as_caller=_filter_without_privileges, refused=_REFUSED_AS_USER
    ),
    "landlock": OddCaller(
        what="a Landlock domain for network, sockets and signals, set by root without no_new_privs",
        as_root=landlock(files=False),
        # Root's engine may not look at a container's init, which is outside of its domain (ptrace(2)).
        refused={"direct": "containerd"},
        landlock=6,
    ),
    "landlock-files": OddCaller(
        what="a Landlock domain for files, set by root without no_new_privs",
        as_root=landlock(files=True),
        # As root the engine is confined as well, and meets the refusal first.
        refused={"gateway": "caller-refused", "direct": "image-mount"},
        landlock=1,
    ),
    "landlock-of-user": OddCaller(
        what="a Landlock domain with no_new_privs",
        as_caller=_landlock_of_a_user,
        modes=("gateway",),
        refused=_REFUSED_AS_USER,
        landlock=1,
    ),
    "loginuid": OddCaller(what="login and audit session set", as_root=_own_loginuid, new_each_time=("proc.sessionid",)),
    "session-keyring": OddCaller(what="`keyctl session NAME`", as_caller=_join_keyring),
    "private-tmp": OddCaller(
        what="a mount namespace of its own with its own /tmp",
        as_root=_private_tmp,
        new_each_time=("namespace.mnt",),
        # Root's engine would mount images where containerd does not see them.
        refused={"direct": "no-containerd"},
    ),
    "hidepid": OddCaller(what="a host whose /proc is mounted with hidepid=2", hides_processes=True),
    "namespaces": OddCaller(what="IPC, network and cgroup namespaces of its own", as_root=_enter_namespaces),
    "cgroups": OddCaller(what="cgroups of its own, as a scheduler makes them", as_root=_enter_cgroup),
    "not-text": OddCaller(
        what="words, names and values that are not UTF-8",
        arguments=(b"\xff\xfe", b"\xc3", b"a\nb", b"\x01"),
        environment=(b"M\xfd=\xfe\xff=\x01", b"NEWLINE=a\nb", b"SPACE =x"),
    ),
    "empty-words": OddCaller(
        what="empty words and values", arguments=(b"", b"x", b"", b"--", b""), environment=(b"E=",)
    ),
    "long-words": OddCaller(
        what="1 MB of words and half a megabyte of environment",
        arguments=(*(b"%06d" % number * 4 for number in range(30000)), b"y" * 120000, b"z" * 120000),
        environment=tuple(b"LONG_%d=" % number + b"v" * 100000 for number in range(5)),
    ),
    "names-twice": OddCaller(
        what="a name twice in the environment, entries without a name and without =",
        environment=(b"TWICE=1", b"OTHER=x", b"TWICE=2", b"NO_SIGN", b"=NO_NAME", b"AFTER=1"),
    ),
    "locale-c": OddCaller(what="`LC_ALL=C`", environment=(b"LC_ALL=C",)),
    "locale-ctype": OddCaller(
        what="`LC_CTYPE=POSIX` and no LANG", environment=(b"HOME=/tmp", b"LC_CTYPE=POSIX"), bare_environment=True
    ),
    "no-environment": OddCaller(what="an empty environment", bare_environment=True),
    "many": OddCaller(what="a dozen of these at once", as_caller=_many, holds_descriptors=True),
}


def _set_account_of_words(words: list[str]) -> None:
    if words[0] == "0":
        return
    os.setgroups([int(group) for group in words[-1].split(",")])
    gid = int(words[-2])
    os.setresgid(gid, gid, gid)
    uid = int(words[0])
    os.setresuid(uid, uid, uid)


def _go_on_as_child() -> None:
    """Leave behind the mark of having used root's capabilities (PF_SUPERPRIV), which a user's shell has not."""
    child = os.fork()
    if child == 0:
        return
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _session_keyring() -> int:
    # What the kernel would give the command: it makes none.
    return int(_LIBC.syscall(_NR_KEYCTL, 0, ctypes.c_long(-3), 0))


def main(argv: list[bytes]) -> None:
    """Become the caller, then the command. UID [TMP [HOLDER [CGROUPS [LOCKFILE]]]] GID GROUPS are the WORDs."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    name = argv[0].decode()
    end = argv.index(b"--")
    words = [os.fsdecode(word) for word in argv[1:end]]
    rest = argv[end + 1 :]
    middle = rest.index(b"--")
    environment, command = rest[:middle], rest[middle + 1 :]
    caller = CALLERS[name]
    if caller.as_root is not None:
        caller.as_root(words)
    if os.getuid() == 0:
        _set_account_of_words(words)
        if os.getuid() != 0:
            _go_on_as_child()
    # The kernel took it away with the account: files of /proc/self would be root's.
    _prctl(4, 1)
    started = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]
    if caller.as_caller is not None:
        caller.as_caller(words)
    about = (os.getpid(), os.getppid(), os.getpgid(0), os.getsid(0), int(started), _session_keyring())
    environment.append(b"PROBE_CALLER=" + " ".join(map(str, about)).encode())
    # execve as it is: Python's refuses environments that the kernel takes.
    strings = (ctypes.c_char_p * (len(command) + 1))(*command, None)
    variables = (ctypes.c_char_p * (len(environment) + 1))(*environment, None)
    _done(_LIBC.execve(command[0], strings, variables))


if __name__ == "__main__":
    main([os.fsencode(word) for word in sys.argv[1:]])
