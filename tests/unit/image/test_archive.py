"""Layouts and archives: the image is found in any of their shapes, and what is missing or ambiguous is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from hpcctr.errors import HpcctrError, ImageBroken, NotAnImage
from hpcctr.image.archive import ArchiveFiles, DirectoryFiles, DockerArchive, LayoutSource, find_image, open_files
from hpcctr.image.platform import of_this_node
from hpcctr.image.reference import ImageRef
from hpcctr.image.source import SourceImage
from tests.support.oci import (
    Image,
    digest_of,
    directory,
    docker_archive_files,
    file,
    hardlink,
    layout_files,
    symlink,
    tar,
    write_docker_archive,
    write_files,
    write_layout,
    write_oci_archive,
)

IMAGE = Image(layers=(tar(file("a", b"1")), tar(file("b", b"2"))))
OTHER = Image(layers=(tar(file("other", b"1")),))
HERE = of_this_node()


def found(text: str, workspace: Path) -> SourceImage:
    ref = ImageRef.parse(text)
    source = open_files(ref, str(workspace))
    image = find_image(source, ref, HERE)
    for layer in image.layers:
        reader = source.open_layer(layer)
        assert reader.read(10)
        reader.close()
    return image


def two_images(path: Path) -> Path:
    """A layout with two images, each under a reference."""
    files = layout_files(IMAGE, ref="one") | {}
    second = layout_files(OTHER, ref="two")
    index = json.loads(files["index.json"])
    index["manifests"] += json.loads(second["index.json"])["manifests"]
    return write_files(path, {**second, **files, "index.json": json.dumps(index).encode()})


def test_the_only_image_of_a_layout_is_found_with_and_without_its_reference(tmp_path: Path) -> None:
    layout = write_layout(tmp_path / "x", IMAGE, ref="quay.io/a/b:1")
    archive = write_oci_archive(tmp_path / "x.tar", IMAGE, ref="quay.io/a/b:1")
    for text in (f"oci:{layout}", f"oci-archive:{archive}"):
        assert found(text, tmp_path).digest == IMAGE.digest
        assert found(f"{text}:quay.io/a/b:1", tmp_path).digest == IMAGE.digest
        with pytest.raises(NotAnImage, match="no image 'v2'") as caught:
            found(f"{text}:v2", tmp_path)
        assert "quay.io/a/b:1" in caught.value.hint


def test_of_several_images_one_must_be_chosen(tmp_path: Path) -> None:
    layout = two_images(tmp_path / "x")
    assert found(f"oci:{layout}:one", tmp_path).digest == IMAGE.digest
    assert found(f"oci:{layout}:two", tmp_path).digest == OTHER.digest
    with pytest.raises(NotAnImage, match="several images") as caught:
        found(f"oci:{layout}", tmp_path)
    assert f"{layout}:one" in caught.value.hint


def test_a_docker_archive_has_the_digest_of_its_config(tmp_path: Path) -> None:
    archive = write_docker_archive(tmp_path / "x.tar", IMAGE, tags=["a:1"])
    image = found(f"docker-archive:{archive}", tmp_path)
    assert image.digest == digest_of(IMAGE.config_bytes())
    assert [layer.digest for layer in image.layers] == ["", ""]


def test_a_compressed_archive_is_decompressed_into_the_workspace(tmp_path: Path) -> None:
    archive = tmp_path / "x.tar.gz"
    archive.write_bytes(gzip.compress(write_oci_archive(tmp_path / "x.tar", IMAGE).read_bytes()))
    workspace = tmp_path / "work"
    workspace.mkdir()
    assert found(f"oci-archive:{archive}", workspace).digest == IMAGE.digest
    assert [path.name for path in workspace.iterdir()] == ["archive.tar"]


def test_layers_that_are_links_to_others_are_found(tmp_path: Path) -> None:
    files = docker_archive_files(Image(layers=(IMAGE.layers[0], IMAGE.layers[0], IMAGE.layers[0])))
    names = json.loads(files["manifest.json"])[0]["Layers"]
    members = [file(name, content) for name, content in files.items() if name not in names[1:]]
    members += [symlink(names[1], f"../{names[0]}"), hardlink(names[2], names[0])]
    (tmp_path / "x.tar").write_bytes(tar(*members))
    assert len(found(f"docker-archive:{tmp_path}/x.tar", tmp_path).layers) == 3


def test_members_that_lead_nowhere_are_missing(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(
        tar(symlink("loop", "loop"), symlink("out", "../../etc/passwd"), symlink("abs", "/etc/passwd"), directory("d"))
    )
    files = ArchiveFiles(str(tmp_path / "x.tar"), "x.tar")
    for name in ("loop", "out", "abs", "d", "none", "../etc/passwd"):
        assert not files.has(name)
        assert files.open(name) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (b"{", "cannot be read"),
        (b"[]", "has 0 images"),
        (b'[{"Config": "none.json", "Layers": []}]', "lacks none.json"),
        (b'[{"Config": "../../../etc/passwd", "Layers": []}]', "lacks"),
    ],
)
def test_a_docker_archive_with_a_wrong_manifest_is_refused(tmp_path: Path, change: bytes, says: str) -> None:
    files = {**docker_archive_files(IMAGE), "manifest.json": change}
    (tmp_path / "x.tar").write_bytes(tar(*(file(name, content) for name, content in files.items())))
    with pytest.raises((NotAnImage, ImageBroken), match=says):
        found(f"docker-archive:{tmp_path}/x.tar", tmp_path)


def test_a_docker_archive_of_several_images_is_refused_with_their_tags(tmp_path: Path) -> None:
    files = docker_archive_files(IMAGE, tags=["a:1"])
    files["manifest.json"] = json.dumps(json.loads(files["manifest.json"]) * 2).encode()
    (tmp_path / "x.tar").write_bytes(tar(*(file(name, content) for name, content in files.items())))
    with pytest.raises(NotAnImage, match="has 2 images") as caught:
        found(f"docker-archive:{tmp_path}/x.tar", tmp_path)
    assert "a:1" in caught.value.hint


def test_a_config_that_is_not_what_its_name_promises_is_refused(tmp_path: Path) -> None:
    files = docker_archive_files(IMAGE)
    name = json.loads(files["manifest.json"])[0]["Config"]
    files[name] = files[name].replace(b'"test"', b'"evil"')
    (tmp_path / "x.tar").write_bytes(tar(*(file(path, content) for path, content in files.items())))
    with pytest.raises(ImageBroken, match="has the digest"):
        found(f"docker-archive:{tmp_path}/x.tar", tmp_path)


def test_a_missing_layer_is_named(tmp_path: Path) -> None:
    layout = write_layout(tmp_path / "x", IMAGE)
    blob = digest_of(IMAGE.blobs()[1][2])
    (layout / "blobs/sha256" / blob[7:]).unlink()
    with pytest.raises(ImageBroken, match=f"lacks the blob {blob}"):
        found(f"oci:{layout}", tmp_path)


def test_an_archive_of_another_kind_is_told_apart(tmp_path: Path) -> None:
    docker, oci = write_docker_archive(tmp_path / "d.tar", IMAGE), write_oci_archive(tmp_path / "o.tar", IMAGE)
    with pytest.raises(NotAnImage) as caught:
        LayoutSource(ArchiveFiles(str(docker), "d.tar"))
    assert "docker-archive:FILE" in caught.value.hint
    with pytest.raises(NotAnImage) as caught:
        DockerArchive(ArchiveFiles(str(oci), "o.tar"))
    assert "oci-archive:FILE" in caught.value.hint
    with pytest.raises(NotAnImage, match="no index.json"):
        LayoutSource(DirectoryFiles(str(tmp_path)))


@pytest.mark.parametrize("cut", [100, 600, 3000])
def test_an_archive_that_ends_early_is_named(tmp_path: Path, cut: int) -> None:
    archive = write_oci_archive(tmp_path / "x.tar", IMAGE)
    archive.write_bytes(archive.read_bytes()[:cut])
    with pytest.raises(HpcctrError, match="x.tar"):
        found(f"oci-archive:{archive}", tmp_path)
