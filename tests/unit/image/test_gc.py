"""Putting the store in order: what goes, and what never does."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from hpcctr.errors import StoreUnusable
from hpcctr.image import gc, publish
from hpcctr.image.gc import DAY, Garbage, collect, drop_unfinished, find_garbage
from hpcctr.image.publish import remove, set_name
from hpcctr.image.record import Platform
from hpcctr.image.reference import ImageRef
from hpcctr.image.store import Store
from tests.unit.image.test_publish import put

AMD = Platform(os="linux", architecture="amd64")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"), writable=True)


def age(path: str | Path, days: float) -> None:
    """Let all below a path have been written so many days ago."""
    moment = time.time() - days * DAY
    for directory, names, files in os.walk(path, topdown=False):
        for name in (*names, *files):
            os.utime(f"{directory}/{name}", (moment, moment), follow_symlinks=False)
    os.utime(path, (moment, moment))


def rename_days_ago(store: Store, monkeypatch: pytest.MonkeyPatch, name: str, digest: str, days: float) -> None:
    """Let a name mean an image from so many days ago on."""
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - days * DAY))
    with monkeypatch.context() as patch:
        patch.setattr(publish, "now", lambda: moment)
        set_name(store, ImageRef.parse(name), AMD, digest)


def kinds(garbage: list[Garbage]) -> list[tuple[str, str]]:
    return [(one.kind, one.what) for one in garbage]


def test_an_image_goes_some_days_after_its_name_went_to_another(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = put(store, "old", content=b"x" * 100), put(store, "new")
    for digest in (old, new):
        age(store.image_directory(digest), 30)
    rename_days_ago(store, monkeypatch, "app:1", old, 30)
    rename_days_ago(store, monkeypatch, "app:1", new, 5)
    assert find_garbage(store) == []
    (garbage,) = find_garbage(store, image_days=4)
    assert (garbage.kind, garbage.what) == ("image", old)
    assert garbage.size > 100
    assert 4.9 < garbage.age / DAY < 5.1
    # Looking takes nothing away.
    assert set(store.digests()) == {old, new}
    assert kinds(collect(store, image_days=4)) == [("image", old)]
    assert store.digests() == [new]
    assert not os.listdir(f"{store.path}/tmp")


def test_an_image_that_any_name_means_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = put(store, "a"), put(store, "b")
    for digest in (first, second):
        age(store.image_directory(digest), 30)
    rename_days_ago(store, monkeypatch, "app:1", first, 30)
    rename_days_ago(store, monkeypatch, "app:1", second, 20)
    rename_days_ago(store, monkeypatch, "kept:1", first, 30)
    assert collect(store, image_days=0) == []


def test_an_image_that_was_just_published_stays_whatever_is_asked(store: Store) -> None:
    put(store, "new")
    assert collect(store, image_days=0) == []


def test_an_image_that_never_had_a_name_goes_by_its_age(store: Store) -> None:
    digest = put(store, "a")
    age(store.image_directory(digest), 8)
    assert kinds(collect(store)) == [("image", digest)]


def test_a_damaged_image_without_a_name_goes_as_well(store: Store) -> None:
    digest = put(store, "a")
    Path(store.image_directory(digest), "image.json").write_text("{")
    assert find_garbage(store) == []
    age(store.image_directory(digest), 8)
    assert kinds(collect(store)) == [("damaged image", digest)]
    assert store.digests() == []


def test_an_image_that_this_node_has_mounted_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = put(store, "a")
    age(store.image_directory(digest), 30)
    monkeypatch.setattr(gc, "_mounted_here", lambda: [f"{store.image_directory(digest)}/root.squashfs"])
    assert collect(store) == []


def test_a_name_that_comes_back_in_the_last_moment_saves_its_image(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = put(store, "a")
    age(store.image_directory(digest), 30)
    garbage = find_garbage(store)
    monkeypatch.setattr(gc, "find_garbage", lambda *_, **__: garbage)
    set_name(store, ImageRef.parse("app:1"), AMD, digest)
    assert collect(store) == []
    assert store.digests() == [digest]


@pytest.mark.parametrize("kind", ["tmp", "blobs", "claims"])
def test_unfinished_work_goes_when_nothing_was_written_to_it_for_a_day(store: Store, kind: str) -> None:
    top = Path(store.path, kind)
    for name, days in (("old", 2.0), ("new", 0.5), ("living", 2.0)):
        (top / name).mkdir()
        (top / name / "part").write_text("x" * 1000)
        age(top / name, days)
    (top / "living/part").touch()
    (top / "stray").write_text("")
    os.utime(top / "stray", (0, 0))
    before = sorted(os.listdir(top))
    gone = collect(store)
    assert [one.what for one in gone] == [f"{kind}/old", f"{kind}/stray"]
    assert gone[0].size == 1000
    assert sorted(os.listdir(top)) == [name for name in before if name not in ("old", "stray")]
    # An impatient administrator does not take a living pull's work.
    assert [one.what for one in collect(store, image_days=0)] == [f"{kind}/new"]


def test_a_pull_drops_what_was_left_a_week_ago(store: Store) -> None:
    for name, days in (("old", 8.0), ("new", 6.0)):
        (Path(store.path) / "tmp" / name).mkdir()
        age(Path(store.path) / "tmp" / name, days)
    drop_unfinished(store)
    assert os.listdir(f"{store.path}/tmp") == ["new"]


def test_a_link_in_the_place_of_work_is_not_followed(store: Store, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/file").write_text("x")
    os.symlink(tmp_path / "elsewhere", f"{store.path}/tmp/link")
    os.utime(f"{store.path}/tmp/link", (0, 0), follow_symlinks=False)
    assert kinds(collect(store)) == [("unfinished pull", "tmp/link")]
    assert (tmp_path / "elsewhere/file").exists()


def test_a_store_that_nothing_was_pulled_to_is_in_order(tmp_path: Path) -> None:
    """One that has only users' parts has no tmp/ of its own."""
    (tmp_path / "users").mkdir()
    assert find_garbage(Store.open(str(tmp_path))) == []


def test_a_store_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreUnusable, match="none"):
        collect(Store(path=str(tmp_path / "none")))


def test_what_was_removed_by_hand_is_no_garbage(store: Store) -> None:
    remove(store, put(store, "a", "app:1"))
    assert collect(store, image_days=0) == []
