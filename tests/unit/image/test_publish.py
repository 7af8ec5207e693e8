"""Writing the store: whole or not at all, by rename, with modes of its own; and taking away."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from hpcctr.errors import ImageNotInStore, StoreUnusable
from hpcctr.image.publish import is_intact, publish, remove, set_name, workspace
from hpcctr.image.record import ImageConfig, ImageRecord, NameRecord, Platform
from hpcctr.image.reference import ImageRef
from hpcctr.image.store import Store
from hpcctr.image.verification import sha256_of

AMD = Platform(os="linux", architecture="amd64")
ARM = Platform(os="linux", architecture="arm64")
APP = ImageRef.parse("app:1")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"), writable=True)


def put(store: Store, seed: str, *names: str, platform: Platform = AMD, content: bytes = b"hsqs") -> str:
    digest = sha256_of(seed.encode())
    with workspace(store) as directory:
        file = Path(directory) / "root.squashfs"
        file.write_bytes(content)
        record = ImageRecord(
            schema=1,
            digest=digest,
            platform=platform,
            config=ImageConfig(),
            file="root.squashfs",
            file_size=len(content),
            file_digest=sha256_of(content),
            content_size=0,
            entries=1,
            created="2026-01-01T00:00:00Z",
            source="test",
        )
        publish(store, record, str(file))
    for name in names:
        set_name(store, ImageRef.parse(name), platform, digest)
    return digest


def meaning(store: Store, platform: Platform = AMD) -> NameRecord:
    record = store.name_record(APP, platform)
    assert record is not None
    return record


def test_an_image_of_the_same_digest_that_is_there_stays(store: Store) -> None:
    digest = put(store, "x", content=b"hsqs first")
    put(store, "x", content=b"hsqs second")
    assert Path(store.image(digest).path).read_bytes() == b"hsqs first"
    assert not os.listdir(f"{store.path}/tmp")


def test_a_name_remembers_what_it_meant(store: Store) -> None:
    digests = [put(store, seed, "app:1") for seed in "abc"]
    assert [entry.digest for entry in meaning(store).history] == digests[::-1]
    before = Path(store.name_file(APP, AMD)).stat().st_ino
    put(store, "c", "app:1")
    assert Path(store.name_file(APP, AMD)).stat().st_ino == before


def test_a_names_history_has_an_end(store: Store) -> None:
    for number in range(105):
        set_name(store, APP, AMD, sha256_of(str(number).encode()))
    assert len(meaning(store).history) == 100
    assert meaning(store).history[0].digest == sha256_of(b"104")


def test_a_name_is_replaced_never_rewritten(store: Store) -> None:
    put(store, "a", "app:1")
    with open(store.name_file(APP, AMD), "rb") as reader:
        before = reader.read()
        put(store, "b", "app:1")
        reader.seek(0)
        assert reader.read() == before


def test_a_workspace_is_private_and_goes_whatever_happens(store: Store) -> None:
    class Interrupted(BaseException):
        pass

    with pytest.raises(Interrupted), workspace(store) as directory:
        assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
        (Path(directory) / "half").write_text("x")
        raise Interrupted
    assert not os.listdir(f"{store.path}/tmp")


@pytest.mark.parametrize("damage", ["none", "a bit", "cut", "gone"])
def test_damage_is_seen_byte_for_byte(store: Store, damage: str) -> None:
    image = store.image(put(store, "a", content=b"hsqs content"))
    path = Path(image.path)
    if damage == "a bit":
        path.write_bytes(b"hsqs Content")
    elif damage == "cut":
        os.truncate(path, 3)
    elif damage == "gone":
        path.unlink()
    assert is_intact(image) == (damage == "none")


def test_removing_a_name_keeps_an_image_that_another_name_means(store: Store) -> None:
    digest = put(store, "a", "app:1", "other:1", content=b"x" * 100)
    removed = remove(store, "app:1")
    assert (removed.names, removed.digests, removed.freed) == (("docker.io/library/app:1 (linux/amd64)",), (), 0)
    assert store.find("other:1", AMD).record.digest == digest
    removed = remove(store, "other:1")
    assert (removed.digests, removed.freed) == ((digest,), 100)
    assert store.digests() == []
    assert not Path(f"{store.path}/names/docker.io").exists()


def test_removing_a_name_takes_every_platform_or_the_one_asked_for(store: Store) -> None:
    put(store, "a", "app:1")
    arm = put(store, "b", "app:1", platform=ARM)
    assert remove(store, "app:1", ARM).digests == (arm,)
    assert store.platforms_of(APP) == [AMD]
    put(store, "b", "app:1", platform=ARM)
    assert len(remove(store, "app:1").names) == 2


def test_removing_by_digest_takes_all_its_names(store: Store) -> None:
    digest = put(store, "a", "app:1", "other:1")
    keep = put(store, "b", "third:1")
    removed = remove(store, digest[: 7 + 12])
    assert len(removed.names) == 2
    assert removed.digests == (digest,)
    assert [line.digest for line in store.images()] == [keep]


def test_an_image_that_is_mounted_lives_on_for_who_has_it(store: Store) -> None:
    put(store, "a", "app:1", content=b"hsqs content")
    descriptor = store.open_image_file(store.find("app:1", AMD))
    try:
        remove(store, "app:1")
        assert os.read(descriptor, 100) == b"hsqs content"
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("text", ["app:1", "sha256:" + "0" * 64, "sha256:" + "0" * 12, "oci-archive:/x/app.tar"])
def test_removing_what_is_not_there_is_said_so(store: Store, text: str) -> None:
    with pytest.raises(ImageNotInStore):
        remove(store, text)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts")
def test_a_read_only_store_is_named_and_still_read(store: Store) -> None:
    digest = put(store, "a", "app:1")
    subprocess.run(["mount", "--bind", "-o", "ro", store.path, store.path], check=True)
    try:
        assert Store.open(store.path).find("app:1", AMD).record.digest == digest
        with pytest.raises(StoreUnusable, match="not writable"):
            Store.open(store.path, writable=True)
        with pytest.raises(StoreUnusable, match="read-only"):
            remove(Store.open(store.path), "app:1")
    finally:
        subprocess.run(["umount", store.path], check=True)


def test_an_obstacle_in_the_place_of_a_store_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnusable, match="file"):
        Store.open(str(tmp_path / "file" / "store"), writable=True)
