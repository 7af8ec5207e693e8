"""What a node asks of the shared filesystem: a little at the first use of an image, nothing for every further rank."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcctr.image.recall import FRESH_SECONDS
from tests.cluster.cluster import Cluster
from tests.cluster.gluster import Counter
from tests.support.node import Node
from tests.support.polling import wait_until
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.timeout(120, func_only=True)]


@pytest.fixture
def counter(shared_cluster: Cluster, busybox: str) -> Iterator[Counter]:
    """What the filesystem is asked for, while no node has the image mounted at first."""
    assert shared_cluster.gluster is not None
    wait_until(
        lambda: not any(_image_mounts(node) for node in shared_cluster.nodes.values()),
        seconds=30,
        what="the end of earlier image mounts",
    )
    with shared_cluster.gluster.counting() as counter:
        yield counter


def _image_mounts(node: Node) -> list[str]:
    return [mount.target for mount in node.host.mounts() if mount.kind in ("squashfs", "erofs")]


@contextlib.contextmanager
def _first_rank(cluster: Cluster, user: User, image: str) -> Iterator[None]:
    """A step of one rank on n2 that holds its node container until the end."""
    wait = cluster.inside(image, "sh", "-c", "echo started; cat")
    step = ["srun", "--quiet", "-w", "n2", "-n1", "--mem=100", *wait]
    rank = cluster.popen(step, user=user, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert rank.stdout is not None and rank.stdout.readline() == b"started\n"
    try:
        yield
    finally:
        rank.communicate(timeout=30)


def test_the_first_rank_of_a_node_opens_at_most_three_files(
    shared_cluster: Cluster, counter: Counter, alice: User, busybox: str
) -> None:
    """What the name means, what the image is, and its file. At most one is made, empty: the mark that the node uses the
    image.
    """
    with _first_rank(shared_cluster, alice, busybox):
        counts = counter.counted()
    assert 1 <= counts.get("OPEN", 0) <= 3, counts
    assert counts.get("CREATE", 0) <= 1, counts
    assert not {"OPENDIR", "READDIR", "READDIRP", "WRITE"} & set(counts), counts


@pytest.mark.parametrize("in_job", [True, False])
def test_further_ranks_of_a_node_open_nothing(
    shared_cluster: Cluster, counter: Counter, alice: User, busybox: str, in_job: bool
) -> None:
    """However many start. A step that says since when its job runs asks nobody what the name means by now; without
    that, it is as fresh as `FRESH_SECONDS`.
    """
    name = "localhost/first-use:1"
    shared_cluster.nodes["n1"].hpcctr("pull", "--name", name, busybox)
    env = {"HPCCTR_AS_OF": str(int(time.time()) - 1) if in_job else "now"}
    with _first_rank(shared_cluster, alice, name):
        counter.counted()
        begin = time.monotonic()
        further = shared_cluster.inside(name, "true")
        shared_cluster.srun("-w", "n2", "-n16", "--overcommit", "--mem=100", *further, user=alice, env=env)
        counts = counter.counted()
        seconds = time.monotonic() - begin
    assert counts.pop("OPEN", 0) <= (0 if in_job else 1 + seconds // FRESH_SECONDS), (counts, seconds)
    # Names already looked up may be looked up again when the client's caches of a second have run out.
    assert set(counts) <= {"LOOKUP", "STAT", "FSTAT", "READ", "FLUSH"}, counts


def test_a_node_keeps_no_part_of_an_image(shared_cluster: Cluster, alice: User, debian12: str) -> None:
    """Neither on disk nor in memory filesystems: the image is read through the mount of the one file."""
    show = ["sh", "-c", "cat /usr/bin/* > /dev/null; echo started; cat"]
    step = ["srun", "--quiet", "-w", "n2", "-n1", "--mem=400", *shared_cluster.inside(debian12, *show)]
    running = shared_cluster.popen(step, user=alice, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert running.stdout is not None and running.stdout.readline() == b"started\n"
    node = shared_cluster.nodes["n2"]
    try:
        kept = _large_files(node.host.root)
        for target in ("/run", "/tmp", "/dev/shm"):
            kept += _large_files(node.host.path(target))
    finally:
        running.communicate(timeout=30)
    assert not kept


def _large_files(directory: Path) -> list[str]:
    """Files of this filesystem that could be a part of an image; containerd's records and logs are smaller."""
    found = []
    device = directory.stat().st_dev
    for place, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if os.lstat(f"{place}/{name}").st_dev == device]
        for name in names:
            status = os.lstat(f"{place}/{name}")
            if status.st_dev == device and status.st_blocks * 512 > 300_000:
                found.append(f"{place}/{name}: {status.st_blocks * 512} bytes")
    return found
