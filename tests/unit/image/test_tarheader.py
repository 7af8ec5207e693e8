"""Written headers say what was given: read back by Python's tarfile, an implementation of its own."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcctr.image.tarheader import header, padding
from hpcctr.image.tarstream import DIRECTORY, HARDLINK, REGULAR, SYMLINK


def read_back(*blocks: bytes) -> list[tarfile.TarInfo]:
    stream = io.BytesIO(b"".join(blocks) + bytes(1024))
    with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
        return archive.getmembers()


_name = st.binary(min_size=1, max_size=400).filter(lambda name: b"\0" not in name and not name.endswith(b"/"))


@given(_name, st.integers(0, 0o777), st.integers(0, 3000), st.integers(0, 2**32 - 1))
def test_a_file_is_read_back(name: bytes, mode: int, size: int, mtime: int) -> None:
    (info,) = read_back(header(name, REGULAR, mode=mode, size=size, mtime=mtime), bytes(size), padding(size))
    assert info.name.encode("utf-8", "surrogateescape") == name
    assert (info.mode, info.size, info.mtime, info.uid, info.gid) == (mode, size, mtime, 0, 0)
    assert info.isreg()


@given(_name, _name)
def test_links_are_read_back(name: bytes, target: bytes) -> None:
    symbolic, hard = read_back(
        header(name, SYMLINK, mode=0o777, link=target), header(name, HARDLINK, mode=0o644, link=target)
    )
    assert symbolic.issym()
    assert hard.islnk()
    for info in (symbolic, hard):
        assert info.linkname.encode("utf-8", "surrogateescape") == target


def test_a_directory_is_read_back() -> None:
    (info,) = read_back(header(b"d", DIRECTORY, mode=0o1777))
    assert info.isdir()
    assert info.mode == 0o1777


def test_extended_attributes_are_pax_records() -> None:
    (info,) = read_back(header(b"x", REGULAR, mode=0o644, xattrs={b"user.a": b"1\n=2", b"user.b": b"y" * 1000}))
    assert info.pax_headers["SCHILY.xattr.user.a"] == "1\n=2"
    assert len(info.pax_headers["SCHILY.xattr.user.b"]) == 1000


@pytest.mark.parametrize("size", [8**11 - 1, 8**11, 2**45])
def test_sizes_beyond_octal(size: int) -> None:
    blocks = header(b"x", REGULAR, mode=0o644, size=size)
    assert tarfile.TarInfo.frombuf(blocks, "utf-8", "strict").size == size


@pytest.mark.parametrize(("mtime", "kept"), [(-5, 0), (2**40, 2**32 - 1), (7, 7)])
def test_times_a_squashfs_cannot_hold_are_brought_into_its_range(mtime: int, kept: int) -> None:
    (info,) = read_back(header(b"x", REGULAR, mode=0o644, mtime=mtime))
    assert info.mtime == kept


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513])
def test_contents_end_on_a_block(size: int) -> None:
    assert (size + len(padding(size))) % 512 == 0
    assert len(padding(size)) < 512
