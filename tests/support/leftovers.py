"""What a test leaves behind: everything hpcctr could forget, read before and after and compared.

before = Leftovers.of(host, containerd)
...
require_nothing_new(before)
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.containerd import Containerd
from tests.support.host import Host
from tests.support.mountinfo import read_mountinfo
from tests.support.polling import wait_until
from tests.support.processes import Process, processes


def _cgroups(containers: Iterable[str]) -> Iterator[str]:
    """Cgroups in every mounted hierarchy that carry the name of one of these containers, and those of Slurm's jobs."""
    ids = set(containers)
    for mount in read_mountinfo():
        if mount.kind not in ("cgroup", "cgroup2"):
            continue
        for directory, _, _ in os.walk(mount.target):
            below = directory.removeprefix(mount.target)
            if ("slurm" in below and "job_" in below) or any(container_id in below for container_id in ids):
                yield f"cgroup {directory}"


def _loops(below: Iterable[Path]) -> Iterator[str]:
    """Loop devices whose file is below one of these directories."""
    for device in Path("/sys/block").glob("loop*"):
        try:
            backing = (device / "loop/backing_file").read_text().strip()
        except OSError:
            # Not attached, or detached this moment.
            continue
        if any(Path(backing).is_relative_to(directory) for directory in below):
            yield f"loop device {device.name} of {backing}"


def _files(host: Host) -> Iterator[str]:
    """Everything below /run/hpcctr, and every FIFO below /run."""
    run = host.path("/run")
    for directory, subdirectories, names in os.walk(run, onerror=lambda _: None):
        inside = Path("/run") / Path(directory).relative_to(run)
        for name in [*subdirectories, *names]:
            try:
                mode = os.lstat(Path(directory) / name).st_mode
            except FileNotFoundError:
                continue
            if stat.S_ISFIFO(mode):
                yield f"fifo {inside / name}"
            elif inside.is_relative_to("/run/hpcctr"):
                yield f"file {inside / name}"


def _holds(process: Process, device: str) -> bool:
    """Whether a process sees the loop device mounted, or holds a mount namespace open that may."""
    place = Path(f"/proc/{process.pid}")
    try:
        if any(mount.source == f"/dev/{device}" for mount in read_mountinfo(place / "mountinfo")):
            return True
        return any(os.readlink(descriptor).startswith("mnt:[") for descriptor in (place / "fd").iterdir())
    except OSError:
        # It has ended meanwhile.
        return False


def _explained(thing: str) -> str:
    """For the message: whom to ask about a loop device that stays."""
    if not thing.startswith("loop device "):
        return thing
    holders = [str(process) for process in processes() if _holds(process, thing.split()[2])]
    return f"{thing}; mounted for, or its namespace perhaps held by: {', '.join(holders) or 'no process'}"


@dataclass(frozen=True, kw_only=True)
class Leftovers:
    """One reading. Mounts count as often as they occur.

    Other tests may run on the machine: loop devices count whose file is below a Host's root or one of `below` (stores),
    cgroups that carry the name of a container of these containerds.
    """

    hosts: tuple[Host, ...]
    containerds: tuple[Containerd, ...]
    below: tuple[Path, ...]
    found: tuple[str, ...]

    @classmethod
    def of(cls, *things: Host | Containerd, below: Sequence[Path] = ()) -> Leftovers:
        """Read these Hosts and containerds, and the machine around them."""
        hosts = tuple(thing for thing in things if isinstance(thing, Host))
        containerds = tuple(thing for thing in things if isinstance(thing, Containerd))
        return cls(
            hosts=hosts,
            containerds=containerds,
            below=tuple(below),
            found=tuple(_read(hosts, containerds, (*below, *(host.root for host in hosts)))),
        )

    def again(self) -> Leftovers:
        return Leftovers.of(*self.hosts, *self.containerds, below=self.below)

    def new_since(self, before: Leftovers) -> tuple[str, ...]:
        remaining = list(before.found)
        new = []
        for thing in self.found:
            if thing in remaining:
                remaining.remove(thing)
            else:
                new.append(thing)
        return tuple(new)


def _read(hosts: Iterable[Host], containerds: Sequence[Containerd], below: Sequence[Path]) -> Iterator[str]:
    # Records first: asking for them starts `ctr`, which must be gone when processes are read.
    for containerd in containerds:
        yield from (f"containerd container {container_id}" for container_id in containerd.containers())
        yield from (f"containerd task {task_id} {status}" for task_id, status in containerd.tasks().items())
    yield from (f"mount {mount}" for mount in read_mountinfo())
    yield from _loops(below)
    yield from _cgroups(container_id for containerd in containerds for container_id in containerd.created())
    for host in hosts:
        yield from (f"mount {mount} (in {host.root.name})" for mount in host.mounts())
        yield from (f"process {process}" for process in host.processes())
        yield from _files(host)


def require_nothing_new(before: Leftovers, *, seconds: float = 15) -> None:
    """Wait for everything new to go away by itself; fail with the list of what stays."""
    remaining: tuple[str, ...] = ()

    def nothing_new() -> bool:
        nonlocal remaining
        remaining = before.again().new_since(before)
        return not remaining

    wait_until(nothing_new, seconds=seconds, what=lambda: "the end of\n  " + "\n  ".join(map(_explained, remaining)))
