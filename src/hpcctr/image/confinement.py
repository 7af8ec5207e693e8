"""Confinement: how the process that parses images is started, and what is taken from it before it runs.

:func:`spawn` starts a supervisor, which starts the confined program and ends it when the other end of its socket is
closed. Whatever the program is made to do, it has

- no account of anybody's: started by root it is a uid and gid of its own without groups; started by somebody else it
  keeps that uid, in a user namespace where the kernel gives one, so that no other process of that uid is in its reach;
- no capability, and no way to one (no_new_privs, empty bounding set);
- no files: its root is a tmpfs with the system's and Python's programs and libraries, all of it read-only; files reach
  it as descriptors only;
- no network, no other process it could see, signal or trace, no System V objects (namespaces of its own);
- limits of memory, processor time, files and processes; no system call of :mod:`hpcctr.image.seccomp`'s list.

Fail closed: what cannot be applied, or reads back otherwise, ends the program before it starts. Only a starter that is
not root and gets no user namespace goes without the namespaces. Cgroup, niceness and processors stay the starter's.

This module imports no parser: the engine may import it."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from hpcctr.image import seccomp

#: Who parses when root starts it and names nobody else.
NOBODY = 65534
_UID_MAX = 2**31 - 1

#: Packages the converter imports; whatever else lies in their directories is only readable code.
_PACKAGES = ("hpcctr", "msgspec", "isal", "zstandard")
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache")
_BOOT = "import sys; sys.path += {paths!r}; from {module} import main; main()"

_MIB = 1 << 20
_PROCESSORS = os.cpu_count() or 1
LIMITS = {
    # Contents of images are nobody's core files.
    resource.RLIMIT_CORE: 0,
    # A descriptor for each of at most 512 layers, which are read twice, and a few.
    resource.RLIMIT_NOFILE: 1024,
    # The largest image there may be (layers.CONTENT_MAX), should it not compress at all.
    resource.RLIMIT_FSIZE: 1 << 40,
    # That much takes about an hour of decompressing and of compressing on each processor.
    resource.RLIMIT_CPU: 6 * 3600,
    # 4 GiB for a tree of layers.ENTRIES_MAX entries, here as in the writer, and for each thread of the writer its stack
    # and what the allocator reserves for it, most of which is never used.
    resource.RLIMIT_AS: (4096 + 128 * _PROCESSORS) * _MIB,
    # Threads of the writer, one for each processor, and a few. Others of the same uid are counted as well.
    resource.RLIMIT_NPROC: 1024 + 8 * _PROCESSORS,
}

# include/uapi/linux: sched.h, mount.h, prctl.h, capability.h
_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_NAMESPACES = _NEWNS | _NEWCGROUP | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 0x1, 0x2, 0x4, 0x8, 0x4000, 0x40000
_MNT_DETACH = 0x2
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_AT_FDCWD, _AT_RECURSIVE, _AT_EMPTY_PATH, _CLONE_TREE, _FROM_DESCRIPTOR = -100, 0x8000, 0x1000, 0x1, 0x4
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 0x1, 0x2, 0x4
_PR_SET_PDEATHSIG, _PR_CAPBSET_READ, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 23, 24, 38
_CAPABILITY_VERSION = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def spawn(*, uid: int | None = None, gid: int | None = None) -> socket.socket:
    """Start a converter and return the socket on which :class:`hpcctr.image.conversion.Converter` speaks to it.

    Only root names an account, :data:`NOBODY` unless it does. The converter inherits cgroup, niceness and processors of
    this process, and ends once every copy of the returned socket is closed or it is shut down for writing. What goes
    wrong after the start is told on the socket. Raises OSError when there is no process to be had.
    """
    peer, process = start(uid=uid, gid=gid)
    threading.Thread(target=process.wait, name="converter", daemon=True).start()
    return peer


def start(
    *, uid: int | None = None, gid: int | None = None, module: str = "hpcctr.image.converter", code: str = ""
) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """:func:`spawn` with the supervisor, which the caller waits for, and for another program than the converter:
    ``main()`` of ``module``, or ``code``; it finds the descriptor of its socket in ``sys.argv[1]``."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    paths = list(dict.fromkeys(_place_of(package) for package in _PACKAGES))
    plan = {
        "uid": uid,
        "gid": gid,
        "paths": paths,
        "code": code or _BOOT.format(paths=paths, module=module),
        "python": os.path.realpath(sys.executable),
        "prefix": os.path.realpath(sys.base_prefix),
        "socket": theirs.fileno(),
    }
    boot = _BOOT.format(paths=[_place_of("hpcctr")], module=__name__)
    try:
        with theirs:
            process = subprocess.Popen(
                [str(plan["python"]), "-I", "-S", "-c", boot, json.dumps(plan)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                cwd="/",
                env={"LC_ALL": "C"},
            )
    except BaseException:
        ours.close()
        raise
    return ours, process


def _place_of(package: str) -> str:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no module named {package}", name=package)
    return os.path.realpath(os.path.dirname(os.path.dirname(spec.origin)))


# the supervisor


def main() -> None:
    """The supervisor: trusted, single-threaded, alone with the program's end of the socket."""
    plan = json.loads(sys.argv[1])
    peer = socket.socket(fileno=plan["socket"])
    try:
        status = _supervise(plan, peer)
    except Exception as error:  # noqa: BLE001 - told to whoever started it, whatever it is
        _tell(peer, f"the converter cannot be confined: {error}")
        status = 1
    os._exit(status)


def _supervise(plan: dict[str, Any], peer: socket.socket) -> int:
    os.setsid()
    os.umask(0o077)
    is_root = os.geteuid() == 0
    if is_root:
        plan["uid"] = NOBODY if plan["uid"] is None else plan["uid"]
        plan["gid"] = NOBODY if plan["gid"] is None else plan["gid"]
        if not (0 < plan["uid"] < _UID_MAX and 0 < plan["gid"] < _UID_MAX):
            raise ValueError(f"uid {plan['uid']} and gid {plan['gid']} are no account of an ordinary program")
    elif plan["uid"] not in (None, os.geteuid()) or plan["gid"] not in (None, os.getegid()):
        raise ValueError("only root can start it as another account")
    has_namespaces = is_root or _in_a_child(lambda: _enter_namespaces(plan, is_root=False))
    if has_namespaces:
        _unshare(is_root=is_root)
    child = os.fork()
    if not child:
        _become_the_program(plan, peer, is_root=is_root, has_namespaces=has_namespaces)
    return _watch(child, peer)


def _watch(child: int, peer: socket.socket) -> int:
    """Wait for the program, or end it when nobody is left who would hear it. As the first process of its pid namespace
    it takes all others in there with it."""
    pidfd = os.pidfd_open(child)
    waiting = select.poll()
    waiting.register(pidfd, select.POLLIN)
    waiting.register(peer, select.POLLRDHUP | select.POLLHUP)
    is_heard = True
    while not any(descriptor == pidfd for descriptor, _ in waiting.poll()):
        is_heard = False
        waiting.unregister(peer)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status and is_heard:
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        hint = "if memory ran out (dmesg), pull where there is more" if status == -signal.SIGKILL else ""
        _tell(peer, f"the converter {how}", hint)
    return 0 if status == 0 else 1


def _tell(peer: socket.socket, message: str, hint: str = "") -> None:
    """A failure, in the form of :mod:`hpcctr.image.exchange`."""
    frame = b"E" + json.dumps({"slug": "conversion", "message": message[:4000], "hint": hint}).encode()
    with contextlib.suppress(OSError):
        peer.send(frame, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)


def _in_a_child(do: Callable[[], object]) -> bool:
    """Whether something works; it is tried in a child, since it cannot be undone."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    try:
        do()
    except BaseException:  # noqa: BLE001 - any trouble means no
        os._exit(1)
    os._exit(0)


# in the child, before the program


def _become_the_program(plan: dict[str, Any], peer: socket.socket, *, is_root: bool, has_namespaces: bool) -> NoReturn:
    try:
        descriptor = peer.fileno()
        os.closerange(3, descriptor)
        os.closerange(descriptor + 1, 1 << 20)
        if has_namespaces:
            _build_view(plan)
        os.chdir("/")
        for limit, value in LIMITS.items():
            hard = resource.getrlimit(limit)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(limit, (value, value))
        _drop_everything(plan, is_root=is_root, has_namespaces=has_namespaces)
        is_filtered = seccomp.deny_dangerous_calls()
        _require_nothing_left(plan, is_root=is_root, has_namespaces=has_namespaces, is_filtered=is_filtered)
        os.set_inheritable(descriptor, True)
        argv = [plan["python"], "-I", "-S", "-c", plan["code"], str(descriptor)]
        os.execve(plan["python"], argv, {"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})  # noqa: S606
    except BaseException as error:  # noqa: BLE001 - nothing may return from here
        _tell(peer, f"the converter cannot be confined: {error}")
        os._exit(1)


def _enter_namespaces(plan: dict[str, Any], *, is_root: bool) -> None:
    """All of it, as a trial."""
    _unshare(is_root=is_root)
    if not _in_a_child(lambda: _build_view(plan)):
        raise OSError("no view")


def _unshare(*, is_root: bool) -> None:
    uid, gid = os.geteuid(), os.getegid()
    _checked(_libc.unshare(ctypes.c_int(_NAMESPACES | (0 if is_root else _NEWUSER))), "unshare")
    if not is_root:
        # user_namespaces(7): gid_map may be written without privilege once setgroups is off.
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)


def _build_view(plan: dict[str, Any]) -> None:
    """Make a root of its own: programs and libraries, the processes of this namespace, nothing else; nothing can be
    written."""
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    trees: list[tuple[str, int]] = []
    links: list[tuple[str, str]] = []
    for path in [*_SYSTEM, plan["prefix"], *plan["paths"]]:
        if os.path.islink(path):
            links.append((path, os.readlink(path)))
        elif os.path.exists(path) and not any(path == made or path.startswith(f"{made}/") for made, _ in trees):
            tree = _syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(path), _CLONE_TREE | _AT_RECURSIVE | os.O_CLOEXEC)
            trees.append((path, tree))
    root = "/tmp"  # noqa: S108 - a place to mount on in a namespace of its own
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=1m")
    os.chdir(root)
    for path, target in links:
        os.symlink(target, root + path)
    os.umask(0o022)
    for path, tree in trees:
        if os.path.isdir(path):
            os.makedirs(root + path)
        else:
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            os.close(os.open(root + path, os.O_CREAT | os.O_CLOEXEC, 0o644))
        _syscall(_MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(root + path), _FROM_DESCRIPTOR)
        os.close(tree)
    os.umask(0o077)
    os.mkdir("proc", 0o755)
    _mount_proc(f"{root}/proc")
    attributes = (ctypes.c_uint64 * 4)(_ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, 0, 0, 0)
    _syscall(_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(root), _AT_RECURSIVE, attributes, ctypes.sizeof(attributes))
    # pivot_root(2), NOTES: both on one directory, the old root is then on top.
    _checked(_libc.pivot_root(b".", b"."), "pivot_root")
    _checked(_libc.umount2(b".", ctypes.c_int(_MNT_DETACH)), "umount2")


def _mount_proc(target: str) -> None:
    """The writer opens its output by /proc/self/fd. Of the rest only its own processes are there."""
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    try:
        _mount("proc", target, "proc", flags, "subset=pid")
    except OSError:
        # A user namespace gets no proc of its own where parts of the host's are hidden (mount_too_revealing of
        # fs/namespace.c). The host's tells of its processes what it tells everybody; nothing there obeys this one.
        tree = _syscall(_OPEN_TREE, _AT_FDCWD, b"/proc", _CLONE_TREE | _AT_RECURSIVE | os.O_CLOEXEC)
        _syscall(_MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(target), _FROM_DESCRIPTOR)
        os.close(tree)


def _drop_everything(plan: dict[str, Any], *, is_root: bool, has_namespaces: bool) -> None:
    if has_namespaces:
        number = 0
        while _libc.prctl(_PR_CAPBSET_READ, ctypes.c_ulong(number), 0, 0, 0) >= 0:
            _checked(_libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(number), 0, 0, 0), "prctl(PR_CAPBSET_DROP)")
            number += 1
    if is_root:
        os.setgroups([])
        os.setresgid(plan["gid"], plan["gid"], plan["gid"])
        os.setresuid(plan["uid"], plan["uid"], plan["uid"])
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    _checked(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    # After the ids: changing them takes it back (prctl(2)).
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def _require_nothing_left(plan: dict[str, Any], *, is_root: bool, has_namespaces: bool, is_filtered: bool) -> None:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        said = {key: value.split() for key, _, value in (line.partition(":") for line in file)}
    wanted: dict[str, list[str]] = {key: ["0" * 16] for key in ("CapInh", "CapPrm", "CapEff", "CapAmb")}
    wanted["NoNewPrivs"] = ["1"]
    if has_namespaces:
        wanted["CapBnd"] = ["0" * 16]
    if is_filtered:
        wanted["Seccomp"] = ["2"]
    if is_root:
        wanted |= {"Uid": [str(plan["uid"])] * 4, "Gid": [str(plan["gid"])] * 4, "Groups": []}
    for key, value in wanted.items():
        if said.get(key) != value:
            raise PermissionError(f"{key} reads {' '.join(said.get(key, ['nothing']))} instead of {' '.join(value)}")
    if has_namespaces and os.statvfs("/").f_flag & os.ST_RDONLY == 0:
        raise PermissionError("its root can be written")


# system calls


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    words = (source.encode(), os.fsencode(target), kind.encode() or None)
    _checked(_libc.mount(*words, ctypes.c_ulong(flags), data.encode() or None), f"mount on {target}")


def _syscall(number: int, *arguments: int | bytes | ctypes.Array[Any]) -> int:
    # Each argument is a register: a plain int would leave the upper half undefined.
    words = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    _libc.syscall.restype = ctypes.c_long
    return _checked(_libc.syscall(ctypes.c_long(number), *words), f"system call {number}")


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result
