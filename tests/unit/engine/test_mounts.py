"""Mounting and looking up as the kernel has it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcctr.engine import mounts
from hpcctr.mounttable import read_mounts
from tests.support.mount_namespace import in_private_mounts


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "out").symlink_to("/etc")
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


def _number(directory: int, name: bytes) -> int:
    with pytest.raises(OSError) as raised:  # noqa: PT011
        mounts.open_beneath(directory, name)
    assert raised.value.errno is not None
    return raised.value.errno


def test_a_name_below_is_opened_without_access(directory: int, tmp_path: Path) -> None:
    descriptor = mounts.open_beneath(directory, b"a/b")
    assert os.path.samestat(os.fstat(descriptor), os.stat(tmp_path / "a/b"))
    assert not os.get_inheritable(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.listdir(descriptor)
    os.close(descriptor)


def test_a_symbolic_link_is_never_followed(directory: int) -> None:
    assert _number(directory, b"link") == errno.ELOOP
    assert _number(directory, b"link/b") == errno.ELOOP
    assert _number(directory, b"out") == errno.ELOOP
    assert _number(directory, b"out/passwd") == errno.ELOOP


def test_the_way_up_ends_at_the_directory(directory: int, tmp_path: Path) -> None:
    for name in (b"..", b"../..", b"/", b"a/../.."):
        descriptor = mounts.open_beneath(directory, name)
        assert os.path.samestat(os.fstat(descriptor), os.stat(tmp_path))
        os.close(descriptor)


def test_what_is_not_there_is_told_apart(directory: int) -> None:
    assert _number(directory, b"nothing") == errno.ENOENT
    assert _number(directory, b"file/below") == errno.ENOTDIR


def crossing(place: str) -> int:
    below = f"{place}/below"
    os.mkdir(below)
    mounts.mount("hpcctr", below, "tmpfs", flags=mounts.MS_NOSUID | mounts.MS_NODEV, data="size=64k")
    directory = os.open(place, os.O_RDONLY)
    try:
        mounts.open_beneath(directory, b"below")
    except OSError as error:
        return error.errno or 0
    return 0


@pytest.mark.root
def test_another_mount_is_never_entered(tmp_path: Path) -> None:
    assert in_private_mounts(crossing, tmp_path) == errno.EXDEV


def mounting(place: str) -> list[object]:
    name = f"{place}/a b\\c\nd"
    os.mkdir(name)
    mounts.mount("hpcctr", name, "tmpfs", flags=mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC, data="size=64k")
    (entry,) = [entry for entry in read_mounts() if entry.target == name]
    held = os.open(name, os.O_RDONLY)
    mounts.unmount(name)
    still = [entry.target for entry in read_mounts() if entry.target == name]
    mounts.unmount(name)
    mounts.unmount(f"{place}/nothing")
    os.close(held)
    return [sorted(entry.options), "size=64k" in entry.super_options, entry.kind, entry.source, still]


@pytest.mark.root
def test_a_mount_has_the_flags_asked_for_and_goes_even_while_it_is_used(tmp_path: Path) -> None:
    options, is_sized, kind, source, still = in_private_mounts(mounting, tmp_path)
    assert {"nosuid", "nodev", "noexec", "rw"} <= set(options)
    assert (is_sized, kind, source, still) == (True, "tmpfs", "hpcctr", [])


def unmounting_through_a_link(place: str) -> int:
    os.mkdir(f"{place}/real")
    os.symlink("real", f"{place}/link")
    mounts.mount("hpcctr", f"{place}/real", "tmpfs", flags=0, data="size=64k")
    mounts.unmount(f"{place}/link")
    return sum(entry.target == f"{place}/real" for entry in read_mounts())


@pytest.mark.root
def test_unmounting_follows_no_link(tmp_path: Path) -> None:
    assert in_private_mounts(unmounting_through_a_link, tmp_path) == 1


@pytest.mark.root
def test_a_filesystem_the_kernel_lacks_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised:  # noqa: PT011
        mounts.mount("none", str(tmp_path), "nosuchfs", flags=0)
    assert raised.value.errno == errno.ENODEV
