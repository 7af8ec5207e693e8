"""What a user's images may still take, counted by what lies in the user's part."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcctr.errors import StoreUnusable
from hpcctr.image.publish import remove_image
from hpcctr.image.store import Store
from hpcctr.storekeeper.room import Room
from tests.unit.image.test_publish import put
from tests.unit.image.test_uses import mark


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "users/4711"), writable=True)


def grow(store: Store, name: str, size: int) -> None:
    path = Path(store.path, "tmp", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))


def test_what_grows_counts_beside_what_is_there(store: Store) -> None:
    room = Room(part=store.path, limit=100_000)
    assert (room.left("archives"), room.left("images")) == (100_000, 100_000)
    grow(store, "pull-1-a/archive", 1000)
    grow(store, "pull-2-b/archive", 2000)
    grow(store, "pull-2-c/root.squashfs", 300)
    grow(store, "pull-3-d/publish/root.squashfs", 500)
    assert (room.left("archives"), room.left("images")) == (97_000, 99_200)
    put(store, "a", content=bytes(10_000))
    assert 85_000 < room.left("archives") <= 87_000


def test_an_image_that_was_removed_while_it_runs_counts_until_it_has_gone(store: Store) -> None:
    """Else who runs an image, removes it and brings the next one had no limit."""
    room = Room(part=store.path, limit=100_000)
    digest = put(store, "a", content=bytes(60_000))
    mark(store.image_directory(digest))
    remove_image(store, digest)
    assert room.left("images") < 40_001


def test_too_much_is_an_error_with_the_remedy(store: Store) -> None:
    room = Room(part=store.path, limit=10_000)
    grow(store, "pull-1-a/archive", 10_000)
    room.require("archives")
    grow(store, "pull-1-b/archive", 1)
    with pytest.raises(StoreUnusable) as raised:
        room.require("archives")
    assert "10000 bytes" in raised.value.message and "bytes-per-uid" in raised.value.hint
    room.require("images")


def test_where_nothing_is_yet_all_is_left(tmp_path: Path) -> None:
    assert Room(part=str(tmp_path / "none"), limit=5).left("images") == 5
