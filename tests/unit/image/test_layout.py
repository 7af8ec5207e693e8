"""Kept blobs: an OCI layout that any number of pulls write, and that loses nothing that is needed."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from pathlib import Path

import pytest

from hpcctr.errors import ImageBroken
from hpcctr.image import layout
from hpcctr.image.gc import collect, find_garbage
from hpcctr.image.record import ImageConfig, Platform
from hpcctr.image.source import MANIFEST_TYPES, Descriptor, LayerBlob, SourceImage
from hpcctr.image.store import Store
from hpcctr.image.verification import sha256_of
from tests.unit.image.test_gc import age
from tests.unit.image.test_publish import put


class Source:
    """A registry's documents."""

    def __init__(self) -> None:
        self.documents: dict[str, bytes] = {}

    def document(self, descriptor: Descriptor) -> bytes:
        return self.documents[descriptor.digest]

    def add(self, content: bytes) -> str:
        self.documents[sha256_of(content)] = content
        return sha256_of(content)


def _image(source: Source, *layers: bytes, note: str = "") -> SourceImage:
    config = json.dumps({"note": note}).encode()
    manifest = {
        "mediaType": MANIFEST_TYPES[0],
        "config": {"digest": source.add(config), "size": len(config)},
        "layers": [{"digest": sha256_of(layer), "size": len(layer)} for layer in layers],
    }
    return SourceImage(
        digest=source.add(json.dumps(manifest).encode()),
        platform=Platform(os="linux", architecture="amd64"),
        config=ImageConfig(),
        layers=tuple(LayerBlob(digest=sha256_of(layer), size=len(layer), diff_id="") for layer in layers),
    )


def _keep(
    place: Path, source: Source, image: SourceImage, *layers: bytes, name: str = "r/app:1", since: str = "1"
) -> None:
    blobs = place / f"blobs-{image.digest[-8:]}"
    blobs.mkdir(exist_ok=True)
    for layer in layers:
        (blobs / sha256_of(layer).replace(":", "-")).write_bytes(layer)
    layout.keep(str(place / "layout"), source, image, str(blobs), name=name, since=since)


def _index(place: Path) -> dict[str, str]:
    """Digest to name."""
    index = json.loads((place / "layout/index.json").read_text())
    return {
        one["digest"]: one.get("annotations", {}).get("org.opencontainers.image.ref.name", "")
        for one in index["manifests"]
    }


