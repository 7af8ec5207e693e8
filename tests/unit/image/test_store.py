"""The store as it is read: names and digests lead to images, and what is missing or damaged is named."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hpcctr.errors import ImageGone, ImageNotInStore, PlatformMissing, ReferenceWrong, StoreUnusable
from hpcctr.image import platform as platforms
from hpcctr.image import stale
from hpcctr.image.publish import publish, set_name, workspace
from hpcctr.image.record import ImageConfig, ImageRecord, NameRecord, Platform, StoredImage
from hpcctr.image.reference import ImageRef
from hpcctr.image.store import Store
from hpcctr.image.verification import sha256_of

ARM = Platform(os="linux", architecture="arm64")
HERE = platforms.of_this_node()


def put(store: Store, name: str, *, platform: Platform = HERE, seed: str = "", source: str = "") -> StoredImage:
    """An image with a file of a few bytes, under a name."""
    digest = sha256_of(f"{name}{platform}{seed}".encode())
    with workspace(store) as directory:
        file = Path(directory) / "root.squashfs"
        file.write_bytes(b"hsqs" + seed.encode())
        record = ImageRecord(
            schema=1,
            digest=digest,
            platform=platform,
            config=ImageConfig(),
            file="root.squashfs",
            file_size=file.stat().st_size,
            file_digest=sha256_of(file.read_bytes()),
            content_size=0,
            entries=1,
            created="2026-01-01T00:00:00Z",
            source=source or name,
        )
        image = publish(store, record, str(file))
    if name:
        set_name(store, ImageRef.parse(name).name_in_store(), platform, digest, source or name)
    return image


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"), writable=True)


def test_a_name_leads_to_its_image(store: Store) -> None:
    image = put(store, "python:3.12")
    for text in ("python:3.12", "docker.io/library/python:3.12", "docker://python:3.12"):
        found = store.find(text)
        assert found.record == image.record
        assert found.name == "docker.io/library/python:3.12"
        assert Path(found.path).read_bytes() == b"hsqs"


def test_an_image_is_known_by_a_name_it_has_or_had_else_by_its_digest(store: Store) -> None:
    old = put(store, "python:3.12", seed="old")
    other = put(store, "python:3.12", seed="new")
    for image in (old, other):
        assert store.image_known_as(image.record.digest, "python:3.12").name == "docker.io/library/python:3.12"
    put(store, "python:3.13")
    for claim in ("python:3.13", "no/such:1", "", "..", "\n", "x" * 5000, other.record.digest, "sha256:0"):
        found = store.image_known_as(old.record.digest, claim)
        assert (found.record, found.name) == (old.record, old.record.digest)
    with pytest.raises(ImageNotInStore):
        store.image_known_as("sha256:" + "0" * 64, "python:3.12")


def test_the_layout_is_as_documented(store: Store) -> None:
    image = put(store, "quay.io/org/app:1.0", platform=ARM)
    digest = image.record.digest.replace(":", "-")
    assert image.path == f"{store.path}/images/{digest}/root.squashfs"
    assert Path(f"{store.path}/images/{digest}/image.json").is_file()
    assert Path(f"{store.path}/names/quay.io/org/app/1.0.arm64.json").is_file()


def test_a_digest_leads_to_its_image_whole_or_by_its_beginning(store: Store) -> None:
    digest = put(store, "app:1").record.digest
    for length in (12, 30, 64):
        assert store.find(digest[: 7 + length]).record.digest == digest
    with pytest.raises(ImageNotInStore):
        store.find("sha256:" + "0" * 12)
    with pytest.raises(ImageNotInStore):
        store.find("sha256:" + "0" * 64)


def test_a_beginning_that_several_digests_have_is_refused(store: Store) -> None:
    for end in "ab":
        directory = Path(store.image_directory("sha256:" + "0" * 63 + end))
        directory.mkdir()
    with pytest.raises(ImageNotInStore, match="begins 2 digests"):
        store.find("sha256:" + "0" * 12)


def test_a_name_with_a_digest_is_found_by_it(store: Store) -> None:
    image = put(store, "app:1")
    digest = image.record.digest
    assert store.find(f"app@{digest}").record == image.record
    assert store.find(f"app:whatever@{digest}").record == image.record
    index = sha256_of(b"an index that led to it")
    set_name(store, ImageRef.parse(f"app@{index}").name_in_store(), HERE, digest)
    assert store.find(f"app@{index}").record == image.record
    assert f"docker.io/library/app@{index}" in [line.name for line in store.images()]


def test_a_digest_has_no_name_it_never_had(store: Store) -> None:
    """Rules go by names: saying one before the digest of another image is not having it."""
    image = put(store, "localhost/app:1", source="quay.io/org/app:1")
    digest = image.record.digest
    put(store, "localhost/app:1", seed="new")
    for text, name in (
        (f"localhost/app:1@{digest}", "localhost/app:1"),
        (f"quay.io/org/app@{digest}", f"quay.io/org/app@{digest}"),
        (f"quay.io/org/app:whatever@{digest}", f"quay.io/org/app@{digest}"),
        (f"localhost/app@{digest}", digest),
        (f"docker.io/library/trusted:1@{digest}", digest),
    ):
        found = store.find(text)
        assert (found.record.digest, found.name) == (digest, name)


def _at(store: Store, name: str, *moments: str) -> list[str]:
    """Give a name one meaning at each moment, oldest first; the digests."""
    digests = []
    for moment in moments:
        digests.append(put(store, name, seed=moment).record.digest)
        path = Path(store.name_file(ImageRef.parse(name).name_in_store(), HERE))
        record = msgspec.json.decode(path.read_bytes(), type=NameRecord)
        newest = msgspec.structs.replace(record.history[0], since=moment)
        path.write_bytes(msgspec.json.encode(msgspec.structs.replace(record, history=(newest, *record.history[1:]))))
    return digests


def test_a_name_means_what_it_meant_at_a_moment(store: Store) -> None:
    old, new = _at(store, "app:1", "2026-01-01T00:00:00Z", "2026-01-03T00:00:00Z")
    for day, digest in (("2025-12-31", old), ("2026-01-01", old), ("2026-01-02", old), ("2026-01-03", new)):
        moment = int(datetime.fromisoformat(f"{day}T00:00:00Z").timestamp())
        found = store.find("app:1", as_of=moment)
        assert (found.record.digest, found.name) == (digest, "docker.io/library/app:1")
        assert ("now sha256:" in found.because) == (digest == old)
        assert store.was_there("app:1", None, moment) == (day != "2025-12-31")
        # A digest is a digest, now and then.
        assert store.find(f"app@{new}", as_of=moment).record.digest == new
        assert store.find(new, as_of=moment).record.digest == new
        assert not store.was_there(new, None, moment)
    assert store.find("app:1").record.digest == new


def test_what_a_name_meant_and_is_gone_is_said_and_not_replaced(store: Store) -> None:
    old, _ = _at(store, "app:1", "2026-01-01T00:00:00Z", "2026-01-03T00:00:00Z")
    shutil.rmtree(store.image_directory(old))
    moment = int(datetime.fromisoformat("2026-01-02T00:00:00Z").timestamp())
    with pytest.raises(ImageGone, match="is not in the store any more") as caught:
        store.find("app:1", as_of=moment)
    assert f"hpcctr pull app@{old}" in caught.value.hint and "HPCCTR_AS_OF=now" in caught.value.hint


def test_a_file_is_named_for_what_it_means_now(store: Store, tmp_path: Path) -> None:
    name = f"oci-archive:{tmp_path}/app.tar"
    put(store, name, seed="old")
    new = put(store, name, seed="new")
    assert store.find(name, as_of=0).record == new.record


def test_what_is_missing_is_said_with_the_command_that_brings_it(store: Store) -> None:
    with pytest.raises(ImageNotInStore) as caught:
        store.find("python:3.12")
    assert str(caught.value) == f"image python:3.12 is not in the store {store.path}"
    assert caught.value.hint == "hpcctr pull python:3.12"
    with pytest.raises(ReferenceWrong):
        store.find("Python")


def test_another_platform_is_named(store: Store) -> None:
    image = put(store, "app:1", platform=Platform(os="linux", architecture="s390x"))
    put(store, "app:1", platform=Platform(os="linux", architecture="arm", variant="v6"))
    with pytest.raises(PlatformMissing, match="for linux/arm/v6, linux/s390x, not for"):
        store.find("app:1")
    with pytest.raises(PlatformMissing, match="is for linux/s390x"):
        store.find(image.record.digest)
    assert store.find("app:1", platforms.parse("s390x")).record == image.record
    assert store.find("app:1", platforms.parse("linux/arm/v7")).record.platform.variant == "v6"


def test_other_tags_are_not_other_platforms(store: Store) -> None:
    put(store, "app:1.0")
    with pytest.raises(ImageNotInStore):
        store.find("app:1")


def test_a_name_whose_image_is_gone_is_not_in_the_store(store: Store) -> None:
    image = put(store, "app:1")
    Path(image.path).unlink()
    (Path(image.path).parent / "image.json").unlink()
    with pytest.raises(ImageNotInStore):
        store.find("app:1")
    (line,) = store.images()
    assert (line.name, line.image) == ("docker.io/library/app:1", None)


def test_listing_shows_every_name_and_images_without_one(store: Store) -> None:
    put(store, "b:1")
    put(store, "a:1")
    put(store, "a:1", platform=ARM)
    unnamed = put(store, "", seed="x")
    lines = store.images()
    assert [(line.name, line.platform) for line in lines] == [
        ("docker.io/library/a:1", HERE),
        ("docker.io/library/a:1", ARM),
        ("docker.io/library/b:1", HERE),
        (unnamed.record.digest, HERE),
    ] or HERE.architecture == "arm64"
    for line in lines:
        assert line.image is not None
        assert store.find(line.name, line.platform).record == line.image.record


def test_an_empty_store_lists_nothing(store: Store) -> None:
    assert store.images() == []


def test_files_that_are_no_records_are_passed_over(store: Store) -> None:
    put(store, "app:1")
    (Path(store.path) / "names/docker.io/library/app/.nfs000001").write_text("x")
    (Path(store.path) / "names/README").write_text("x")
    (Path(store.path) / "names/docker.io/library/app/UPPER CASE").mkdir()
    (Path(store.path) / "names/docker.io/library/app/UPPER CASE/1.amd64.json").write_text("x")
    (Path(store.path) / "images/lost+found").mkdir()
    assert len(store.images()) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b'{"schema": 1, "name": "x", "history": []}', b"\xff"])
def test_a_damaged_name_is_named(store: Store, content: bytes) -> None:
    put(store, "app:1")
    record = Path(store.name_file(ImageRef.parse("app:1"), HERE))
    record.write_bytes(content)
    with pytest.raises(StoreUnusable, match="is damaged") as caught:
        store.find("app:1")
    assert str(record) in str(caught.value)


def test_a_record_about_another_image_is_refused(store: Store) -> None:
    image, other = put(store, "app:1"), put(store, "other:1")
    for change in ({"digest": other.record.digest}, {"file": "../../x"}):
        record = msgspec.structs.replace(image.record, **change)
        (Path(image.path).parent / "image.json").write_bytes(msgspec.json.encode(record))
        with pytest.raises(StoreUnusable, match="another image"):
            store.find("app:1")


def test_records_that_are_links_or_devices_are_not_followed(store: Store, tmp_path: Path) -> None:
    put(store, "app:1")
    record = Path(store.name_file(ImageRef.parse("app:1"), HERE))
    record.rename(tmp_path / "elsewhere")
    record.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreUnusable, match="symbolic link"):
        store.find("app:1")
    record.unlink()
    os.mkfifo(record)
    with pytest.raises(StoreUnusable, match="damaged"):
        store.find("app:1")


def test_a_store_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreUnusable, match="does not exist"):
        Store.open(str(tmp_path / "none"))
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnusable, match="not a directory"):
        Store.open(str(tmp_path / "file"))
    with pytest.raises(StoreUnusable, match="absolute"):
        Store.open("relative")


def test_finding_imports_no_registry_client_and_no_decompressor() -> None:
    code = "import sys, hpcctr.image.store; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(run.stdout.split())
    assert not loaded & {"grpc", "oras", "requests", "urllib3", "zstandard", "isal", "subprocess"}


def test_a_record_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record"
    path.write_text("new")
    store = Store(path=str(tmp_path))
    real, troubles = os.open, iter(range(3))
    monkeypatch.setattr(stale, "_PAUSES", (0.001,) * 4)

    def open_stale(*arguments: Any, **more: Any) -> int:
        if next(troubles, None) is not None:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return real(*arguments, **more)

    monkeypatch.setattr(os, "open", open_stale)
    assert store._read(str(path)) == b"new"
    monkeypatch.setattr(os, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ESTALE, "Stale file handle")))
    with pytest.raises(StoreUnusable, match="stale"):
        store._read(str(tmp_path / "another"))
