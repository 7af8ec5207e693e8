"""Documents of a source become one image, or say why not; every step is checked."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hpcctr.errors import HpcctrError, ImageBroken, NotAnImage, PlatformMissing
from hpcctr.image import platform as platforms
from hpcctr.image.source import DOCUMENT_MAX, Descriptor, SourceImage, fetch_document, image_of, parse, resolve
from hpcctr.image.verification import sha256_of
from tests.support.oci import OCI_CONFIG, OCI_INDEX, OCI_LAYER, OCI_MANIFEST, descriptor

AMD = platforms.parse("amd64")
LAYER = descriptor(b"layer", OCI_LAYER + "+gzip")
DIFF = sha256_of(b"layer, uncompressed")


class Documents:
    """A source in memory."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}

    def add(self, content: Any, media_type: str, **more: Any) -> dict[str, Any]:
        blob = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.blobs[sha256_of(blob)] = blob
        return descriptor(blob, media_type, **more)

    def document(self, descriptor: Descriptor) -> bytes:
        return self.blobs[descriptor.digest]

    def config(self, **change: Any) -> dict[str, Any]:
        config = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [DIFF]}, **change}
        return self.add(config, OCI_CONFIG)

    def manifest(self, **change: Any) -> dict[str, Any]:
        document = {"schemaVersion": 2, "config": self.config(), "layers": [LAYER], **change}
        return self.add(document, OCI_MANIFEST)

    def resolve(self, document: dict[str, Any] | bytes, wanted: str = "amd64") -> SourceImage:
        top = document if isinstance(document, bytes) else self.blobs[document["digest"]]
        return resolve(self, top, sha256_of(top), platforms.parse(wanted), "the image")


@pytest.fixture
def documents() -> Documents:
    return Documents()


def test_a_manifest_is_an_image(documents: Documents) -> None:
    words = {"Env": ["A=b"], "Entrypoint": ["/e"], "Cmd": None, "WorkingDir": "/w", "User": "1", "Labels": {"l": "v"}}
    manifest = documents.manifest(config=documents.config(config=words))
    image = documents.resolve(manifest)
    assert image.digest == manifest["digest"]
    assert [(layer.digest, layer.size, layer.diff_id) for layer in image.layers] == [(LAYER["digest"], 5, DIFF)]
    config = image.config
    assert (config.env, config.entrypoint, config.cmd, config.working_dir) == (("A=b",), ("/e",), (), "/w")
    assert (config.user, config.labels) == ("1", {"l": "v"})


def test_the_best_platform_of_an_index_is_taken(documents: Documents) -> None:
    entries = []
    for text in ("amd64", "linux/amd64/v2", "linux/arm/v6", "linux/arm/v7"):
        platform = platforms.parse(text)
        words = {"os": "linux", "architecture": platform.architecture, "variant": platform.variant}
        manifest = documents.manifest(config=documents.config(**words))
        entries.append({**manifest, "platform": words})
    attestation = {**documents.manifest(layers=[]), "platform": {"os": "unknown", "architecture": "unknown"}}
    index = documents.add({"schemaVersion": 2, "manifests": [attestation, *entries]}, OCI_INDEX)
    for wanted, chosen in {"amd64": 0, "linux/amd64/v3": 1, "linux/arm/v6": 2, "arm": 3}.items():
        assert documents.resolve(index, wanted).digest == entries[chosen]["digest"]
    with pytest.raises(PlatformMissing, match="exists for linux/amd64, .*linux/arm, .*not for linux/riscv64"):
        documents.resolve(index, "riscv64")


def test_entries_without_a_platform_are_asked(documents: Documents) -> None:
    other = documents.manifest(config=documents.config(architecture="arm64"))
    mine = documents.manifest()
    index = documents.add({"schemaVersion": 2, "manifests": [other, mine]}, OCI_INDEX)
    assert documents.resolve(index).digest == mine["digest"]


