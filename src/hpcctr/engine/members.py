"""The members of node containers: the callers' own processes, watched until they end.

One descriptor a process (a pidfd becomes readable when it has ended, pidfd_open(2)) in one epoll set: nothing wakes up
while nothing ends. After a restart of the engine, members are found in /proc.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import threading
from collections.abc import Iterable, Iterator, Mapping

from hpcctr.context import read_status
from hpcctr.mounttable import MountEntry

#: linux/nsfs.h.
_NS_GET_USERNS = 0xB701
#: The last part of the path that the spec's section ``linux`` gives an anchor.
_ANCHOR_CGROUP = re.compile(rb"/hpcctr-[0-9a-f]{32}-[0-9a-f]{8}\n")
#: The root in a mount table when it is an overlay, and its upper layer (proc_pid_mountinfo(5)).
_ROOT_OVERLAY = re.compile(rb"\d+ \d+ \S+ \S+ / [^\n]* - overlay \S* (?:\S*,)?upperdir=([^,\s]*)")
#: Bytes of a mount table that are read until the root is found. A kernel's limit of mounts (fs.mount-max) in lines of
#: an ordinary length; users can make them longer, in a namespace of their own.
_TABLE_BYTES = 32 << 20


class Members:
    """Who is in which container. :meth:`add` is called from any thread, :meth:`wait` from one."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._bell, select.EPOLLIN)
        self._lock = threading.Lock()
        #: pidfd → container; container → pids by pidfd.
        self._container_of: dict[int, str] = {}
        self._pids: dict[str, dict[int, int]] = {}

    def add(self, container_id: str, *, pid: int, pidfd: int) -> None:
        """Watch a process, which may have ended already. The descriptor is ours from here on. Raises OSError."""
        with self._lock:
            try:
                self._epoll.register(pidfd, select.EPOLLIN)
            except OSError:
                os.close(pidfd)
                raise
            self._container_of[pidfd] = container_id
            self._pids.setdefault(container_id, {})[pidfd] = pid

    def pids(self, container_id: str) -> tuple[int, ...]:
        """The members of a container that are not known to have ended."""
        with self._lock:
            return tuple(self._pids.get(container_id, {}).values())

    def is_empty(self, container_id: str) -> bool:
        """Whether every member of a container has ended, also those :meth:`wait` has not told of yet."""
        with self._lock:
            poll = select.poll()
            pidfds = self._pids.get(container_id, {})
            for pidfd in pidfds:
                poll.register(pidfd, select.POLLIN)
            return len(poll.poll(0)) == len(pidfds)

    def wait(self, seconds: float | None) -> set[str]:
        """Containers that lost a member; empty after ``seconds`` (None: never) or when :meth:`ring` was called."""
        lost = set()
        for descriptor, _ in self._epoll.poll(seconds):
            if descriptor == self._bell:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._bell)
                continue
            with self._lock:
                container_id = self._container_of.pop(descriptor)
                pids = self._pids[container_id]
                del pids[descriptor]
                if not pids:
                    del self._pids[container_id]
                self._epoll.unregister(descriptor)
                os.close(descriptor)
            lost.add(container_id)
        return lost

    def ring(self) -> None:
        """Make :meth:`wait` return."""
        os.eventfd_write(self._bell, 1)

    def close(self) -> None:
        """Stop watching. :meth:`wait` must have returned for the last time."""
        with self._lock:
            for descriptor in (*self._container_of, self._bell):
                os.close(descriptor)
            self._container_of.clear()
            self._pids.clear()
            self._epoll.close()


def members_in_proc(upper_uids: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Living processes by the upper layer of their root: upper layer, pid and a pidfd that the caller closes.

    ``upper_uids`` says which upper layers matter and whose they are. Only mount namespaces of the engine's own user
    namespace are looked at: users can make others, with mount tables that say anything.
    """
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        pid = int(name)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            continue
        upper = _upper_of_member(pid, upper_uids)
        if upper is None:
            os.close(pidfd)
        else:
            found.append((upper, pid, pidfd))
    return found


def _upper_of_member(pid: int, upper_uids: Mapping[str, int]) -> str | None:
    for thread in living_threads(pid):
        with contextlib.suppress(OSError, ValueError):
            if is_in_a_view(thread):
                upper = root_upper(thread)
                if upper is not None and upper_uids.get(upper) == _real_uid(thread) and not is_anchor(thread):
                    return upper
    return None


def living_threads(pid: int) -> Iterator[int]:
    """The first thread of a process; when that has ended, which may be before the others do, those.

    A thread that has ended shows neither namespace nor, in version 1, its cgroup.
    """
    with contextlib.suppress(OSError):
        if read_status(pid)["State"][:1] not in "ZX":
            yield pid
        else:
            yield from (int(name) for name in os.listdir(f"/proc/{pid}/task") if int(name) != pid)


def is_in_a_view(pid: int) -> bool:
    """Whether a process is in a mount namespace that is not the engine's but that only root can have made."""
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return not os.path.samestat(os.fstat(namespace), os.stat("/proc/self/ns/mnt")) and is_roots(namespace)
    finally:
        os.close(namespace)


def is_roots(namespace: int) -> bool:
    """Whether a namespace belongs to the engine's own user namespace: only root can have made it (ioctl_nsfs(2))."""
    owner = fcntl.ioctl(namespace, _NS_GET_USERNS)
    try:
        return os.path.samestat(os.fstat(owner), os.stat("/proc/self/ns/user"))
    finally:
        os.close(owner)


def is_anchor(pid: int) -> bool:
    """Whether a process is the init of a node container: alone in the container's cgroup. Raises OSError."""
    with open(f"/proc/{pid}/cgroup", "rb") as file:
        return _ANCHOR_CGROUP.search(file.read()) is not None


def root_upper(pid: int) -> str | None:
    """The upper layer of the overlay that is the root of a process or thread; None when its root is none. Raises
    OSError.
    """
    left = _TABLE_BYTES
    with open(f"/proc/{pid}/mountinfo", "rb") as file:
        # It need not be the first: a view's root is younger than what was carried into it.
        for line in file:
            found = _ROOT_OVERLAY.match(line)
            if found is not None:
                return os.fsdecode(found[1])
            left -= len(line)
            if left < 0:
                break
    return None


def upper_in(entries: Iterable[MountEntry]) -> str | None:
    """The upper layer of the overlay that is the root of a mount table; None when the root is something else."""
    for entry in entries:
        if entry.target == "/" and entry.kind == "overlay":
            for option in entry.super_options:
                if option.startswith("upperdir="):
                    return option.removeprefix("upperdir=")
    return None


def _real_uid(pid: int) -> int:
    return int(read_status(pid)["Uid"].split()[0])
