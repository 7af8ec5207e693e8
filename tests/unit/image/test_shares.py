"""Whom a user's images are shared with, and what those find."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from hpcctr.errors import ImageNotInStore, StoreUnusable, UsageWrong
from hpcctr.image import shares
from hpcctr.image.publish import set_name
from hpcctr.image.record import NameRecord
from hpcctr.image.reference import ImageRef
from hpcctr.image.shares import Grantee, grantees_of, owners_sharing_with, shared_images, shares_of
from hpcctr.image.sharing import share
from hpcctr.image.store import Store
from tests.support.values import a_stored_image, publish_for_test

OWNER = 4711
APP = "docker.io/library/app:1"
BOB = Grantee(kind="uid", number=4712)
STAFF = Grantee(kind="gid", number=50)
BOBS = grantees_of(4712, (4712, 100))
DIGESTS = ["sha256:" + letter * 64 for letter in "abcd"]


@pytest.fixture
def part(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / f"store/users/{OWNER}"), writable=True)


def _put(part: Store, name: str, digest: str) -> None:
    publish_for_test(part.path, a_stored_image(name=name, digest=digest))


def _share(part: Store, image: str, *grantees: Grantee) -> None:
    share(str(Path(part.path).parents[1]), part, OWNER, image, grantees, most=100)


def _date(part: Store, name: str, *moments: str) -> None:
    """Give the meanings of a name, newest first, these times."""
    ref = ImageRef.parse(name)
    path = Path(part.name_file(ref, part.platforms_of(ref)[0]))
    record = msgspec.json.decode(path.read_bytes(), type=NameRecord)
    entries = zip(record.history, moments, strict=True)
    history = tuple(msgspec.structs.replace(entry, since=moment) for entry, moment in entries)
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(record, history=history)))


def _found(part: Store, text: str, grantees: frozenset[Grantee] = BOBS, as_of: int | None = None) -> str:
    """The digest of what is found; nothing when there is nothing."""
    try:
        return shares.find(part, grantees, text, a_stored_image().record.platform, as_of).record.digest
    except ImageNotInStore:
        return ""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "uid",
        "uid-",
        "uid-x",
        "uid--1",
        "uid-01",
        "uid-+1",
        "uid-1 ",
        "gid-99999999999",
        "oid-1",
        "uid-٣",
        "uid-2147483648",
    ],
)
def test_a_grantee_is_a_plain_number(text: str) -> None:
    with pytest.raises(UsageWrong):
        Grantee.parse(text)


def test_a_grantee_is_read_as_it_is_written() -> None:
    for grantee in (BOB, STAFF, Grantee(kind="gid", number=0)):
        assert Grantee.parse(str(grantee)) == grantee


def test_a_name_leads_those_it_is_shared_with_to_its_image(part: Store) -> None:
    _put(part, APP, DIGESTS[0])
    _put(part, "quay.io/org/other:1", DIGESTS[1])
    assert _found(part, "app:1") == ""
    _share(part, APP, BOB)
    for text in ("app:1", APP, DIGESTS[0], DIGESTS[0][:25], f"app@{DIGESTS[0]}", f"app:1@{DIGESTS[0]}"):
        assert _found(part, text) == DIGESTS[0], text
        assert _found(part, text, grantees_of(4713, (100,))) == "", text
    for text in ("quay.io/org/other:1", "app:2", DIGESTS[1], f"app:1@{DIGESTS[1]}", DIGESTS[1][:25], "oci:/etc"):
        assert _found(part, text) == "", text


def test_a_group_leads_its_members_there(part: Store) -> None:
    _put(part, APP, DIGESTS[0])
    _share(part, APP, STAFF)
    assert _found(part, "app:1", grantees_of(9, (50,))) == DIGESTS[0]
    assert _found(part, "app:1", grantees_of(50, (9,))) == ""


def test_a_digest_is_shared_without_its_names(part: Store) -> None:
    _put(part, APP, DIGESTS[0])
    _share(part, DIGESTS[0], BOB)
    assert _found(part, DIGESTS[0]) == _found(part, f"app:1@{DIGESTS[0]}") == DIGESTS[0]
    assert _found(part, "app:1") == ""


def test_a_name_is_shared_with_what_it_means_and_comes_to_mean_only(part: Store) -> None:
    for digest in DIGESTS[:2]:
        _put(part, APP, digest)
    _date(part, APP, "2026-01-02T00:00:00Z", "2026-01-01T00:00:00Z")
    _share(part, APP, BOB)
    _put(part, APP, DIGESTS[2])
    newest = part.name_record(ImageRef.parse(APP), part.platforms_of(ImageRef.parse(APP))[0])
    assert newest is not None
    _date(part, APP, "2999-01-01T00:00:00Z", "2026-01-02T00:00:00Z", "2026-01-01T00:00:00Z")
    assert _found(part, "app:1") == DIGESTS[2]
    # A moment before the share leads to what was shared, and not to what the name meant then.
    for moment in (0, 1_767_225_600, 1_800_000_000):
        assert _found(part, "app:1", as_of=moment) == DIGESTS[1]
    assert [_found(part, digest) for digest in DIGESTS[:3]] == ["", DIGESTS[1], DIGESTS[2]]
    assert _found(part, f"app:1@{DIGESTS[0]}") == ""


def test_a_beginning_counts_only_what_is_shared(part: Store) -> None:
    """What others are called must not show in an answer."""
    shared, secret = ("sha256:" + "0" * 63 + end for end in "12")
    _put(part, APP, shared)
    _put(part, "app:2", secret)
    _share(part, APP, BOB)
    assert _found(part, "sha256:" + "0" * 20) == shared


def test_a_damaged_share_is_told_to_those_it_is_about_and_nobody_else(part: Store) -> None:
    _put(part, APP, DIGESTS[0])
    _share(part, APP, BOB, STAFF)
    path = Path(shares.directory_of(part, APP)) / f"{STAFF}.json"
    path.write_text("{")
    assert _found(part, "app:1") == DIGESTS[0]
    with pytest.raises(StoreUnusable, match="damaged"):
        _found(part, "app:1", grantees_of(9, (50,)))


def test_what_lies_beside_shares_is_no_share(part: Store) -> None:
    _put(part, APP, DIGESTS[0])
    _share(part, APP, BOB)
    directory = Path(shares.directory_of(part, APP))
    (directory / "uid-1.json.tmp").touch()
    (directory / "uid-x.json").touch()
    (directory / "README").touch()
    assert set(shares_of(part, APP)) == {BOB}


def test_listings_show_what_is_shared_and_there(part: Store) -> None:
    store = str(Path(part.path).parents[1])
    _put(part, APP, DIGESTS[0])
    _put(part, "app:2", DIGESTS[1])
    _put(part, "app:3", DIGESTS[2])
    for image in (APP, DIGESTS[1]):
        _share(part, image, BOB, STAFF)
    assert [(line.name, line.digest) for line in shared_images(part, BOBS)] == [
        (DIGESTS[1], DIGESTS[1]),
        (APP, DIGESTS[0]),
    ]
    assert list(shared_images(part, grantees_of(1, (1,)))) == []
    assert owners_sharing_with(store, BOBS) == owners_sharing_with(store, {STAFF}) == [OWNER]
    assert owners_sharing_with(store, grantees_of(1, (1,))) == []
    os.unlink(f"{part.image_directory(DIGESTS[1])}/image.json")
    set_name(part, ImageRef.parse(APP), a_stored_image().record.platform, DIGESTS[3])
    assert list(shared_images(part, BOBS)) == []
