"""An image file is what was published, or is not mounted."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from hpcctr.engine import intact
from hpcctr.engine.intact import require_intact
from hpcctr.errors import DeadlinePassed, ImageDamaged
from hpcctr.image import verity
from hpcctr.image.record import ImageRecord
from tests.support.values import a_stored_image

CONTENT = b"hsqs" + bytes(5 << 20)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "file").write_bytes(CONTENT)
    descriptor = os.open(tmp_path / "file", os.O_RDWR)
    yield descriptor
    os.close(descriptor)


def _record(**changed: object) -> ImageRecord:
    digest = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
    record = msgspec.structs.replace(a_stored_image().record, file_size=len(CONTENT), file_digest=digest)
    return msgspec.structs.replace(record, **changed)


def test_a_whole_file_is_intact_and_the_descriptor_stays_where_it_was(file: int) -> None:
    os.lseek(file, 7, os.SEEK_SET)
    require_intact(file, _record(), is_read=True)
    assert os.lseek(file, 0, os.SEEK_CUR) == 7


@pytest.mark.parametrize("damage", ["a bit", "cut", "longer"])
def test_damage_is_named_with_the_remedy_when_the_file_is_read(file: int, damage: str) -> None:
    if damage == "a bit":
        os.pwrite(file, b"\1", 4 << 20)
    else:
        os.truncate(file, len(CONTENT) + (1 if damage == "longer" else -1))
    require_intact(file, _record(), is_read=False)
    with pytest.raises(ImageDamaged) as raised:
        require_intact(file, _record(source="docker.io/library/app:1"), is_read=True)
    assert "is damaged: its digest is sha256:" in raised.value.message
    assert raised.value.hint == "hpcctr pull --verify docker.io/library/app:1"


def test_what_the_disk_does_not_give_is_damage(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(ImageDamaged, match="cannot be read: is a directory"):
        require_intact(descriptor, _record(), is_read=True)
    os.close(descriptor)


def test_reading_has_an_end(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intact, "READ_SECONDS", -1.0)
    with pytest.raises(DeadlinePassed, match="was not read within"):
        require_intact(file, _record(), is_read=True)


def test_the_kernels_digest_decides_at_once_where_there_is_one(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the kernel's answer: tests/unit/image/test_verity.py asks real ones."""
    sealed = "sha256:" + "1" * 64
    monkeypatch.setattr(verity, "measure", lambda _: sealed)
    os.pwrite(file, b"\1", 4 << 20)
    require_intact(file, _record(verity=sealed), is_read=True)
    with pytest.raises(ImageDamaged, match="the kernel's digest of it is sha256:111"):
        require_intact(file, _record(verity="sha256:" + "2" * 64), is_read=False)
    # Of a record without one nothing is asked.
    require_intact(file, _record(), is_read=False)


def test_a_copy_that_no_kernel_checks_is_read_where_the_site_wants_it(file: int) -> None:
    record = _record(verity="sha256:" + "1" * 64)
    require_intact(file, record, is_read=True)
    os.pwrite(file, b"\1", 0)
    with pytest.raises(ImageDamaged):
        require_intact(file, record, is_read=True)
