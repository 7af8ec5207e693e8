"""The marks of one engine in the store: made first, gone last, made true after a restart."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcctr.engine.uses import Uses
from hpcctr.errors import ImageNotInStore
from hpcctr.image.publish import remove_image
from hpcctr.image.shelves import private_path
from hpcctr.image.store import Store
from hpcctr.image.uses import Mark, close_gate, make_mark, marks
from tests.support.scratch import scratch
from tests.unit.image.test_publish import put

pytestmark = pytest.mark.root

OWNER = 61907
ONE, OTHER = "1" * 32, "2" * 32
NODE = os.uname().nodename


@pytest.fixture
def place() -> Iterator[Path]:
    with scratch("uses") as directory:
        yield directory


@pytest.fixture
def store(place: Path) -> Store:
    """A store of a service account's."""
    made = Store.open(str(place / "store"), writable=True)
    put(made, "a")
    _give(made)
    return made


def _give(store: Store) -> None:
    for directory, names, files in os.walk(store.path):
        for name in (".", *names, *files):
            os.chown(f"{directory}/{name}", OWNER, OWNER)


def _begin(uses: Uses, store: Store, digest: str, mount: str = ONE) -> None:
    path = f"{store.image_directory(digest)}/root.squashfs"
    image = os.open(path, os.O_RDONLY)
    try:
        uses.begin(mount, image=image, path=path)
    finally:
        os.close(image)


def _marked(store: Store, digest: str) -> list[tuple[str, str, str]]:
    return [(mark.node, mark.engine, mark.mount) for mark in marks(store.image_directory(digest))]


def _name(image: int, digest: str) -> str:
    return ONE if os.pread(image, 4, 0) == b"hsqs" else OTHER


def _make_true(uses: Uses, mounts: dict[str, str], *gone: str) -> None:
    uses.adopt(list(mounts))
    uses.make_true(mounts, name=_name, is_gone=lambda engine: engine in gone)


def test_a_mark_is_the_owners_and_lasts_from_the_first_mount_to_the_last(store: Store) -> None:
    (digest,) = store.digests()
    uses = Uses(store.path, engine="gateway")
    before = len(os.listdir("/proc/self/fd"))
    _begin(uses, store, digest)
    assert _marked(store, digest) == [(NODE, "gateway", ONE)]
    (file,) = Path(store.image_directory(digest), "uses").iterdir()
    assert (file.stat().st_uid, file.stat().st_gid, file.stat().st_mode & 0o777) == (OWNER, OWNER, 0o600)
    uses.end(ONE)
    assert _marked(store, digest) == []
    uses.end(ONE)
    assert len(os.listdir("/proc/self/fd")) == before
    assert (os.geteuid(), os.stat("/proc/self/task").st_uid) == (0, 0)


def test_two_engines_of_a_node_do_not_touch_each_others_marks(store: Store) -> None:
    (digest,) = store.digests()
    gateway, direct = Uses(store.path, engine="gateway"), Uses(store.path, engine="direct-4711")
    _begin(gateway, store, digest)
    _begin(direct, store, digest)
    gateway.end(ONE)
    assert _marked(store, digest) == [(NODE, "direct-4711", ONE)]
    _begin(gateway, store, digest)
    direct.end(ONE)
    assert _marked(store, digest) == [(NODE, "gateway", ONE)]
    gateway.end(ONE)


def test_an_image_that_is_being_removed_is_not_used(store: Store) -> None:
    (digest,) = store.digests()
    uses = Uses(store.path, engine="gateway")
    before = len(os.listdir("/proc/self/fd"))
    close_gate(store.image_directory(digest))
    with pytest.raises(ImageNotInStore, match="is being removed"):
        _begin(uses, store, digest)
    assert not Path(store.image_directory(digest), "uses").exists()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_image_that_was_replaced_since_its_file_was_opened_is_not_used(store: Store) -> None:
    (digest,) = store.digests()
    uses = Uses(store.path, engine="gateway")
    path = f"{store.image_directory(digest)}/root.squashfs"
    image = os.open(path, os.O_RDONLY)
    remove_image(store, digest)
    with pytest.raises(ImageNotInStore):
        uses.begin(ONE, image=image, path=path)
    put(store, "a")
    with pytest.raises(ImageNotInStore):
        uses.begin(ONE, image=image, path=path)
    os.close(image)
    assert _marked(store, digest) == []


