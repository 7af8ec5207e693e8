"""Sharing is written so that nobody rewrites what another writes, and goes with what it is about."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import msgspec
import pytest

from hpcctr.errors import ImageNotInStore, StoreUnusable
from hpcctr.image.publish import remove
from hpcctr.image.record import NameRecord
from hpcctr.image.shares import Grantee, every, find, owners_sharing_with, shares_of
from hpcctr.image.sharing import dangling, drop_dangling, drop_index, named_by, share, shareable, unshare
from hpcctr.image.store import Store
from tests.support.values import a_stored_image, publish_for_test

OWNER = 4711
APP = "docker.io/library/app:1"
DIGEST = "sha256:" + "a" * 64
PEOPLE = [Grantee(kind="uid", number=number) for number in range(5000, 5020)]


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "store")


@pytest.fixture
def part(store: str) -> Store:
    made = Store.open(f"{store}/users/{OWNER}", writable=True)
    publish_for_test(made.path, a_stored_image(name=APP, digest=DIGEST))
    return made


def test_what_is_shareable_is_there(part: Store) -> None:
    for text, image in ((APP, APP), ("app:1", APP), (DIGEST, DIGEST), (DIGEST[:25], DIGEST), (f"app@{DIGEST}", DIGEST)):
        assert shareable(part, text) == image
        if text != DIGEST[:25]:
            assert named_by(text) == image
    for text in ("app:2", "sha256:" + "b" * 64, f"app@sha256:{'b' * 64}"):
        with pytest.raises(ImageNotInStore):
            shareable(part, text)


def test_shares_are_for_the_stores_owner_alone_and_leave_no_trace(store: str, part: Store) -> None:
    share(store, part, OWNER, APP, PEOPLE[:2], most=9)
    paths = [*Path(part.path, "shares").rglob("*"), *Path(store, "shared").rglob("*")]
    assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in paths} == {0}
    assert os.listdir(f"{part.path}/tmp") == []
    unshare(part, APP, PEOPLE)
    assert not list(every(part)) and not os.listdir(f"{part.path}/shares")


def test_a_share_that_is_there_keeps_its_time(store: str, part: Store) -> None:
    share(store, part, OWNER, APP, PEOPLE[:1], most=9)
    (path,) = Path(part.path, "shares").rglob("*.json")
    path.write_text(path.read_text().replace("20", "19", 1))
    earlier = path.read_text()
    share(store, part, OWNER, APP, PEOPLE[:2], most=9)
    assert path.read_text() == earlier and set(shares_of(part, APP)) == set(PEOPLE[:2])


def test_a_clock_that_was_ahead_does_not_share_what_a_name_meant_before(store: str, part: Store) -> None:
    newer = "sha256:" + "b" * 64
    publish_for_test(part.path, a_stored_image(name=APP, digest=newer))
    (path,) = Path(part.path, "names").rglob("*.json")
    record = msgspec.json.decode(path.read_bytes(), type=NameRecord)
    newest = msgspec.structs.replace(record.history[0], since="2999-01-01T00:00:00Z")
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(record, history=(newest, record.history[1]))))
    share(store, part, OWNER, APP, PEOPLE[:1], most=9)
    platform = a_stored_image().record.platform
    assert find(part, PEOPLE[:1], APP, platform, 0).record.digest == newer
    with pytest.raises(ImageNotInStore):
        find(part, PEOPLE[:1], DIGEST, platform)


def test_many_who_share_and_take_back_at_once_lose_nothing(store: str, part: Store) -> None:
    """Directories come and go under each other's hands."""
    failures: list[BaseException] = []

    def work(grantee: Grantee, stays: bool) -> None:
        try:
            for _ in range(15):
                share(store, part, OWNER, APP, [grantee], most=1000)
                unshare(part, APP, [grantee])
            if stays:
                share(store, part, OWNER, APP, [grantee], most=1000)
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(who, number % 2 == 0)) for number, who in enumerate(PEOPLE[:6])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures, failures
    assert set(shares_of(part, APP)) == set(PEOPLE[:6:2])


def test_a_user_has_so_many_shares(store: str, part: Store) -> None:
    share(store, part, OWNER, APP, PEOPLE[:3], most=3)
    share(store, part, OWNER, APP, PEOPLE[:3], most=3)
    with pytest.raises(StoreUnusable, match="3 shares are yours, 3 are possible") as caught:
        share(store, part, OWNER, DIGEST, PEOPLE[:1], most=3)
    assert "shares-per-uid" in caught.value.hint


def test_what_is_removed_is_shared_no_more_when_it_comes_again(store: str, part: Store) -> None:
    for image in (APP, DIGEST):
        share(store, part, OWNER, image, PEOPLE[:1], most=9)
    assert list(dangling(part)) == [] == drop_dangling(part)
    remove(part, DIGEST)
    assert drop_dangling(part) == [f"{DIGEST} uid-5000", f"{APP} uid-5000"]
    publish_for_test(part.path, a_stored_image(name=APP, digest=DIGEST))
    assert list(every(part)) == []


def test_the_index_forgets_who_shares_nothing_and_not_too_early(store: str, part: Store) -> None:
    share(store, part, OWNER, APP, PEOPLE[:2], most=9)
    unshare(part, APP, PEOPLE[:1])
    drop_index(store)
    assert owners_sharing_with(store, PEOPLE[:1]) == [OWNER]
    drop_index(store, age=-1)
    assert owners_sharing_with(store, PEOPLE[:1]) == []
    assert owners_sharing_with(store, PEOPLE[1:2]) == [OWNER]
    unshare(part, APP, PEOPLE)
    drop_index(store, age=-1)
    assert os.listdir(f"{store}/shared") == []
