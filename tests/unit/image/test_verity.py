"""fs-verity: sealed by the publisher where filesystem and kernel have it, and nothing lost where they do not."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcctr.image import verity
from hpcctr.image.store import Store
from tests.support.mount_namespace import in_private_mounts
from tests.support.scratch import scratch
from tests.unit.image.test_publish import put

CONTENT = b"hsqs" + bytes(range(256)) * 4321
#: linux/fs/ext4/sysfs.c has it where the kernel was built with CONFIG_FS_VERITY.
HAS_VERITY = Path("/sys/fs/ext4/features/verity").exists()


def merkle(content: bytes) -> str:
    """The digest of the kernel's documentation (fsverity_descriptor over a tree of 4096-byte blocks), by hand."""

    def above(level: bytes) -> bytes:
        return b"".join(
            hashlib.sha256(level[at : at + 4096].ljust(4096, b"\0")).digest() for at in range(0, len(level), 4096)
        )

    level = above(content)
    while len(level) > 32:
        level = above(level)
    head = struct.pack("<BBBBIQ64s32s144x", 1, 1, 12, 0, 0, len(content), level, b"")
    return f"sha256:{hashlib.sha256(head).hexdigest()}"


@pytest.fixture
def disk() -> Iterator[Path]:
    """An ext4 with the feature in a file."""
    with scratch("verity") as place:
        image = place / "disk"
        with image.open("wb") as file:
            file.truncate(64 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-b", "4096", "-O", "verity", image], check=True)
        (place / "mnt").mkdir()
        yield image


def sealed(disk: str) -> list[object]:
    place = os.path.join(os.path.dirname(disk), "mnt")
    subprocess.run(["mount", "-o", "loop", disk, place], check=True)
    try:
        store = Store.open(f"{place}/store", writable=True)
        image = store.image(put(store, "a", content=CONTENT))
        try:
            os.close(os.open(image.path, os.O_WRONLY))
            is_writable = True
        except PermissionError:
            is_writable = False
        file = os.open(image.path, os.O_RDONLY)
        try:
            return [image.record.verity, verity.measure(file), verity.enable(image.path), is_writable]
        finally:
            os.close(file)
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.root
@pytest.mark.skipif(not HAS_VERITY, reason="this kernel has no fs-verity (CONFIG_FS_VERITY)")
def test_a_published_file_is_sealed_and_its_record_has_the_kernels_digest(disk: Path) -> None:
    assert in_private_mounts(sealed, str(disk)) == [merkle(CONTENT)] * 3 + [False]


@pytest.mark.root
@pytest.mark.skipif(HAS_VERITY, reason="this kernel has fs-verity")
def test_where_the_kernel_has_none_a_file_is_published_without(disk: Path) -> None:
    assert in_private_mounts(sealed, str(disk)) == ["", "", "", True]


def test_a_file_on_a_filesystem_without_it_has_none() -> None:
    assert verity.enable("/proc/version") == ""
    with open("/proc/version", "rb") as file:
        assert verity.measure(file.fileno()) == ""


def test_the_ioctls_are_those_of_the_kernels_header() -> None:
    """linux/fsverity.h, computed as linux/ioctl.h does."""
    enable, measure, argument = verity._ENABLE, verity._MEASURE, verity._ENABLE_ARG.size
    assert (enable, measure, argument) == (
        1 << 30 | 128 << 16 | 0x66 << 8 | 133,
        3 << 30 | 4 << 16 | 0x66 << 8 | 134,
        128,
    )
