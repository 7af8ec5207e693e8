"""A job step that is the first to want an image: one of its nodes brings it, once, and no node keeps any of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, cluster
from tests.support.oci import Image, busybox, digest_of, file, tar
from tests.support.registry import Registry
from tests.support.scratch import scratch
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.timeout(240, func_only=True)]

OWNER = 61903
ADDRESS = "192.0.2.1"
#: Random, so that it is as large in the store as it looks.
BULK = os.urandom(24 << 20)
IMAGE: Image = busybox(layers=[tar(file("opt/bulk", BULK)), tar(file("etc/edition", b"new"))])


@pytest.fixture(scope="module")
def fresh() -> Iterator[tuple[Cluster, Registry]]:
    """Two nodes, an empty store of a service account on a shared filesystem, and a registry on the first."""
    with scratch("fresh") as root:
        with Registry.start(root / "registry") as registry:
            registry.push_image("lab/app", "1", IMAGE)
        with cluster(root, nodes=2, prefix="f", store="gluster") as started:
            started.login.run(["chown", f"{OWNER}:{OWNER}", str(started.store)])
            with Registry.start(root / "registry", host=started.login, address=ADDRESS) as registry:
                for node in started.nodes.values():
                    with node.site.file.open("a") as site:
                        site.write(f'\n[registry."{registry.address}"]\nplain-http = true\n')
                    node.engine.restart()
                yield started, registry


def _kept_bytes(node_root: Path) -> int:
    """What a node's own directories hold, the logs of its daemons aside."""
    return sum(
        path.lstat().st_size for path in node_root.rglob("*") if path.is_file() and not path.name.endswith(".log")
    )


def test_a_step_on_two_nodes_brings_its_image_once(fresh: tuple[Cluster, Registry], alice: User) -> None:
    started, registry = fresh
    before = {name: _kept_bytes(node.host.root) for name, node in started.nodes.items()}
    words = started.inside(f"{registry.address}/lab/app:1", "sh", "-c", "cat /etc/edition; echo; sleep 1")
    done = started.srun("-N2", "-n8", "--overcommit", "--cpu-bind=none", *words, user=alice, timeout=120)
    assert done.stdout.decode().split() == ["new"] * 8, done
    asked = registry.requests("/v2/lab/app/blobs/")
    assert asked == {digest_of(blob): 1 for blob in IMAGE.blobs()[1]}
    assert done.stderr.count(b": pulled, ") == 1, done.stderr
    for name, node in started.nodes.items():
        grown = _kept_bytes(node.host.root) - before[name]
        assert grown < len(BULK) // 20, f"{name} has kept {grown} bytes"
    # A second step asks the registry nothing.
    everything = registry.requests("/v2/")
    started.srun("-N2", "-n2", *started.inside(f"{registry.address}/lab/app:1", "true"), user=alice)
    assert registry.requests("/v2/") == everything
