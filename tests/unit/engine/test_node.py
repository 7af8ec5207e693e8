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


def test_each_value_has_a_namespace_of_its_own() -> None:
    reader, writer = os.pipe()
    one = NodeContainer(
        container_id="k-1",
        key="k",
        uid=1000,
        image_digest="sha256:0",
        namespace=reader,
        image_mount="m",
        created=0.0,
    )
    other = one.again()
    one.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reader)
    assert os.path.samestat(os.fstat(other.namespace), os.fstat(writer)) and other.container_id == "k-1"
    other.close()
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
