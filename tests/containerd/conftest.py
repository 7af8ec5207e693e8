"""Fixtures of the tests against a real containerd: image file, engine, and the check that nothing is left."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.containerd import Containerd
from tests.support.node_engine import NodeEngine, node_engine
from tests.support.polling import wait_until
from tests.support.scratch import scratch
from tests.support.squashfs import make_squashfs


@pytest.fixture(scope="session")
def image() -> Iterator[Path]:
    """An image file of busybox."""
    with scratch("image") as directory:
        yield make_squashfs(directory / "root.squashfs")


def left(containerd: Containerd, image: Path) -> set[str]:
    """What node containers consist of, in the Host of a containerd that may have been restarted."""
    host = containerd.host
    found = {f"container {container_id}" for container_id in containerd.containers()}
    found |= {f"task {task_id}" for task_id in containerd.tasks()}
    found |= {f"mount {mount}" for mount in host.mounts() if mount.kind in ("overlay", "squashfs", "tmpfs")}
    found |= {f"process {process}" for process in host.processes() if process.name not in ("containerd", "ctr")}
    for device in Path("/sys/block").glob("loop*/loop/backing_file"):
        # It may be detached between any two looks at it.
        with contextlib.suppress(OSError):
            if device.read_text().strip() == str(image):
                found.add(f"loop device {device.parent.parent.name}")
    for directory, _, _ in os.walk(host.path("/run/hpcctr")):
        found.add(f"directory {directory}")
    return found - {f"directory {host.path('/run/hpcctr')}"}


@pytest.fixture
def clean(own_containerd: Containerd, image: Path) -> Iterator[Containerd]:
    """containerd and its host; the test may leave nothing new."""
    before = left(own_containerd, image)
    yield own_containerd
    remaining: set[str] = set()

    def nothing_new() -> bool:
        nonlocal remaining
        remaining = left(own_containerd, image) - before
        return not remaining

    wait_until(nothing_new, what=lambda: "the end of\n  " + "\n  ".join(sorted(remaining)))


@pytest.fixture
def engine(clean: Containerd, image: Path) -> Iterator[NodeEngine]:
    """An engine with nothing built."""
    with node_engine(clean, image) as running:
        yield running
