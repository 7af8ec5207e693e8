"""What goes when the store is too full, and in which order."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcctr.errors import UsageWrong
from hpcctr.image.publish import remove_image
from hpcctr.image.quota import bytes_of, find_surplus, parse_size, take
from hpcctr.image.store import Store
from tests.unit.image.test_gc import age
from tests.unit.image.test_publish import put
from tests.unit.image.test_uses import mark

SIZE = 100_000


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"), writable=True)


def aged(store: Store, seed: str, days: float, *names: str) -> str:
    digest = put(store, seed, *names, content=b"x" * SIZE)
    age(store.image_directory(digest), days)
    return digest


def surplus(store: Store, keep: float, *, named: bool) -> tuple[list[tuple[str, str]], int]:
    chosen, too_many = find_surplus(store.path, keep_bytes=round(keep * SIZE), may_be_named=named)
    return [(one.part, one.garbage.what) for one in chosen], too_many


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("500000", 500000),
        ("200G", 200 * 10**9),
        ("3.4 GB", 3400 * 10**6),
        ("1.5TiB", 3 * 2**39),
        ("2k", 2000),
    ],
)
def test_a_size_is_read_as_it_is_printed(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1Z", "1iB", "1e9", "G", "1 G B", "9" * 20, "1.2.3"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageWrong, match="is not a size"):
        parse_size(text)


def test_unnamed_images_go_before_named_ones_and_the_longest_unwanted_first(store: Store) -> None:
    mine = Store.open(f"{store.path}/users/4711", writable=True)
    named = [aged(store, "n1", 50, "a:1"), aged(mine, "n2", 40, "b:1", "c:1")]
    unnamed = [aged(mine, "u1", 30), aged(store, "u2", 20), aged(store, "u3", 10)]
    assert bytes_of(store.path) + bytes_of(mine.path) >= 5 * SIZE
    order = [("users/4711/", unnamed[0]), ("", unnamed[1]), ("", unnamed[2])]
    later = [("", named[0]), ("users/4711/", named[1])]
    assert surplus(store, 6, named=True) == ([], 0)
    assert surplus(store, 4.5, named=True) == (order[:1], 0)
    assert surplus(store, 2.5, named=False) == (order, 0)
    found, too_many = surplus(store, 0, named=False)
    assert found == order
    assert 2 * SIZE <= too_many < 2 * SIZE + 10_000
    found, too_many = surplus(store, 0, named=True)
    assert found == order + later
    assert too_many < 10_000


def test_what_a_node_uses_and_what_is_young_stays_however_full_it_is(store: Store) -> None:
    for seed, names in (("a", ()), ("b", ("b:1",))):
        digest = aged(store, seed, 30, *names)
        mark(store.image_directory(digest))
        age(store.image_directory(digest), 30)
    put(store, "young")
    put(store, "named young", "c:1")
    assert surplus(store, 0, named=True)[0] == []


def test_a_named_image_goes_with_all_its_names(store: Store) -> None:
    digest = aged(store, "a", 30, "a:1", "b:1")
    (one,), _ = find_surplus(store.path, keep_bytes=0, may_be_named=True)
    assert take(one)
    assert list(store.names()) == []
    assert store.digests() == []
    assert digest not in os.listdir(f"{store.path}/images")


def test_one_that_a_node_begins_to_use_meanwhile_keeps_names_and_file(store: Store) -> None:
    digest = aged(store, "a", 30, "a:1")
    (one,), _ = find_surplus(store.path, keep_bytes=0, may_be_named=True)
    mark(store.image_directory(digest))
    assert not take(one)
    assert store.find("a:1", store.image(digest).record.platform).record.digest == digest
    assert store.is_whole(digest)


def test_an_unnamed_one_that_gets_a_name_meanwhile_stays(store: Store) -> None:
    digest = aged(store, "a", 30)
    (one,), _ = find_surplus(store.path, keep_bytes=0, may_be_named=True)
    put(store, "a", "a:1")
    assert not take(one)
    assert store.is_whole(digest)


def test_what_goes_anyway_is_not_chosen_twice(store: Store) -> None:
    first, second = aged(store, "a", 30), aged(store, "b", 20)
    chosen, _ = find_surplus(store.path, keep_bytes=SIZE // 2, may_be_named=False, freed=SIZE, but={first})
    assert [one.garbage.what for one in chosen] == [second]


def test_what_was_removed_and_still_runs_counts(store: Store) -> None:
    digest = aged(store, "a", 30)
    mark(store.image_directory(digest))
    remove_image(store, digest)
    assert bytes_of(store.path) >= SIZE
