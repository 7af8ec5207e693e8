"""An image of a user's becomes one of the site's: the same bytes, under a name that is free or told to be taken."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hpcctr.errors import ImageBroken, NameTaken, UsageWrong
from hpcctr.image import promotion
from hpcctr.image.platform import of_this_node
from hpcctr.image.publish import publish, set_name, workspace
from hpcctr.image.record import ImageConfig, ImageRecord, NameEntry
from hpcctr.image.reference import ImageRef
from hpcctr.image.store import Store
from hpcctr.image.verification import sha256_of

OWNER = 4711
APP = "localhost/app:1"


@pytest.fixture
def site(tmp_path: Path) -> str:
    return str(tmp_path / "store")


@pytest.fixture
def part(site: str) -> Store:
    return Store.open(f"{site}/users/{OWNER}", writable=True)


def _put(store: Store, name: str, content: bytes) -> str:
    """An image whose file has that content; its digest."""
    digest = sha256_of(name.encode() + content)
    with workspace(store) as directory:
        file = Path(directory) / "made"
        file.write_bytes(content)
        record = ImageRecord(
            schema=1,
            digest=digest,
            platform=of_this_node(),
            config=ImageConfig(),
            file="root.squashfs",
            file_size=len(content),
            file_digest=sha256_of(content),
            content_size=1,
            entries=1,
            created="2026-01-01T00:00:00Z",
            source="oci-archive:/home/alice/app.tar",
        )
        publish(store, record, str(file))
    set_name(store, ImageRef.parse(name), of_this_node(), digest, record.source)
    return digest


def _history(site: str, name: str) -> tuple[NameEntry, ...]:
    record = Store(path=site).name_record(ImageRef.parse(name), of_this_node())
    assert record is not None
    return record.history


@pytest.mark.parametrize("has_links", [True, False])
def test_the_file_is_linked_or_else_copied(
    site: str, part: Store, has_links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_links:

        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EXDEV, "another filesystem")

        monkeypatch.setattr(os, "link", refuse)
    digest = _put(part, APP, b"hsqs one")
    promoted = promotion.promote(site, part, APP, owner=OWNER)
    assert (promoted.name, promoted.record.digest, promoted.is_private) == (APP, digest, False)
    assert promoted.path.startswith(f"{site}/images/")
    assert Path(promoted.path).read_bytes() == b"hsqs one"
    assert os.path.samefile(promoted.path, part.find(APP).path) == has_links
    # Where the file of the user's was says nothing to others.
    assert promoted.record.source == f"@{OWNER}/{APP}"
    assert os.listdir(f"{site}/tmp") == []


def test_what_the_site_has_already_gets_the_name_alone(site: str, part: Store) -> None:
    digest = _put(part, APP, b"hsqs one")
    first = promotion.promote(site, part, APP, owner=OWNER)
    inode = Path(first.path).stat().st_ino
    second = promotion.promote(site, part, APP, owner=OWNER, as_name="site/app:2")
    assert (second.name, second.record.digest) == ("docker.io/site/app:2", digest)
    assert Path(second.path).stat().st_ino == inode


def test_a_file_that_is_not_what_was_published_is_not_promoted(site: str, part: Store) -> None:
    _put(part, APP, b"hsqs one")
    Path(part.find(APP).path).write_bytes(b"hsqs 0ne")
    with pytest.raises(ImageBroken):
        promotion.promote(site, part, APP, owner=OWNER)
    assert os.listdir(f"{site}/images") == os.listdir(f"{site}/tmp") == os.listdir(f"{site}/names") == []


def test_a_name_is_taken_only_when_told_or_renewed(site: str, part: Store) -> None:
    other = _put(Store.open(site, writable=True), "site/app:1", b"hsqs the site's")
    first = _put(part, APP, b"hsqs one")
    with pytest.raises(NameTaken, match="site/app:1 means sha256"):
        promotion.promote(site, part, APP, owner=OWNER, as_name="site/app:1")
    assert [entry.digest for entry in _history(site, "site/app:1")] == [other]
    promotion.promote(site, part, APP, owner=OWNER, as_name="site/app:1", may_replace=True)
    second = _put(part, APP, b"hsqs two")
    promotion.promote(site, part, APP, owner=OWNER, as_name="site/app:1")
    assert [entry.digest for entry in _history(site, "site/app:1")] == [second, first, other]
    # Another image of the same user's is another matter.
    _put(part, "localhost/tool:1", b"hsqs three")
    with pytest.raises(NameTaken):
        promotion.promote(site, part, "localhost/tool:1", owner=OWNER, as_name="site/app:1")


def test_what_only_sounds_like_a_registrys_image_needs_its_name_said(site: str, part: Store) -> None:
    digest = _put(part, "python:3.12", b"hsqs one")
    for text, as_name in (("python:3.12", None), (digest, None), (digest, "oci:/x"), (digest, f"x@{digest}")):
        with pytest.raises(UsageWrong):
            promotion.promote(site, part, text, owner=OWNER, as_name=as_name)
    assert promotion.promote(site, part, "python:3.12", owner=OWNER, as_name="python:3.12").record.digest == digest
