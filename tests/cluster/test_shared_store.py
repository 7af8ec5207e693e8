"""One store for two nodes on a filesystem whose server squashes root, and users who bring images into it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.cluster.gluster import gluster
from tests.cluster.hosts import hosts
from tests.support.node import Node, equipped
from tests.support.oci import busybox, file, tar, write_oci_archive
from tests.support.scratch import scratch
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.timeout(180, func_only=True)]

OWNER = 61902


@pytest.fixture(scope="module")
def squashed() -> Iterator[Mapping[str, Node]]:
    """Nodes whose root is nobody to the file server; the store is the service account's."""
    with (
        scratch("squashed") as root,
        hosts(root, count=2, prefix="q") as machines,
        gluster(root / "gluster", root / "store", machines) as shared,
    ):
        first = next(iter(machines.values()))
        first.run(["chown", f"{OWNER}:{OWNER}", str(root / "store")])
        shared.volume("set", "store", "server.root-squash", "on")
        assert first.run(["touch", f"{root}/store/roots"], check=False).returncode != 0
        with (
            equipped(machines["q1"], store=root / "store") as one,
            equipped(machines["q2"], store=root / "store") as two,
        ):
            yield {"q1": one, "q2": two}


def _archive(user: User, directory: Path, edition: str) -> Path:
    directory.mkdir(mode=0o700)
    path = write_oci_archive(directory / f"{edition}.tar", busybox(layers=[tar(file("etc/edition", edition.encode()))]))
    for each in (directory, path):
        os.chown(each, user.uid, user.gid)
    return path


def test_a_users_image_runs_on_every_node(squashed: Mapping[str, Node], alice: User, bob: User, place: Path) -> None:
    """Nobody but the store's owner can enter where it lies: not root either."""
    name = "localhost/mine:latest"
    archive = _archive(alice, place / "desk", "mine")
    squashed["q1"].hpcctr("pull", f"oci-archive:{archive}", user=alice)
    for node in squashed.values():
        assert node.run(name, "cat", "/etc/edition", user=alice).stdout == b"mine"
        assert node.run(name, "true", user=bob, flags=["--pull", "never"], check=125).stdout == b""


def test_root_brings_images_for_everyone(squashed: Mapping[str, Node], alice: User, bob: User, place: Path) -> None:
    name = "localhost/ours:latest"
    archive = _archive(alice, place / "desk", "ours")
    squashed["q2"].hpcctr("pull", f"oci-archive:{archive}")
    for node in squashed.values():
        for user in (alice, bob):
            assert node.run(name, "cat", "/etc/edition", user=user).stdout == b"ours"
    assert re.search(rb"ours", squashed["q1"].hpcctr("images").stdout)
    squashed["q1"].hpcctr("rm", name)
    assert not re.search(rb"ours", squashed["q2"].hpcctr("images").stdout)
