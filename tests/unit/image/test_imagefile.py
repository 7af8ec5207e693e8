"""The file root mounts: nobody but root and the store's owner can have written it, or it is refused by name."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from hpcctr.errors import ImageBroken, StoreUnusable
from hpcctr.image.imagefile import open_image_file
from hpcctr.image.record import ImageConfig, ImageRecord, Platform, StoredImage
from hpcctr.image.verification import sha256_of

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")


@pytest.fixture
def store() -> Iterator[Path]:
    """A store in a place that everybody may enter; pytest's own directories are one user's."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        os.chmod(directory, 0o755)
        store = Path(directory) / "a/store"
        (store / "images/sha256-1").mkdir(parents=True)
        (store / "images/sha256-1/root.squashfs").write_bytes(b"hsqs")
        yield store


def image_in(store: Path) -> StoredImage:
    record = ImageRecord(
        schema=1,
        digest=sha256_of(b""),
        platform=Platform(os="linux", architecture="amd64"),
        config=ImageConfig(),
        file="root.squashfs",
        file_size=4,
        file_digest=sha256_of(b"hsqs"),
        content_size=0,
        entries=1,
        created="2026-01-01T00:00:00Z",
        source="test",
    )
    return StoredImage(record=record, path=f"{store}/images/sha256-1/root.squashfs", name="x")


def content_of(store: Path, image: StoredImage | None = None) -> bytes:
    descriptor = open_image_file(str(store), image or image_in(store))
    try:
        assert os.get_inheritable(descriptor) is False
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(descriptor, b"x")
        return os.read(descriptor, 100)
    finally:
        os.close(descriptor)


def test_a_file_of_roots_is_opened_for_reading_only(store: Path) -> None:
    assert content_of(store) == b"hsqs"


def test_a_store_reached_through_a_link_is_the_store(store: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(store)
    assert content_of(tmp_path / "link") == b"hsqs"


def test_no_descriptor_stays_open(store: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    content_of(store)
    (store / "images/sha256-1").chmod(0o777)
    with pytest.raises(StoreUnusable):
        content_of(store)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("place", ["..", ".", "images", "images/sha256-1", "images/sha256-1/root.squashfs"])
@pytest.mark.parametrize("bits", [stat.S_IWGRP, stat.S_IWOTH])
def test_what_others_can_write_is_refused_by_name(store: Path, place: str, bits: int) -> None:
    path = (store / place).resolve()
    path.chmod(path.stat().st_mode | bits)
    with pytest.raises(StoreUnusable, match="can be changed by others") as caught:
        content_of(store)
    assert f"{path} can" in str(caught.value)
    assert str(path) in caught.value.hint


@as_root
@pytest.mark.parametrize("place", ["..", "images", "images/sha256-1", "images/sha256-1/root.squashfs"])
def test_what_belongs_to_somebody_else_is_refused(store: Path, place: str) -> None:
    os.chown(store / place, 12345, 12345)
    with pytest.raises(StoreUnusable, match="uid 12345"):
        content_of(store)


@as_root
def test_the_account_that_owns_the_store_may_own_what_is_in_it(store: Path) -> None:
    for path in (store, *store.rglob("*")):
        os.chown(path, 12345, 12345)
    assert content_of(store) == b"hsqs"


def test_a_sticky_directory_above_is_fine_and_one_inside_is_not(store: Path) -> None:
    store.parent.chmod(0o1777)
    assert content_of(store) == b"hsqs"
    (store / "images").chmod(0o1777)
    with pytest.raises(StoreUnusable):
        content_of(store)


def replace_by_link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("how", [replace_by_link, replace_by_directory, replace_by_fifo])
def test_what_is_no_plain_file_is_refused(store: Path, how: Callable[[Path], None]) -> None:
    how(store / "images/sha256-1/root.squashfs")
    with pytest.raises(StoreUnusable):
        content_of(store)


def test_a_directory_that_is_a_link_is_refused(store: Path) -> None:
    replace_by_link(store / "images/sha256-1")
    with pytest.raises(StoreUnusable):
        content_of(store)


@pytest.mark.parametrize("path", ["/etc/passwd", "{store}/../../etc/passwd", "{store}/images/../../x", "{store}x/y"])
def test_a_path_outside_the_store_is_refused(store: Path, path: str) -> None:
    image = msgspec.structs.replace(image_in(store), path=path.format(store=store))
    with pytest.raises(StoreUnusable, match="not in the store"):
        content_of(store, image)


def test_a_file_of_another_size_is_broken(store: Path) -> None:
    (store / "images/sha256-1/root.squashfs").write_bytes(b"hsqs and more")
    with pytest.raises(ImageBroken, match="13 bytes, 4 were published"):
        content_of(store)


def test_a_missing_file_is_named(store: Path) -> None:
    (store / "images/sha256-1/root.squashfs").unlink()
    with pytest.raises(StoreUnusable, match="no such file"):
        content_of(store)
