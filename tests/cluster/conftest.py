"""One cluster of two nodes for all tests that leave it as it was, with a shared filesystem and accounting."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster, cluster
from tests.support.leftovers import require_nothing_new
from tests.support.mpi import open_mpi_version
from tests.support.scratch import scratch

# A device every machine has and nothing else here uses, handed out by Slurm one a node. Slurm 22.05 constrains the
# devices of its own plug-ins only, gres/gpu among them.
GPU = "/dev/full"


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[Cluster]:
    with (
        scratch("cluster") as root,
        cluster(
            root,
            nodes=2,
            store="gluster",
            accounted=True,
            node_conf="Gres=gpu:1",
            conf="GresTypes=gpu",
            files={"gres.conf": f"Name=gpu File={GPU}\n"},
        ) as started,
    ):
        before = started.leftovers()
        yield started
        started.wait_until_idle()
        require_nothing_new(before)


@pytest.fixture
def nothing_left(shared_cluster: Cluster) -> Iterator[None]:
    """The test may leave nothing new on any node: process, mount, loop device, container record, cgroup."""
    before = shared_cluster.leftovers()
    yield
    shared_cluster.wait_until_idle()
    require_nothing_new(before, seconds=30)


@pytest.fixture(scope="session")
def busybox(shared_cluster: Cluster, busybox_image: str) -> str:
    """A tiny image in the cluster's store."""
    shared_cluster.pull(busybox_image)
    return busybox_image


@pytest.fixture(scope="session")
def debian12(shared_cluster: Cluster, debian12_mpi_image: str) -> str:
    """Open MPI 4 and MPICH 4.0 in the cluster's store."""
    shared_cluster.pull(debian12_mpi_image)
    return debian12_mpi_image


@pytest.fixture(scope="session")
def debian13(shared_cluster: Cluster, debian13_mpi_image: str) -> str:
    """Open MPI 5 and a newer MPICH in the cluster's store."""
    shared_cluster.pull(debian13_mpi_image)
    return debian13_mpi_image


@pytest.fixture(scope="session")
def like_the_host(request: pytest.FixtureRequest) -> str:
    """The one of these two images that has the host's version of Open MPI."""
    name: str = request.getfixturevalue("debian13" if open_mpi_version() >= (5,) else "debian12")
    return name
