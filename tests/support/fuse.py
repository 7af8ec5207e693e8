"""A filesystem that one user has mounted and root cannot look into: bindfs without allow_other.

Stands in for sshfs, for encrypted homes, and for file servers that know no root (root-squash).
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
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
