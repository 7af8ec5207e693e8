"""The parts of a node container that need no containerd; tests/containerd has the rest."""

from __future__ import annotations

import os

import pytest

from hpcctr.containerd import Containerd
from hpcctr.engine.imagemount import ImageMounts
from hpcctr.engine.node import NodeBuilder, NodeContainer
from hpcctr.errors import ContainerdFailed


@pytest.fixture
def builder() -> NodeBuilder:
    return NodeBuilder(
        containerd=Containerd("/nothing.sock"),
        images=ImageMounts("/nothing/images"),
        directory="/nothing/containers",
        owner="test",
    )


def test_the_namespace_is_open_as_long_as_somebody_has_the_container() -> None:
    reader, writer = os.pipe()
    container = NodeContainer(
        container_id="k-1",
        key="k",
        uid=1000,
        image_digest="sha256:0",
        namespace=reader,
        image_mount="m",
        created=0.0,
    )
    held = container
    del container
    assert os.fstat(held.namespace)
    del held
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reader)
    os.close(writer)


def test_a_process_in_the_engines_own_namespace_is_no_container(builder: NodeBuilder) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ContainerdFailed, match="k-1 is not what was asked for: its namespace is the node's own"):
        builder.open_namespace("k-1", os.getpid())
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("pid", [0, 2**22 + 1])
def test_a_pid_of_nobody_is_no_container(builder: NodeBuilder, pid: int) -> None:
    with pytest.raises(ContainerdFailed, match="its init has ended"):
        builder.open_namespace("k-1", pid)