def test_where_the_store_cannot_be_written_only_the_mark_is_missing(
    store: Store, capfd: pytest.CaptureFixture[str]
) -> None:
    (digest,) = store.digests()
    # As its owner the engine may not, as it is where a file server squashes root and the store is root's.
    os.chown(f"{store.image_directory(digest)}/uses", 0, 0)
    uses = Uses(store.path, engine="gateway")
    for _ in range(2):
        _begin(uses, store, digest)
        uses.end(ONE)
    _make_true(uses, {ONE: digest})
    assert capfd.readouterr().err.splitlines() == [
        "hpcctr-engine: uses of images are not marked in the store: Permission denied; hpcctr doctor"
    ]


def test_a_node_whose_name_is_no_name_marks_nothing(store: Store) -> None:
    (digest,) = store.digests()
    uses = Uses(store.path, engine="gateway")
    for name in ("../../x", "a+b", ""):
        uses._node = name
        _begin(uses, store, digest)
        _make_true(uses, {ONE: digest})
    assert _marked(store, digest) == []


def test_a_file_of_no_store_is_nobodys_to_mark(store: Store, place: Path) -> None:
    (place / "x").touch()
    image = os.open(place / "x", os.O_RDONLY)
    Uses(store.path, engine="gateway").begin(ONE, image=image, path=str(place / "x"))
    os.close(image)


def test_an_engine_that_starts_makes_its_marks_true_and_no_others(store: Store) -> None:
    (used,) = store.digests()
    unused = put(store, "b", content=b"other")
    for digest in (used, unused):
        directory = os.open(store.image_directory(digest), os.O_PATH)
        for engine in ("gateway", "direct-1", "direct-2"):
            make_mark(directory, Mark.file_of(NODE, engine, OTHER))
        make_mark(directory, Mark.file_of(f"{NODE}2", "gateway", OTHER))
        os.close(directory)
    _give(store)
    uses = Uses(store.path, engine="gateway")
    _make_true(uses, {ONE: used}, "direct-2")
    living = [(NODE, "direct-1", OTHER), (f"{NODE}2", "gateway", OTHER)]
    assert _marked(store, unused) == sorted(living)
    assert _marked(store, used) == sorted([*living, (NODE, "gateway", ONE)])
    uses.end(ONE)
    assert _marked(store, used) == sorted(living)


def test_a_mark_made_while_old_ones_are_cleared_stays(store: Store) -> None:
    """After a reboot a launch may mount the very file of which an old mark tells, before the marks are looked at."""
    (digest,) = store.digests()
    uses = Uses(store.path, engine="gateway")
    _begin(uses, store, digest)
    uses.make_true({}, name=_name, is_gone=lambda _: False)
    assert _marked(store, digest) == [(NODE, "gateway", ONE)]


def test_a_mount_that_went_before_its_mark_was_made_anew_gets_none(store: Store) -> None:
    (digest,) = store.digests()
    uses = Uses(store.path, engine="gateway")
    uses.adopt([ONE])
    uses.end(ONE)
    uses.make_true({ONE: digest}, name=_name, is_gone=lambda _: False)
    assert _marked(store, digest) == []


def test_a_users_image_and_one_that_is_leaving_are_marked_again_where_they_are(store: Store) -> None:
    (digest,) = store.digests()
    mine = Store.open(private_path(store.path, 4711), writable=True)
    own = put(mine, "own", content=b"own one")
    held = os.open(store.image_directory(digest), os.O_PATH)
    make_mark(held, Mark.file_of("n8", "gateway", OTHER))
    remove_image(store, digest)
    _give(store)
    uses = Uses(store.path, engine="gateway")
    _make_true(uses, {ONE: digest, OTHER: own})
    assert _marked(mine, own) == [(NODE, "gateway", OTHER)]
    (aside,) = Path(store.path, "leaving").iterdir()
    assert [mark.node for mark in marks(str(aside))] == sorted([NODE, "n8"])
    os.close(held)
