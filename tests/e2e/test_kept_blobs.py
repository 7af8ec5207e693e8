"""Where a site keeps blobs, they are a layout for every tool, and no layer crosses the network twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.node import Node, node
from tests.support.oci import Image, busybox, digest_of, file, tar, write_oci_archive
from tests.support.registry import Registry
from tests.support.scratch import scratch
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]

OWNER = 61908
SHARED = tar(file("usr/shared", os.urandom(500_000)))


@pytest.fixture
def keeping() -> Iterator[Node]:
    """A node of a site that keeps blobs, with a store of a service account's."""
    with scratch("keeping") as place, node(place) as started:
        started.site.file.write_text(f"keep-blobs = true\n{started.site.file.read_text()}")
        os.chown(started.site.store, OWNER, OWNER)
        started.engine.restart()
        yield started


def _fetched(registry: Registry, repository: str) -> dict[str, int]:
    """How often each of its blobs was asked for."""
    return registry.requests(f"/v2/{repository}/blobs/")


def _directory(node: Node, name: str) -> Path:
    facts = json.loads(node.hpcctr("inspect", "--format", "json", name).stdout)
    return node.site.store / "images" / str(facts["digest"]).replace(":", "-")


def _layers(node: Node, name: str) -> list[str]:
    """By the manifest that is kept."""
    path = node.site.store / "layout/blobs/sha256" / _directory(node, name).name[len("sha256-") :]
    return [str(layer["digest"]) for layer in json.loads(path.read_text())["layers"]]


def test_layers_that_images_share_and_repairs_cost_no_download(keeping: Node, alice: User, registry: Registry) -> None:
    one, two = f"{registry.address}/one:1", f"{registry.address}/two:1"
    registry.push_image("one", "1", busybox(layers=[SHARED]))
    registry.push_image("two", "1", busybox(layers=[SHARED, tar(file("two"))]))
    keeping.run(one, "true", user=alice)
    keeping.run(two, "test", "-e", "/two", user=alice)
    layers = {name: _layers(keeping, name) for name in (one, two)}
    assert set(layers[one]) < set(layers[two]) and len(layers[two]) == len(layers[one]) + 1
    assert set(layers[one]) <= set(_fetched(registry, "one"))
    assert set(_fetched(registry, "two")) & set(layers[two]) == set(layers[two]) - set(layers[one])
    before = _fetched(registry, "two")
    with (_directory(keeping, two) / "root.squashfs").open("r+b") as damaged:
        damaged.seek(5000)
        damaged.write(b"damage")
    assert b"pulled" in keeping.hpcctr("pull", "--verify", two, user=alice).stderr
    after = _fetched(registry, "two")
    assert [before.get(layer) for layer in layers[two]] == [after.get(layer) for layer in layers[two]]
    keeping.run(two, "test", "-e", "/two", user=alice)
    owners = {(path.lstat().st_uid, path.lstat().st_mode & 0o022) for path in keeping.site.store.rglob("*")}
    assert owners == {(OWNER, 0)}


def test_other_tools_read_the_layout(keeping: Node, alice: User, registry: Registry, place: Path) -> None:
    name = f"{registry.address}/app:1"
    registry.push_image("app", "1", busybox(layers=[SHARED]))
    keeping.hpcctr("pull", name, user=alice)
    layout = keeping.site.store / "layout"
    (entry,) = json.loads((layout / "index.json").read_text())["manifests"]
    reference = entry["annotations"]["org.opencontainers.image.ref.name"]
    assert reference == name
    if shutil.which("skopeo") is None:
        pytest.fail("skopeo is not installed")
    said = subprocess.run(["skopeo", "inspect", f"oci:{layout}:{reference}"], capture_output=True, check=True).stdout
    assert json.loads(said)["Digest"] == entry["digest"]
    copied = place / "copied"
    argv = ["skopeo", "copy", "--insecure-policy", f"oci:{layout}:{reference}", f"dir:{copied}"]
    subprocess.run(argv, capture_output=True, check=True)
    assert digest_of((copied / "manifest.json").read_bytes()) == entry["digest"]
    if shutil.which("umoci"):
        said = subprocess.run(["umoci", "ls", "--layout", layout], capture_output=True, check=True).stdout
        assert said.decode().split() == [reference]
    # And hpcctr itself.
    keeping.hpcctr("pull", f"oci:{layout}:{reference}", "--name", "copy:1")


def test_blobs_go_with_the_last_image_that_needs_them(keeping: Node, alice: User, registry: Registry) -> None:
    for name, layers in (("one", [SHARED]), ("two", [SHARED, tar(file("two"))])):
        registry.push_image(name, "1", busybox(layers=layers))
        keeping.hpcctr("pull", f"{registry.address}/{name}:1", user=alice)
    blobs = keeping.site.store / "layout/blobs/sha256"
    before = len(list(blobs.iterdir()))
    keeping.hpcctr("rm", f"{registry.address}/two:1")
    keeping.hpcctr("gc")
    (entry,) = json.loads((keeping.site.store / "layout/index.json").read_text())["manifests"]
    assert entry["annotations"]["org.opencontainers.image.ref.name"].endswith("/one:1")
    # Within the hour a pull may be keeping what no entry names yet.
    assert len(list(blobs.iterdir())) == before


def test_what_users_bring_for_themselves_and_other_sites_pulls_are_not_kept(
    keeping: Node, own_node: Node, alice: User, registry: Registry, place: Path
) -> None:
    archive = write_oci_archive(place / "mine.tar", busybox())
    os.chown(archive, alice.uid, alice.gid)
    keeping.hpcctr("pull", f"oci-archive:{archive}", user=alice)
    registry.push_image("app", "1", Image(layers=(tar(file("x")),)))
    keeping.hpcctr("pull", "--private", f"{registry.address}/app:1", user=alice)
    assert not list(keeping.site.store.rglob("layout"))
    own_node.hpcctr("pull", f"{registry.address}/app:1")
    assert not list(own_node.site.store.rglob("layout"))
    assert not list((own_node.site.store / "blobs").iterdir())
