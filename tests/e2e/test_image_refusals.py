"""What is no image, or a broken one, is refused by name, and leaves nothing."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcctr.errors import (
    HpcctrError,
    ImageBroken,
    NotAnImage,
    RegistryFailed,
    StoreUnusable,
)
from hpcctr.image import platform as platforms
from hpcctr.site import Site
from tests.support.oci import (
    OCI_CONFIG,
    OCI_LAYER,
    OCI_MANIFEST,
    busybox,
    compress,
    descriptor,
    digest_of,
    directory,
    file,
    hardlink,
    tar,
    write_docker_archive,
    write_files,
    write_layout,
    write_oci_archive,
)
from tests.support.pulling import SMALL, nothing_is_left, pulled
from tests.support.registry import Registry


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(store=str(tmp_path / "store"))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry.start(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.mark.parametrize("repository", ["nothing/here:1", "hpc/known:2"])
def test_what_a_registry_has_not_is_said_so(registry: Registry, site: Site, repository: str) -> None:
    registry.push_image("hpc/known", "1", SMALL)
    with pytest.raises(RegistryFailed, match="has no .*manifest unknown"):
        pulled(f"{registry.address}/{repository}", site)


def test_credentials_of_dockers_file_are_used(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with Registry.start(tmp_path / "registry", user="alice", password="secret") as private:
        private.push_image("app", "1", SMALL)
        monkeypatch.setenv("HOME", str(tmp_path))
        with pytest.raises(RegistryFailed, match="wants credentials") as caught:
            pulled(f"{private.address}/app:1", site)
        assert "login" in caught.value.hint
        (tmp_path / ".docker").mkdir()
        config = tmp_path / ".docker/config.json"
        config.write_text(private.docker_config())
        assert pulled(f"{private.address}/app:1", site).image.record.digest == SMALL.digest
        config.write_text(dataclasses.replace(private, password="wrong").docker_config())
        with pytest.raises(RegistryFailed, match="does not take the credentials"):
            pulled(f"{private.address}/app:1", site)
        config.write_text("{")
        with pytest.raises(RegistryFailed, match="logging in failed"):
            pulled(f"{private.address}/app:1", site)


def test_a_registry_with_a_certificate_nobody_vouches_for_is_refused(tmp_path: Path, site: Site) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "cert")]
    subprocess.run(command, check=True, capture_output=True)
    with Registry.start(tmp_path / "r", certificate=tmp_path / "cert", key=tmp_path / "key") as private:
        with pytest.raises(RegistryFailed) as caught:
            pulled(f"{private.address}/app:1", site)
        assert "400" in str(caught.value) or "TLS" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [("127.0.0.1:1/x:1", "refuses connections"), ("registry.invalid/x:1", "there is no host registry.invalid")],
)
def test_a_registry_that_is_not_there_is_said_so(site: Site, text: str, says: str) -> None:
    with pytest.raises(RegistryFailed, match=says):
        pulled(text, site)


def test_a_damaged_blob_of_a_registry_is_not_published(tmp_path: Path, site: Site) -> None:
    with Registry.start(tmp_path / "registry") as own:
        own.push_image("app", "1", SMALL)
        layer = own.blob_file(digest_of(SMALL.blobs()[1][1]))
        content = bytearray(layer.read_bytes())
        content[len(content) // 2] ^= 1
        layer.write_bytes(content)
        with pytest.raises((ImageBroken, RegistryFailed)):
            pulled(f"{own.address}/app:1", site)
    assert nothing_is_left(site)


def broken_layout(tmp_path: Path, blob: bytes, *, diff_id: str = "", said: bytes | None = None) -> str:
    """A layout whose one layer is ``blob``; its manifest is about ``said`` when given."""
    config = json.dumps(
        {
            "os": "linux",
            "architecture": platforms.of_this_node().architecture,
            "rootfs": {"type": "layers", "diff_ids": [diff_id or digest_of(blob)]},
        }
    ).encode()
    layer = descriptor(blob if said is None else said, OCI_LAYER)
    manifest = json.dumps({"schemaVersion": 2, "config": descriptor(config, OCI_CONFIG), "layers": [layer]}).encode()
    files = {f"blobs/sha256/{digest_of(part)[7:]}": part for part in (config, manifest)}
    files["blobs/sha256/" + layer["digest"][7:]] = blob
    files["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [descriptor(manifest, OCI_MANIFEST)]}).encode()
    return f"oci:{write_files(tmp_path / 'broken', files)}"


GOOD = tar(directory("d"), file("d/x", b"content" * 1000))


@pytest.mark.parametrize(
    ("blob", "diff_id", "says"),
    [
        (gzip.compress(GOOD)[:-20], digest_of(GOOD), "cut off"),
        (gzip.compress(GOOD)[:-6] + b"\0" * 6, digest_of(GOOD), "gzip"),
        (gzip.compress(GOOD) + b"junk", digest_of(GOOD), "gzip"),
        (compress(GOOD, "zstd")[:-10], digest_of(GOOD), "cut off|diff|digest"),
        (gzip.compress(GOOD), digest_of(b"other"), "has the digest"),
        (GOOD[:1024], digest_of(GOOD[:1024]), "cut off"),
        (b"this is no tar stream" * 100, "", "not a tar stream"),
        (b"BZh91AY&SY" + b"x" * 600, "", "bzip2"),
        (tar(file("a/../../etc/passwd", b"x")), "", r"'\.\.' in its path"),
        (tar(hardlink("l", "/etc/shadow")), "", "hard link l to /etc/shadow, which is nothing"),
        (tar(file("sparse", pax={"GNU.sparse.major": b"1"})), "", "sparse"),
    ],
)
def test_a_broken_layer_is_named_and_leaves_nothing(
    tmp_path: Path, site: Site, blob: bytes, diff_id: str, says: str
) -> None:
    with pytest.raises(ImageBroken, match=says):
        pulled(broken_layout(tmp_path, blob, diff_id=diff_id), site)
    assert nothing_is_left(site)


def test_a_blob_that_is_not_what_the_manifest_promises_is_refused(tmp_path: Path, site: Site) -> None:
    other = tar(directory("d"), file("d/x", b"CONTENT" * 1000))
    with pytest.raises(ImageBroken, match="promised is"):
        pulled(broken_layout(tmp_path, other, diff_id=digest_of(other), said=GOOD), site)
    assert nothing_is_left(site)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("index.json", None, "has no index.json"),
        ("index.json", b"{", "cannot be read"),
        ("index.json", b'{"manifests": []}', "has no image"),
        ("blobs/sha256/" + SMALL.digest[7:], None, "lacks blobs"),
        ("blobs/sha256/" + SMALL.digest[7:], b"{}", "promises"),
        ("blobs/sha256/" + digest_of(SMALL.blobs()[1][1])[7:], None, "lacks the blob"),
    ],
)
def test_an_incomplete_layout_is_named(tmp_path: Path, site: Site, name: str, content: bytes | None, says: str) -> None:
    layout = write_layout(tmp_path / "x", SMALL)
    if content is None:
        (layout / name).unlink()
    else:
        (layout / name).write_bytes(content)
    with pytest.raises((ImageBroken, NotAnImage), match=says):
        pulled(f"oci:{layout}", site)
    assert nothing_is_left(site)


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_an_archive_that_ends_early_is_named(tmp_path: Path, site: Site, kind: str, share: float) -> None:
    whole = tmp_path / "app.tar"
    if kind == "oci-archive":
        write_oci_archive(whole, busybox())
    else:
        write_docker_archive(whole, busybox())
    content = whole.read_bytes()
    whole.write_bytes(content[: int(len(content) * share)])
    with pytest.raises((ImageBroken, NotAnImage)):
        pulled(f"{kind}:{whole}", site)
    assert nothing_is_left(site)


def test_files_that_are_no_images_are_refused_by_name(tmp_path: Path, site: Site) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "plain.tar").write_bytes(tar(file("a", b"1")))
    os.mkfifo(tmp_path / "fifo")
    docker = write_docker_archive(tmp_path / "docker.tar", SMALL)
    oci = write_oci_archive(tmp_path / "oci.tar", SMALL)
    for text, says in {
        f"oci-archive:{tmp_path}/none": "no such file",
        f"oci-archive:{tmp_path}": "not a regular file",
        f"oci-archive:{tmp_path}/fifo": "not a regular file",
        f"oci:{tmp_path}/text": "not a directory",
        f"oci-archive:{tmp_path}/text": "cut off|tar stream",
        f"oci-archive:{tmp_path}/plain.tar": "no index.json",
        f"docker-archive:{tmp_path}/plain.tar": "no manifest.json",
        f"oci-archive:{docker}": "docker save",
        f"docker-archive:{oci}": "is an OCI archive",
    }.items():
        with pytest.raises((NotAnImage, ImageBroken), match=says):
            pulled(text, site)
    assert nothing_is_left(site)


def test_errors_of_a_pull_say_what_to_do(tmp_path: Path) -> None:
    for store in ("/proc/store", str(tmp_path / "file")):
        (tmp_path / "file").write_text("")
        with pytest.raises(HpcctrError) as caught:
            pulled(f"oci:{write_layout(tmp_path / 'x', SMALL)}", Site(store=store))
        assert isinstance(caught.value, StoreUnusable)
        assert store in str(caught.value)
