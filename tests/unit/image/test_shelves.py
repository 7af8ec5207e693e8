"""Where a caller finds images."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path

import pytest

from hpcctr.errors import ImageNotInStore, ReferenceWrong, StoreUnusable
from hpcctr.image import shelves
from hpcctr.image.pull import pull
from hpcctr.image.reference import ImageRef
from hpcctr.image.shares import Grantee
from hpcctr.image.sharing import share
from hpcctr.image.store import Store
from hpcctr.site import Site
from tests.support.oci import Image, file, tar, write_oci_archive

pytestmark = pytest.mark.root

NAME = "localhost/app:1"


def _with(store: Path, edition: bytes, name: str = NAME) -> str:
    """Put an image into a store; its digest."""
    archive = write_oci_archive(store.parent / f"{edition.decode()}.tar", Image(layers=(tar(file("e", edition)),)))
    ref = ImageRef.parse(f"oci-archive:{archive}")
    return pull(ref, site=Site(store=str(store)), name=name).image.record.digest


@pytest.fixture
def store(place: Path) -> Path:
    return place / "store"


def test_ones_own_comes_first_and_is_nobody_elses(store: Path) -> None:
    shared = _with(store, b"shared")
    own = _with(Path(shelves.private_path(str(store), 4711)), b"own")
    mine = shelves.find(str(store), 4711, NAME)
    assert (mine.record.digest, mine.is_private, mine.policy_name) == (own, True, f"private/{NAME}")
    for uid in (0, 4712):
        others = shelves.find(str(store), uid, NAME)
        assert (others.record.digest, others.is_private, others.policy_name) == (shared, False, NAME)
        for text in (own, own[:30]):
            with pytest.raises(ImageNotInStore):
                shelves.find(str(store), uid, text)
        with pytest.raises(ImageNotInStore):
            shelves.image_known_as(str(store), uid, own, NAME)
    assert shelves.find(str(store), 4711, own).record.digest == own
    assert shelves.image_known_as(str(store), 4711, own, "whatever").record.digest == own
    assert shelves.image_known_as(str(store), 4711, shared, NAME).record.digest == shared


@pytest.mark.parametrize(
    "text",
    ["", "@", "@alice", "@alice/", "@/app:1", "@al ice/app:1", "@-x/app:1", "@alice/@bob/app:1", "@../app:1", "app:1",
     "@a\nb/app:1", "@alice/oci-archive:/etc/shadow", "@alice/../../4711/app:1", "@" + "a" * 70 + "/app:1"],
)  # fmt: skip
def test_what_is_no_name_of_a_users_image_is_refused(text: str) -> None:
    with pytest.raises(ReferenceWrong):
        shelves.SharedName.parse(text)


def test_owners_are_named_as_sites_name_them() -> None:
    for owner in ("alice", "1000", "alice-b.c", "DOMAIN\\alice", "alice@domain", "_svc", "host$"):
        shared = shelves.SharedName.parse(f"@{owner}/app:1")
        assert (shared.owner, shared.name, str(shared)) == (owner, "app:1", f"@{owner}/app:1")


def test_another_users_image_is_found_by_those_it_is_shared_with(store: Path) -> None:
    part = Path(shelves.private_path(str(store), 4711))
    own = _with(part, b"own")
    share(str(store), Store(path=str(part)), 4711, NAME, [Grantee(kind="gid", number=50)], most=9)
    name = f"@4711/{NAME}"
    for uid, gids in ((4712, (1, 50)), (4711, ()), (0, ())):
        found = shelves.find(str(store), uid, name, gids=gids)
        assert (found.record.digest, found.name, found.is_private) == (own, name, True)
        assert found.policy_name == f"private/{NAME}"
        assert shelves.image_known_as(str(store), uid, own, name, gids=gids).name == name
    hints = set()
    for text in (name, f"@4711/{own}", "@4711/none:1", "@4799/none:1", f"@4799/{NAME}", "@no-such-user/none:1"):
        with pytest.raises(ImageNotInStore) as caught:
            shelves.find(str(store), 4712, text, gids=(1, 2))
        assert str(caught.value) == f"image {text} does not exist, or is not shared with you"
        hints.add(caught.value.hint.replace(text.partition("/")[2], "NAME"))
    assert len(hints) == 1
    with pytest.raises(ImageNotInStore):
        shelves.image_known_as(str(store), 4712, own, name, gids=(1, 2))


def test_a_name_of_ones_own_that_is_younger_than_the_moment_waits_for_the_sites(store: Path) -> None:
    shared = _with(store, b"shared")
    own = _with(Path(shelves.private_path(str(store), 4711)), b"own")
    now = int(time.time())
    for path in store.glob("names/**/*.json"):
        path.write_text(re.sub(r'"since": ?"[^"]*"', '"since": "2026-01-01T00:00:00Z"', path.read_text()))
    assert shelves.find(str(store), 4711, NAME, as_of=now - 3600).record.digest == shared
    assert shelves.find(str(store), 4711, NAME, as_of=now + 3600).record.digest == own
    # Nobody had the name then: one's own comes first.
    assert shelves.find(str(store), 4711, NAME, as_of=0).record.digest == own


def test_what_only_the_site_has_is_found_by_who_has_images_of_their_own(store: Path) -> None:
    shared = _with(store, b"shared", "localhost/other:1")
    _with(Path(shelves.private_path(str(store), 4711)), b"own")
    assert shelves.find(str(store), 4711, "localhost/other:1").record.digest == shared


def test_root_reads_as_the_stores_owner_and_is_root_again(store: Path) -> None:
    """Also when it fails, and in no other thread."""
    store.mkdir()
    os.chown(store, 61950, 61950)
    roots = store.parent / "roots"
    roots.write_bytes(b"x")
    roots.chmod(0o600)
    assert os.geteuid() == 0
    elsewhere: list[bytes] = []
    meanwhile = threading.Event()

    def read() -> None:
        meanwhile.wait(20)
        elsewhere.append(roots.read_bytes())

    other = threading.Thread(target=read)
    other.start()
    with pytest.raises(ZeroDivisionError), shelves.as_owner(str(store)):
        with pytest.raises(PermissionError):
            roots.read_bytes()
        meanwhile.set()
        other.join()
        (store / "made").touch()
        raise ZeroDivisionError
    assert elsewhere == [b"x"] and roots.read_bytes() == b"x"
    assert ((store / "made").stat().st_uid, (store / "made").stat().st_gid) == (61950, 61950)


def test_a_store_of_roots_or_none_changes_nothing(store: Path) -> None:
    with shelves.as_owner(str(store)):
        (store.parent / "x").touch()
    store.mkdir()
    with shelves.as_owner(str(store)):
        (store.parent / "y").touch()
    assert {(store.parent / name).stat().st_uid for name in "xy"} == {0}


def test_the_owner_of_a_store_that_is_missing_is_an_error(store: Path) -> None:
    with pytest.raises(StoreUnusable, match="does not exist"):
        shelves.owner_of(str(store))


def test_an_image_file_of_a_closed_part_is_opened_as_the_owner(store: Path) -> None:
    part = Path(shelves.private_path(str(store), 4711))
    _with(part, b"own")
    for path in (store, *store.rglob("*")):
        os.chown(path, 61950, 61950)
    part.chmod(0o700)
    image = shelves.find(str(store), 4711, NAME)
    descriptor = shelves.open_image_file(str(store), image)
    try:
        assert os.read(descriptor, 4) == b"hsqs"
    finally:
        os.close(descriptor)