def test_a_kept_image_is_whole_and_readable_for_all(tmp_path: Path) -> None:
    os.umask(0o077)
    try:
        source = Source()
        image = _image(source, b"one", b"two")
        _keep(tmp_path, source, image, b"one", b"two")
    finally:
        os.umask(0o022)
    assert _index(tmp_path) == {image.digest: "r/app:1"}
    blobs = list((tmp_path / "layout/blobs/sha256").iterdir())
    assert len(blobs) == 4
    assert all(hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name for blob in blobs)
    assert {blob.stat().st_mode & 0o777 for blob in blobs} == {0o644}
    assert json.loads((tmp_path / "layout/oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}


def test_a_name_is_the_newest_images_and_the_older_one_stays_without(tmp_path: Path) -> None:
    source = Source()
    old, new = _image(source, b"old"), _image(source, b"new")
    _keep(tmp_path, source, new, b"new", since="2026-02-01T00:00:00Z")
    _keep(tmp_path, source, old, b"old", since="2026-01-01T00:00:00Z")
    assert _index(tmp_path) == {old.digest: "", new.digest: "r/app:1"}


def test_pulls_at_once_lose_no_entry(tmp_path: Path) -> None:
    source = Source()
    images = [(_image(source, b"shared", bytes([number])), bytes([number])) for number in range(12)]
    for _ in range(3):
        for path in (tmp_path / "layout/.entries").glob("*"):
            path.unlink()
        barrier = threading.Barrier(len(images))

        def pull(number: int) -> None:
            image, layer = images[number]
            barrier.wait()  # noqa: B023
            _keep(tmp_path, source, image, b"shared", layer, name=f"r/app:{number}")

        threads = [threading.Thread(target=pull, args=(number,)) for number in range(len(images))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert _index(tmp_path) == {image.digest: f"r/app:{number}" for number, (image, _) in enumerate(images)}
    assert not [path for path in (tmp_path / "layout").iterdir() if path.name.startswith(".new")]


def test_what_is_there_is_lent_and_nothing_else(tmp_path: Path) -> None:
    source = Source()
    _keep(tmp_path, source, _image(source, b"one"), b"one")
    kept = str(tmp_path / "layout")
    assert layout.lend(kept, sha256_of(b"one"), str(tmp_path / "mine"))
    assert (tmp_path / "mine").read_bytes() == b"one"
    assert not layout.lend(kept, sha256_of(b"one"), str(tmp_path / "mine"))
    assert not layout.lend(kept, sha256_of(b"two"), str(tmp_path / "other"))
    assert not layout.lend(str(tmp_path / "none"), sha256_of(b"one"), str(tmp_path / "other"))


def test_a_manifest_that_is_another_one_keeps_nothing(tmp_path: Path) -> None:
    source = Source()
    image = _image(source, b"one")
    source.documents[image.digest] = b"{}"
    with pytest.raises(ImageBroken):
        _keep(tmp_path, source, image, b"one")
    assert not (tmp_path / "layout").exists()


def test_an_entry_whose_blobs_are_not_all_there_is_in_no_index(tmp_path: Path) -> None:
    source = Source()
    image = _image(source, b"one", b"two")
    _keep(tmp_path, source, image, b"one")
    assert _index(tmp_path) == {}
    _keep(tmp_path, source, image, b"two")
    assert _index(tmp_path) == {image.digest: "r/app:1"}


def _stored(store: Store, source: Source, seed: str, *layers: bytes) -> str:
    """An image of the store's whose blobs are kept; its digest is the store's."""
    digest = put(store, seed, f"{seed}:1")
    image = _image(source, *layers, note=seed)
    source.documents[digest] = source.documents[image.digest]
    renamed = SourceImage(digest=digest, platform=image.platform, config=image.config, layers=image.layers)
    # The test's images have digests that are nobody's manifest.
    entry = Path(store.path, "layout/.entries", f"{image.digest.replace(':', '-')}.json")
    _keep(Path(store.path), source, image, *layers, name=seed)
    entry.rename(entry.with_name(f"{renamed.digest.replace(':', '-')}.json"))
    return digest


def test_gc_takes_what_no_stored_image_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(str(tmp_path / "store"), writable=True)
    source = Source()
    gone, _ = _stored(store, source, "a", b"shared", b"a"), _stored(store, source, "b", b"shared", b"b")
    blobs = tmp_path / "store/layout/blobs/sha256"
    assert len(list(blobs.iterdir())) == 7
    layer = hashlib.sha256(b"a").hexdigest()
    for name in list(store.names()):
        if name[2].history[0].digest == gone:
            os.unlink(f"{store.path}/names/docker.io/library/a/1.amd64.json")
    age(store.image_directory(gone), 30)
    # Young blobs stay, whatever the entries say.
    assert [one.what for one in collect(store) if one.kind == "kept blob"] == []
    assert gone not in store.digests()
    monkeypatch.setattr("hpcctr.image.gc.file_servers_now", lambda _: time.time() + 7200)
    found = [one for one in find_garbage(store) if one.kind == "kept blob"]
    assert len(found) == 3 and f"layout/blobs/sha256/{layer}" in {one.what for one in found}
    assert [one.what for one in collect(store) if one.kind == "kept blob"] == [one.what for one in found]
    assert len(list(blobs.iterdir())) == 4
    assert (blobs / hashlib.sha256(b"shared").hexdigest()).exists()
    assert [one.kind for one in collect(store)] == []
