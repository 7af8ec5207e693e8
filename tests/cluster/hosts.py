"""The machines of a cluster: Hosts with names, addresses on a wire of their own, and their own /run, /tmp and /dev/shm.

Open MPI chooses its transports by host name and address, and names its rendezvous and shared-memory files after them.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.support import namespace_ids
from tests.support.host import Host
from tests.support.polling import wait_until

# For documentation (RFC 5737): nobody has it.
_ADDRESS = "192.0.2.{}"
SITE_DIRECTORY = Path("/etc/hpcctr")
"""Where every node has its own site.toml, as sites do."""


def _write_addresses(file: Path, names: Sequence[str]) -> None:
    lines = [f"{_ADDRESS.format(number)} {name}" for number, name in enumerate(names, 1)]
    file.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))


def _own_directories(host: Host, root: Path) -> None:
    for directory in ("/tmp", "/dev/shm"):
        host.run(["mount", "-t", "tmpfs", "-o", "mode=1777,nosuid,nodev", "tmpfs", directory])
    host.run(["mount", "--bind", str(root / "hosts"), "/etc/hosts"])
    host.run(["mount", "--bind", str(host.root), str(SITE_DIRECTORY)])


def _wire(hosts: Sequence[Host]) -> None:
    """Connect the hosts by a bridge in the first one."""
    first, *others = hosts
    first.run(["ip", "link", "add", "wire", "type", "bridge"])
    first.run(["ip", "address", "add", f"{_ADDRESS.format(1)}/24", "dev", "wire"])
    first.run(["ip", "link", "set", "wire", "up"])
    for number, other in enumerate(others, 2):
        near = f"to-n{number}"
        peer = ["peer", "name", "wire", "netns", str(other.holder.pid)]
        first.run(["ip", "link", "add", near, "type", "veth", *peer])
        first.run(["ip", "link", "set", near, "master", "wire", "up"])
        other.run(["ip", "address", "add", f"{_ADDRESS.format(number)}/24", "dev", "wire"])
        other.run(["ip", "link", "set", "wire", "up"])


@contextlib.contextmanager
def _alone(prefix: str) -> Iterator[None]:
    """slurmd names cgroups after its node, and the machine has one tree of them, whichever Debian it shows: of all
    clusters one at a time has nodes of these names. An abstract socket (unix(7)) goes with its process.
    """
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as name:

        def is_ours() -> bool:
            try:
                name.bind(f"\0hpcctr-test-cluster.{prefix}")
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                return False
            return True

        wait_until(is_ours, seconds=300, what=f"the end of another cluster with a node {prefix}1 on this machine")
        yield


@contextlib.contextmanager
def hosts(root: Path, *, count: int, prefix: str = "n", cgroup2_only: bool = False) -> Iterator[Mapping[str, Host]]:
    """Start n1, n2 …, each with its directory ROOT/NAME; they end with everything that runs in them."""
    names = [f"{prefix}{number}" for number in range(1, count + 1)]
    _write_addresses(root / "hosts", names)
    SITE_DIRECTORY.mkdir(mode=0o755, exist_ok=True)
    started = {}
    with _alone(prefix), contextlib.ExitStack() as stack:
        for name in names:
            (root / name).mkdir(mode=0o755)
            with namespace_ids.lowest():
                host = Host.start(root / name, own_network=True, cgroup2_only=cgroup2_only, hostname=name)
            started[name] = stack.enter_context(host)
            _own_directories(host, root)
        _wire(list(started.values()))
        yield started
