"""Fixtures every test may use: users, directories, hosts, nodes, images, and the check that nothing is left."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import containerd, images
from tests.support.host import Host
from tests.support.leftovers import Leftovers, require_nothing_new
from tests.support.node import Node, node
from tests.support.scratch import scratch
from tests.support.users import User, users

_SCRUBBED = ("HPCCTR_", "SLURM_", "CUDA_", "OMPI_", "PMI_", "PMIX_")


@pytest.fixture(autouse=True)
def scrubbed_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees what the person running the tests has set for hpcctr, a scheduler or MPI."""
    for name in list(os.environ):
        if name.startswith(_SCRUBBED):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def test_users() -> Iterator[tuple[User, ...]]:
    with users("hpcctr-a", "hpcctr-b") as made:
        yield made


@pytest.fixture(scope="session")
def alice(test_users: tuple[User, ...]) -> User:
    """An ordinary user with extra groups."""
    return test_users[0]


@pytest.fixture(scope="session")
def bob(test_users: tuple[User, ...]) -> User:
    """Another ordinary user, with the same extra groups."""
    return test_users[1]


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory for this test, owned by root, that everyone may walk through."""
    # Sockets lie below it, and their names have at most 107 bytes (unix(7)).
    with scratch(re.sub(r"[^a-z0-9_]+", ".", request.node.name)[:24]) as directory:
        yield directory


@pytest.fixture
def host(place: Path) -> Iterator[Host]:
    """A bare Host for this test alone."""
    with Host.start(place) as started:
        yield started


@pytest.fixture(scope="session")
def shared_node() -> Iterator[Node]:
    """One node for all tests that leave it as it was; at the end of the session nothing new may be left on it."""
    with scratch("node") as root, node(root) as started:
        before = Leftovers.of(started.host, started.containerd)
        yield started
        require_nothing_new(before)


@pytest.fixture
def own_node(place: Path) -> Iterator[Node]:
    """A node for this test alone."""
    with node(place) as started:
        yield started


@pytest.fixture
def nothing_left(shared_node: Node) -> Iterator[None]:
    """The test may leave nothing new on the shared node, once the engine's linger is over."""
    before = Leftovers.of(shared_node.host, shared_node.containerd)
    yield
    require_nothing_new(before)


@pytest.fixture(scope="session")
def own_containerd() -> Iterator[containerd.Containerd]:
    """A containerd without any engine, in a Host of its own."""
    with scratch("containerd") as root, Host.start(root) as started:
        daemon = containerd.start(started)
        yield daemon
        daemon.stop()


@pytest.fixture(scope="session")
def busybox_image() -> str:
    """Name of a tiny image: busybox in all its links, as `oci:DIRECTORY`."""
    return images.busybox()


@pytest.fixture(scope="session")
def debian12_mpi_image() -> str:
    """Name of a real image of Debian 12 with Open MPI 4.1 and MPICH, as `oci-archive:FILE`."""
    return images.debian_mpi("bookworm")


@pytest.fixture(scope="session")
def debian13_mpi_image() -> str:
    """Name of a real image of Debian 13 with Open MPI 5 and a newer MPICH, as `oci-archive:FILE`."""
    return images.debian_mpi("trixie")


@pytest.fixture(scope="session")
def debian_tools_image() -> str:
    """Name of a real image of Debian with vim, less, gdb, strace and python3, as `oci-archive:FILE`."""
    return images.debian_tools()
