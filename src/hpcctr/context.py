"""Who asks and where: facts from the kernel, never from a request.

A :class:`Caller` comes from the peer credentials of its socket and is checked again against /proc while a pidfd is
held: a pid that has been reused, a zombie leader with a living thread, or a set-user-ID program in between are refused.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from dataclasses import dataclass

from hpcctr.errors import CallerRefused, CallerTraced, NoNewPrivileges
from hpcctr.proc import read_lines
from hpcctr.processor import machine as machine

#: getsockopt values of include/uapi/asm-generic/socket.h that Python's socket module does not name.
_SO_PEERGROUPS = 59
_SO_PEERPIDFD = 77
#: Inode numbers of the initial user and pid namespaces: include/linux/proc_ns.h (UAPI linux/nsfs.h since 6.18).
INITIAL_USER_NAMESPACE = 0xEFFFFFFD
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC
_UID_MAX = 2**31 - 1

CAP_SYS_CHROOT = 1 << 18
CAP_SYS_ADMIN = 1 << 21


@dataclass(frozen=True, kw_only=True)
class Caller:
    """One process, held by a pidfd that the holder of this value closes."""

    pid: int
    pidfd: int
    uid: int
    gid: int
    #: Supplementary groups, ascending.
    groups: tuple[int, ...]

    @classmethod
    def of_peer(cls, peer: socket.socket) -> Caller:
        """The process that connected. Raises :class:`CallerRefused` when it is gone."""
        pid, uid, gid = struct.unpack("iII", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        pidfd = _peer_pidfd(peer, pid)
        try:
            return cls(pid=pid, pidfd=pidfd, uid=uid, gid=gid, groups=_peer_groups(peer, pid))
        except BaseException:
            os.close(pidfd)
            raise

    @classmethod
    def of_child(cls, pid: int) -> Caller:
        """A process this one has forked and not yet waited for: its identity is our own."""
        return cls(
            pid=pid, pidfd=os.pidfd_open(pid), uid=os.getuid(), gid=os.getgid(), groups=tuple(sorted(os.getgroups()))
        )

    def require_gateway_caller(self) -> None:
        """Raise :class:`CallerRefused` unless this process may be served by the gateway, now."""
        if not 0 < self.uid <= _UID_MAX:
            raise CallerRefused(
                f"uid {self.uid} is not served by the engine",
                hint="root runs hpcctr without the engine; others need uid < 2^31",
            )
        status = self.read_status()
        for field, wanted in (("Uid", self.uid), ("Gid", self.gid)):
            if status[field].split() != [str(wanted)] * 4:
                raise CallerRefused(f"pid {self.pid} runs with mixed or changed {field.lower()}s: {status[field]}")
        if int(status["CapEff"], 16):
            raise CallerRefused(
                f"pid {self.pid} has effective capabilities", hint="start hpcctr from an ordinary shell"
            )
        for name, initial in (("user", INITIAL_USER_NAMESPACE), ("pid", _INITIAL_PID_NAMESPACE)):
            if self._stat(f"ns/{name}").st_ino != initial:
                raise CallerRefused(
                    f"pid {self.pid} is not in the node's {name} namespace", hint="start hpcctr outside that container"
                )
        mine, its = os.stat("/"), self._stat("root")
        if (mine.st_dev, mine.st_ino) != (its.st_dev, its.st_ino):
            raise CallerRefused(
                f"pid {self.pid} has another root directory", hint="start hpcctr outside the chroot or container"
            )
        if status["TracerPid"] != "0":
            raise CallerTraced(
                f"pid {self.pid} is traced by pid {status['TracerPid']}, so enter would get no capability",
                hint="trace the program instead: hpcctr run IMAGE -- strace CMD, or attach with strace -p once it runs",
            )
        if status.get("NoNewPrivs", "0") != "0":
            raise NoNewPrivileges(
                f"pid {self.pid} has no_new_privs set, so enter would get no capability",
                hint="start hpcctr outside the sandbox that set it "
                "(a container, systemd NoNewPrivileges=, setpriv --no-new-privs)",
            )
        self.require_alive()

    def require_enter(self, enter: os.stat_result, *, permitted: int) -> None:
        """Raise :class:`CallerRefused` unless this process now executes ``enter`` with ``permitted`` as permitted
        set.
        """
        status = self.read_status()
        its = self._stat("exe")
        if (its.st_dev, its.st_ino) != (enter.st_dev, enter.st_ino):
            raise CallerRefused(f"pid {self.pid} is not the installed enter")
        if int(status["CapPrm"], 16) != permitted or int(status["CapEff"], 16):
            raise CallerRefused(f"pid {self.pid} has not enter's capabilities: {status['CapPrm']}")
        self.require_alive()

    def require_alive(self) -> None:
        """Raise :class:`CallerRefused` once the process has ended: what /proc said before is then about nobody."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        if poll.poll(0):
            raise CallerRefused(f"pid {self.pid} has ended")

    def read_status(self) -> dict[str, str]:
        """/proc/PID/status as words. Raises :class:`CallerRefused` for a zombie or a process that is gone."""
        try:
            status = read_status(self.pid)
        except OSError:
            raise CallerRefused(f"pid {self.pid} has ended") from None
        if status["State"][:1] in "ZX":
            raise CallerRefused(f"pid {self.pid} is a zombie")
        return status

    def _stat(self, name: str) -> os.stat_result:
        try:
            return os.stat(f"/proc/{self.pid}/{name}")
        except OSError as error:
            raise CallerRefused(f"pid {self.pid}: {name} cannot be read: {error.strerror}") from None


def read_status(pid: int) -> dict[str, str]:
    """/proc/PID/status by name (proc(5)). Raises OSError when there is no such process."""
    return {
        name: value.strip() for name, _, value in (line.partition(":") for line in read_lines(f"/proc/{pid}/status"))
    }


def _peer_groups(peer: socket.socket, pid: int) -> tuple[int, ...]:
    try:
        # 1024 bytes are the most that Python's getsockopt takes: 256 groups.
        raw = peer.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        try:
            groups = read_status(pid)["Groups"]
        except OSError:
            raise CallerRefused(f"pid {pid} has ended") from None
        return tuple(sorted(map(int, groups.split())))
    return tuple(sorted(struct.unpack(f"{len(raw) // 4}I", raw)))


def _peer_pidfd(peer: socket.socket, pid: int) -> int:
    try:
        return peer.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            # The peer has been reaped: its number may be somebody else's by now.
            raise CallerRefused(f"pid {pid} has ended") from None
    # Before Linux 6.5. A pidfd of the number may be somebody else's; what makes it safe is that every fact is read
    # while it is held and compared with the socket's credentials.
    try:
        return os.pidfd_open(pid)
    except OSError:
        raise CallerRefused(f"pid {pid} has ended") from None