def test_indexes_in_indexes_have_an_end(documents: Documents) -> None:
    entry = documents.manifest()
    for _ in range(3):
        entry = documents.add({"schemaVersion": 2, "manifests": [entry]}, OCI_INDEX)
    assert documents.resolve(entry).platform == AMD
    for _ in range(3):
        entry = documents.add({"schemaVersion": 2, "manifests": [entry]}, OCI_INDEX)
    with pytest.raises(NotAnImage, match="indexes in indexes"):
        documents.resolve(entry)


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (b"", "cannot be read"),
        (b"[]", "cannot be read"),
        (b"{}", "neither an image nor an index"),
        (b'{"schemaVersion": 1, "fsLayers": []}', "schema 1"),
        (b'{"manifests": [], "layers": []}', "neither an image nor an index"),
        (b'{"layers": []}', "cannot be read"),
        (b'{"layers": [], "config": {"digest": 5, "size": 1}}', "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b" " * (DOCUMENT_MAX + 1), "larger than"),
    ],
)
def test_what_is_no_manifest_is_refused(documents: Documents, document: bytes, says: str) -> None:
    with pytest.raises(NotAnImage, match=says):
        documents.resolve(document)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"config": {**descriptor(b"{}", "application/vnd.cncf.helm.config.v1+json")}}, "helm.config"),
        ({"layers": [descriptor(b"x", "application/vnd.cncf.helm.chart.content.v1.tar+gzip")]}, "no filesystem"),
        ({"layers": [descriptor(b"x", OCI_LAYER + "+gzip+encrypted")]}, "encrypted"),
        ({"layers": [{**LAYER, "digest": "sha256:../../etc/passwd"}]}, "digest"),
        ({"layers": [{**LAYER, "digest": "md5:" + "0" * 32}]}, "digest"),
        ({"layers": [{**LAYER, "size": -1}]}, "bytes"),
        ({"layers": [LAYER, LAYER]}, "2 layers, but 1 diff ids"),
        ({"config": {**descriptor(b"x", OCI_CONFIG), "size": DOCUMENT_MAX + 1}}, "larger than"),
    ],
)
def test_a_manifest_that_is_no_image_is_refused(documents: Documents, change: dict[str, Any], says: str) -> None:
    with pytest.raises((NotAnImage, ImageBroken), match=says):
        documents.resolve(documents.manifest(**change))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"os": "windows"}, NotAnImage),
        ({"architecture": ""}, NotAnImage),
        ({"architecture": "../amd64"}, NotAnImage),
        ({"architecture": "arm64"}, PlatformMissing),
        ({"variant": "v3"}, PlatformMissing),
        ({"rootfs": {"diff_ids": ["sha256:x"]}}, ImageBroken),
        ({"rootfs": {}}, NotAnImage),
        ({"config": {"Env": "A=b"}}, NotAnImage),
    ],
)
def test_a_config_that_is_none_is_refused(
    documents: Documents, change: dict[str, Any], error: type[HpcctrError]
) -> None:
    with pytest.raises(error):
        documents.resolve(documents.manifest(config=documents.config(**change)))


def test_other_spellings_of_a_platform_are_the_same(documents: Documents) -> None:
    manifest = documents.manifest(config=documents.config(architecture="x86_64", variant="v1"))
    assert documents.resolve(manifest).platform == AMD


def test_a_document_that_is_not_what_was_promised_is_refused(documents: Documents) -> None:
    manifest = documents.manifest()
    config = json.loads(documents.blobs[manifest["digest"]])["config"]
    documents.blobs[config["digest"]] = documents.blobs[config["digest"]].replace(b"linux", b"Linux")
    with pytest.raises(ImageBroken, match="promised is"):
        documents.resolve(manifest)


def test_more_layers_than_any_image_has_are_refused() -> None:
    config = json.dumps({"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": [DIFF] * 600}}).encode()
    with pytest.raises(ImageBroken, match="600 layers"):
        image_of(config, None, DIFF, AMD, "the image", count=600)


def test_a_document_is_fetched_verified(documents: Documents) -> None:
    entry = documents.add(b"content", "text/plain")
    assert fetch_document(documents, Descriptor(digest=entry["digest"], size=7), "it") == b"content"
    with pytest.raises(ImageBroken):
        fetch_document(documents, Descriptor(digest=entry["digest"], size=8), "it")
    with pytest.raises(ImageBroken):
        fetch_document(documents, Descriptor(digest="sha256:short", size=7), "it")


def test_parsing_names_what_was_parsed() -> None:
    with pytest.raises(NotAnImage, match="it cannot be read"):
        parse(b"{", Descriptor, "it")
