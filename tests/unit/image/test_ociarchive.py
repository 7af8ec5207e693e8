"""One image as a stream: what goes out comes in again, byte for byte."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from pathlib import Path

import pytest

from hpcctr.errors import ImageBroken
from hpcctr.image import ociarchive
from hpcctr.image.archive import LayoutSource, open_files
from hpcctr.image.platform import of_this_node
from hpcctr.image.reference import ImageRef
from tests.support.oci import Image, file, tar, write_layout

FIRST, SECOND = tar(file("a", b"1" * 70000)), tar(file("b", b"2"))
IMAGE = Image(layers=(FIRST, SECOND, FIRST), config={"Env": ["A=b"]}, compression=("gzip", "zstd", "gzip"))


def _layout(path: Path) -> LayoutSource:
    source = open_files(ImageRef.parse(f"oci:{path}"), str(path))
    assert isinstance(source, LayoutSource)
    return source


@pytest.mark.parametrize("docker", [False, True])
def test_the_stream_is_an_archive_with_the_image_and_no_other(tmp_path: Path, docker: bool) -> None:
    image = dataclasses.replace(IMAGE, docker=docker)
    others = [dataclasses.replace(image, architecture="s390x", layers=(SECOND,), compression="gzip"), image]
    layout = _layout(write_layout(tmp_path / "layout", others))
    found = layout.find("", of_this_node())
    out = io.BytesIO()
    ociarchive.write(out, layout, found, layout.open_layer, "x")
    (tmp_path / "archive.tar").write_bytes(out.getvalue())
    again = open_files(ImageRef.parse(f"oci-archive:{tmp_path}/archive.tar"), str(tmp_path))
    assert isinstance(again, LayoutSource)
    assert again.find("", of_this_node()) == found
    for layer in found.layers:
        with contextlib.closing(again.open_layer(layer)) as its, contextlib.closing(layout.open_layer(layer)) as ours:
            assert its.read(1 << 20) == ours.read(1 << 20)
    assert out.getvalue().count(b"blobs/sha256/") == 4  # manifest, config, two different layers


def test_a_layer_that_is_shorter_than_promised_ends_the_stream(tmp_path: Path) -> None:
    layout = _layout(write_layout(tmp_path / "layout", IMAGE))
    found = layout.find("", of_this_node())
    path = tmp_path / f"layout/blobs/{found.layers[0].digest.replace(':', '/')}"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ImageBroken, match="shorter"):
        ociarchive.write(io.BytesIO(), layout, found, layout.open_layer, "x")
