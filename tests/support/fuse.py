"""Filesystems in user space: bindfs.

One that a user has mounted and root cannot look into stands in for sshfs, for encrypted homes, and for file servers
that know no root (root-squash). One of root's whose server can fall silent stands in for a file server that hangs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.host import Host
from tests.support.polling import wait_until
from tests.support.users import User


def _is_mounted(host: Host, point: Path) -> bool:
    return any(mount.target == str(point) for mount in host.mounts())


def _unmount(host: Host, user: User, point: Path) -> None:
    host.run(["fusermount3", "-u", "-z", str(point)], user=user, check=False)
    wait_until(lambda: not _is_mounted(host, point), what=f"the end of the mount on {point}")


@contextlib.contextmanager
def mounted(host: Host, user: User, source: Path, point: Path) -> Iterator[None]:
    """Show SOURCE at POINT, both the user's, as a filesystem of that user's own."""
    host.run(["bindfs", "--no-allow-other", str(source), str(point)], user=user)
    try:
        yield
    finally:
        _unmount(host, user, point)


@contextlib.contextmanager
def dead(host: Host, user: User, source: Path, point: Path) -> Iterator[None]:
    """The same, and then its server dies: whoever looks at POINT is told ENOTCONN, as below a file server that went."""
    server = host.popen(["bindfs", "-f", "--no-allow-other", str(source), str(point)], user=user)
    try:
        wait_until(lambda: _is_mounted(host, point), what=f"the mount on {point}")
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
        yield
    finally:
        _unmount(host, user, point)


@dataclass(frozen=True, kw_only=True)
class FileServer:
    """The server of one filesystem."""

    process: subprocess.Popen[bytes]

    def fall_silent(self) -> None:
        """From now on nothing is answered: who waits for it, waits."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def answer(self) -> None:
        """Answer again, also what was asked meanwhile."""
        os.kill(self.process.pid, signal.SIGCONT)


@contextlib.contextmanager
def served(host: Host, source: Path, point: Path) -> Iterator[FileServer]:
    """Show SOURCE at POINT to root, by a server that can fall silent, as the one below a cluster's store may."""
    server = host.popen(["bindfs", "-f", str(source), str(point)])
    made = FileServer(process=server)
    try:
        wait_until(lambda: _is_mounted(host, point), what=f"the mount on {point}")
        yield made
    finally:
        made.answer()
        host.run(["umount", "--lazy", str(point)])
