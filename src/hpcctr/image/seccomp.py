"""System calls a program that parses images never needs, denied by a seccomp filter (seccomp(2), bpf of
linux/filter.h).

A list of what is denied, not of what is allowed: the filter is the last line behind namespaces and account, and a libc
that learns a new call must not break conversions. Denied calls fail with EPERM."""

from __future__ import annotations

import ctypes
import errno
import os
import struct

_PR_SET_SECCOMP, _FILTER = 22, 2
#: linux/audit.h, and what tells a call of another ABI under the same name (x32).
_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_CLONE_THREAD = 0x00010000

# arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h; None where there is no such call.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    # sockets: the one it has is inherited
    "socket": (41, 198),
    "socketpair": (53, 199),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    # namespaces and mounts
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    # large pieces of kernel that were ways in
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # changing what lies in a filesystem, but for content through a descriptor
    "truncate": (76, 45),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rmdir": (84, None),
    "mknod": (133, None),
    "mknodat": (259, 33),
}
#: What a parser needs no more once it has all its code and descriptors.
_DENIED_LATER: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "open": (2, None),
    "openat": (257, 56),
    "openat2": (437, 437),
    "creat": (85, None),
}
_CLONE, _CLONE3 = (56, 220), 435

_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    """struct sock_fprog of linux/filter.h."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]  # noqa: RUF012


def deny_dangerous_calls() -> bool:
    """For this process and its children from now on; no_new_privs must be set. False on a processor without a list.

    Raises OSError."""
    return _install(list(_DENIED.values()), deny_starting=False)


def deny_all_but_descriptors() -> bool:
    """No file can be opened and no process started any more; threads can. As :func:`deny_dangerous_calls`."""
    return _install(list(_DENIED_LATER.values()), deny_starting=True)


def _install(calls: list[tuple[int | None, int | None]], *, deny_starting: bool) -> bool:
    machine = os.uname().machine
    if machine not in _ARCH:
        return False
    column = list(_ARCH).index(machine)
    numbers = [call[column] for call in calls]
    code = _filter(machine, [number for number in numbers if number is not None], deny_starting, _CLONE[column])
    program = _Program(len(code) // 8, code)
    if _libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_FILTER), ctypes.byref(program), 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_SECCOMP): {os.strerror(number)}")
    return True


def _filter(machine: str, numbers: list[int], deny_starting: bool, clone: int) -> bytes:
    """The program. Offsets are of struct seccomp_data: number 0, architecture 4, first argument 16 (low half)."""
    load, is_equal, is_greater, has_bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    denied, unknown = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS
    code = [(load, 0, 0, 4), (is_equal, 1, 0, _ARCH[machine]), (give, 0, 0, _KILL), (load, 0, 0, 0)]
    if machine == "x86_64":
        code += [(is_greater, 0, 1, _X32), (give, 0, 0, _KILL)]
    for number in numbers:
        code += [(is_equal, 0, 1, number), (give, 0, 0, denied)]
    if deny_starting:
        # The flags of clone3 are behind a pointer; told that it is unknown, libc takes clone.
        code += [(is_equal, 0, 1, _CLONE3), (give, 0, 0, unknown)]
        code += [(is_equal, 0, 3, clone), (load, 0, 0, 16), (has_bits, 1, 0, _CLONE_THREAD), (give, 0, 0, denied)]
    code.append((give, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
