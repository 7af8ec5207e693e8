"""Images reach the store from every source, and the right one of several is taken."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcctr.errors import (
    ImageNotInStore,
    PlatformMissing,
)
from hpcctr.image import platform as platforms
from hpcctr.image.publish import remove
from hpcctr.image.pull import Progress
from hpcctr.image.store import Store
from hpcctr.site import Site
from tests.support.oci import (
    Compression,
    Image,
    busybox,
    descriptor,
    digest_of,
    file,
    layout_files,
    tar,
    whiteout,
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


# every source


def sources(tmp_path: Path, image: Image) -> dict[str, str]:
    """The image in every kind of file, by reference."""
    plain = write_docker_archive(tmp_path / "saved.tar", image, tags=["python:3.12"])
    (tmp_path / "saved.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    return {
        f"oci:{write_layout(tmp_path / 'layout', image, ref='v1')}:v1": "localhost/layout:v1",
        f"oci-archive:{write_oci_archive(tmp_path / 'app.tar', image)}": "localhost/app:latest",
        f"docker-archive:{plain}": "localhost/saved:latest",
        f"docker-archive:{tmp_path / 'saved.tar.gz'}": "localhost/saved:latest",
    }


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_an_image_comes_from_every_kind_of_file(tmp_path: Path, site: Site, compression: Compression) -> None:
    image = dataclasses.replace(busybox(), compression=compression)
    for text, name in sources(tmp_path, image).items():
        result = pulled(text, site)
        assert result.name == name
        assert Store.open(site.store).find(name).record == result.image.record
        assert Store.open(site.store).find(text).record == result.image.record
        assert result.image.record.passwd.startswith(b"root:x:0:0")
        assert result.image.record.group.startswith(b"root:x:0:")
        assert result.image.record.config.cmd == ("/bin/sh",)


@pytest.mark.parametrize("docker", [False, True])
@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_an_image_comes_from_a_registry(registry: Registry, site: Site, docker: bool, compression: Compression) -> None:
    layers = [tar(file(f"layer{number}", os.urandom(5000))) for number in range(6)]
    image = dataclasses.replace(busybox(layers=layers), compression=compression, docker=docker)
    tag = f"{compression}-{docker}"
    digest = registry.push_image("hpc/app", tag, image)
    seen: list[Progress] = []
    result = pulled(f"{registry.address}/hpc/app:{tag}", site, progress=seen.append)
    assert (result.image.record.digest, result.was_stored) == (digest, False)
    assert {event.stage for event in seen} == {"download", "read", "write"}
    for stage in ("download", "read", "write"):
        last = [event for event in seen if event.stage == stage][-1]
        assert last.done == last.total > 0
    assert pulled(f"{registry.address}/hpc/app:{tag}", site).was_stored
    by_digest = pulled(f"docker://{registry.address}/hpc/app@{digest}", site)
    assert by_digest.name == f"{registry.address}/hpc/app@{digest}"
    assert Store.open(site.store).find(by_digest.name).record.digest == digest


def test_skopeo_and_a_registry_carry_an_image_here_unchanged(tmp_path: Path, registry: Registry, site: Site) -> None:
    archive = write_oci_archive(tmp_path / "app.tar", busybox(), ref="x")
    for kind in ("oci", "v2s2"):
        target = f"{registry.address}/copied:{kind}"
        subprocess.run(
            ["skopeo", "copy", "--insecure-policy", "--format", kind, "--dest-tls-verify=false"]
            + [f"oci-archive:{archive}", f"docker://{target}"],
            check=True,
            capture_output=True,
        )
        assert pulled(target, site).image.record.config.cmd == ("/bin/sh",)


def test_the_same_image_gives_the_same_file(tmp_path: Path, site: Site) -> None:
    archive = write_oci_archive(tmp_path / "app.tar", busybox(layers=[tar(whiteout("bin/vi"))]))
    first = pulled(f"oci-archive:{archive}", site).image.record
    remove(Store.open(site.store), first.digest)
    second = pulled(f"oci-archive:{archive}", site).image.record
    assert first.file_digest == second.file_digest


@pytest.mark.parametrize("damage", ["file gone", "file cut", "record gone", "record damaged"])
def test_a_damaged_image_is_pulled_again(tmp_path: Path, site: Site, damage: str) -> None:
    text = f"oci-archive:{write_oci_archive(tmp_path / 'app.tar', busybox())}"
    image = pulled(text, site).image
    path = Path(image.path)
    if damage == "file gone":
        path.unlink()
    elif damage == "file cut":
        os.truncate(path, 1000)
    elif damage == "record gone":
        (path.parent / "image.json").unlink()
    else:
        (path.parent / "image.json").write_text("{")
    result = pulled(text, site)
    assert not result.was_stored
    assert result.image.record.file_digest == image.record.file_digest
    os.close(Store.open(site.store).open_image_file(result.image))


def test_the_record_tells_size_and_digest_of_the_file(tmp_path: Path, site: Site) -> None:
    image = pulled(f"oci-archive:{write_oci_archive(tmp_path / 'app.tar', busybox())}", site).image
    content = Path(image.path).read_bytes()
    assert image.record.file_size == len(content)
    assert image.record.file_digest == f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_everybody_can_read_what_a_pull_with_a_tight_umask_wrote(tmp_path: Path, site: Site) -> None:
    earlier = os.umask(0o077)
    try:
        pulled(f"oci-archive:{write_oci_archive(tmp_path / 'app.tar', SMALL)}", site)
    finally:
        os.umask(earlier)
    for path in Path(site.store).rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        expected = 0o700 if path.name in ("tmp", "blobs", "claims", "uses") else 0o755 if path.is_dir() else 0o644
        assert (str(path), oct(mode)) == (str(path), oct(expected))
        assert path.stat().st_uid == os.geteuid()


# choice


def test_the_right_image_of_an_index_is_taken(tmp_path: Path, registry: Registry, site: Site) -> None:
    members = {
        "linux/amd64": Image(layers=(tar(file("amd64")),), architecture="amd64"),
        "linux/arm64": Image(layers=(tar(file("arm64")),), architecture="arm64", variant="v8"),
        "linux/arm/v6": Image(layers=(tar(file("v6")),), architecture="arm", variant="v6"),
        "linux/arm": Image(layers=(tar(file("v7")),), architecture="arm", variant="v7"),
    }
    registry.push_image("multi", "1", list(members.values()))
    layout = write_layout(tmp_path / "multi", list(members.values()))
    for text in (f"{registry.address}/multi:1", f"oci:{layout}"):
        for wanted, image in members.items():
            result = pulled(text, site, platform=platforms.parse(wanted))
            assert result.image.record.digest == image.digest
            assert str(result.image.record.platform) == wanted
            assert Store.open(site.store).find(result.name, platforms.parse(wanted)).record.digest == image.digest
        with pytest.raises(PlatformMissing, match="linux/arm64"):
            pulled(text, site, platform=platforms.parse("riscv64"))
    with pytest.raises(PlatformMissing, match="linux/amd64, linux/arm, linux/arm-v6|linux/amd64"):
        Store.open(site.store).find(f"{registry.address}/multi:1", platforms.parse("s390x"))


def test_an_index_in_an_index_is_followed(tmp_path: Path, site: Site) -> None:
    files = layout_files([SMALL, dataclasses.replace(SMALL, architecture="riscv64")])
    inner = json.loads(files["index.json"])["manifests"][0]
    outer = json.dumps({"schemaVersion": 2, "manifests": [inner]}).encode()
    files[f"blobs/sha256/{digest_of(outer)[7:]}"] = outer
    files["index.json"] = json.dumps(
        {"schemaVersion": 2, "manifests": [descriptor(outer, "application/vnd.oci.image.index.v1+json")]}
    ).encode()
    assert pulled(f"oci:{write_files(tmp_path / 'x', files)}", site).image.record.digest == SMALL.digest


def test_an_image_for_another_processor_is_refused(tmp_path: Path, site: Site) -> None:
    archive = write_oci_archive(tmp_path / "app.tar", dataclasses.replace(SMALL, architecture="s390x"))
    with pytest.raises(PlatformMissing, match="is for linux/s390x") as caught:
        pulled(f"oci-archive:{archive}", site)
    assert "--platform linux/s390x" in caught.value.hint
    assert nothing_is_left(site)
    assert (
        pulled(f"oci-archive:{archive}", site, platform=platforms.parse("linux/s390x")).name == "localhost/app:latest"
    )


def test_a_name_of_choice(tmp_path: Path, site: Site) -> None:
    archive = write_oci_archive(tmp_path / "app.tar", SMALL)
    assert pulled(f"oci-archive:{archive}", site, name="tools/app:2").name == "docker.io/tools/app:2"
    assert Store.open(site.store).find("tools/app:2").record.digest == SMALL.digest
    with pytest.raises(ImageNotInStore):
        Store.open(site.store).find("localhost/app")


def test_another_file_of_the_same_name_is_not_taken_for_it(tmp_path: Path, site: Site) -> None:
    for place in ("one", "two"):
        write_oci_archive(tmp_path / place / "app.tar", SMALL)
    pulled(f"oci-archive:{tmp_path}/one/app.tar", site)
    with pytest.raises(ImageNotInStore):
        Store.open(site.store).find(f"oci-archive:{tmp_path}/two/app.tar")
