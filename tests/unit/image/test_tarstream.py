"""Reading tar streams: every dialect, by our own bytes and by GNU tar's and Python's, and nothing that is damaged."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcctr.errors import ImageBroken
from hpcctr.image.tarstream import ByteStream, Entry, entries, printable
from tests.support.oci import (
    MTIME,
    Member,
    character_device,
    directory,
    file,
    hardlink,
    member_bytes,
    number,
    pax_record,
    symlink,
    tar,
)


def read(stream: bytes, piece: int = 700) -> list[Entry]:
    return list(entries(ByteStream(stream[at : at + piece] for at in range(0, len(stream), piece)), "layer 1"))


def one(stream: bytes) -> Entry:
    (entry,) = read(stream)
    return entry


def test_a_header_says_what_it_says() -> None:
    entry = one(tar(file("a/b", b"content", mode=0o4751, mtime=7)))
    assert (entry.name, entry.type, entry.mode, entry.size, entry.mtime) == (b"a/b", b"0", 0o4751, 7, 7)
    assert (entry.offset, entry.link, entry.kept_xattrs, entry.other_xattrs) == (512, b"", None, 0)


@pytest.mark.parametrize("piece", [1, 511, 512, 513, 10_000])
def test_chunks_may_end_anywhere(piece: int) -> None:
    stream = tar(file("a", b"x" * 1000), directory("d"), file("d/b", b"y" * 511), symlink("l", "a"))
    found = read(stream, piece)
    assert [entry.name for entry in found] == [b"a", b"d", b"d/b", b"l"]
    assert [stream[entry.offset : entry.offset + entry.size] for entry in found] == [b"x" * 1000, b"", b"y" * 511, b""]


LONG = b"p" * 90 + b"/" + b"n" * 90


@pytest.mark.parametrize("how", ["gnu", "pax", "ustar"])
def test_long_names_in_every_dialect(how: str) -> None:
    assert one(tar(file(LONG, b"1", long_names=how))).name == LONG


@pytest.mark.parametrize("how", ["gnu", "pax"])
def test_long_link_targets_in_every_dialect(how: str) -> None:
    assert one(tar(symlink("l", LONG * 3, long_names=how))).link == LONG * 3
    assert one(tar(hardlink(LONG, LONG, long_names=how))).link == LONG


def test_a_gnu_header_has_no_prefix() -> None:
    stream = bytearray(member_bytes(file("name", magic=b"ustar  \0")))
    stream[345:350] = b"12345"
    stream[148:156] = b" " * 8
    stream[148:156] = b"%06o\0 " % sum(stream[:512])
    assert one(bytes(stream) + bytes(1024)).name == b"name"


def test_a_header_of_v7_is_read() -> None:
    assert one(tar(Member(name=b"a", type=b"\0", content=b"1", magic=b""))).type == b"0"
    assert one(tar(Member(name=b"d/", type=b"\0", magic=b""))).type == b"5"


def test_names_are_bytes() -> None:
    assert one(tar(file(b"\xff\xfe\x01"))).name == b"\xff\xfe\x01"
    assert one(tar(file("x", pax={"hdrcharset": b"BINARY", "path": b"\xe9"}))).name == b"\xe9"


@pytest.mark.parametrize(("said", "mtime"), [(b"5.75", 5), (b"-3", -3), (b"12345678901", 12345678901), (b"0", 0)])
def test_times_of_pax_headers(said: bytes, mtime: int) -> None:
    assert one(tar(file("x", pax={"mtime": said}))).mtime == mtime


def test_sizes_of_pax_headers_decide() -> None:
    found = read(tar(file("x", b"content" * 100, size=0, pax={"size": b"700"}), file("y")))
    assert [(entry.name, entry.size) for entry in found] == [(b"x", 700), (b"y", 0)]


@pytest.mark.parametrize("value", [0, 8**7 - 1, 8**7, 2**40, -1, -(2**40)])
def test_numbers_octal_and_base_256(value: int) -> None:
    assert one(tar(file("x", mtime=value))).mtime == value


def test_a_later_pax_record_of_a_key_decides_and_an_empty_one_deletes() -> None:
    records = pax_record("path", b"one") + pax_record("path", b"two") + pax_record("linkpath", b"")
    stream = member_bytes(Member(name=b"pax", type=b"x", content=records)) + tar(symlink("l", "target"))
    assert (one(stream).name, one(stream).link) == (b"two", b"target")


def test_global_pax_headers_are_passed_over() -> None:
    stream = member_bytes(Member(name=b"g", type=b"g", content=pax_record("path", b"evil"))) + tar(file("x"))
    assert one(stream).name == b"x"


def test_extended_attributes_of_users_are_kept_and_others_counted() -> None:
    entry = one(
        tar(
            file(
                "x",
                pax={
                    "SCHILY.xattr.user.a": b"1=\n2",
                    "SCHILY.xattr.security.capability": b"x",
                    "SCHILY.xattr.user.": b"x",
                    "LIBARCHIVE.xattr.user.b": b"x",
                    "SCHILY.acl.access": b"x",
                    "comment": b"x",
                },
            )
        )
    )
    assert (entry.kept_xattrs, entry.other_xattrs) == ({b"user.a": b"1=\n2"}, 4)


def test_a_link_with_a_size_has_no_content() -> None:
    found = read(
        tar(file("a", b"1"), hardlink("b", "a", size=1), Member(name=b"d", type=b"5", size=5), file("c", b"2"))
    )
    assert [(entry.name, entry.size) for entry in found] == [(b"a", 1), (b"b", 0), (b"d", 0), (b"c", 1)]


@pytest.mark.parametrize("end", [b"", bytes(512), bytes(1024), bytes(10240), bytes(1024) + b"after the end"])
def test_ends_of_a_stream(end: bytes) -> None:
    assert len(read(tar(file("a", b"1"), end=end))) == 1


@pytest.mark.parametrize(
    "stream",
    [
        b"x",
        b"x" * 512,
        bytes(512) + member_bytes(file("a")),
        tar(file("a", b"1"))[:512],
        tar(file("a", b"1" * 600))[:1100],
        tar(file("a", b"1"))[:700],
        tar(file("a"))[:100],
        member_bytes(file(LONG))[:512],
        member_bytes(file(LONG))[:1024],
        member_bytes(Member(name=b"L", type=b"L", content=b"name\0")),
        tar(Member(name=b"a", type=b"S")),
        tar(file("a", pax={"GNU.sparse.map": b"0,1"})),
        tar(Member(name=b"a", type=b"V")),
        tar(Member(name=b"a", type=b"?")),
        tar(file("a", size=-5)),
        tar(file("a", pax={"size": b"-5"})),
        tar(file("a", pax={"size": b"1x"})),
        tar(file("a", pax={"mtime": b"soon"})),
        tar(file("a", pax={"path": b"a\0b"})),
        tar(Member(name=b"x", type=b"x", content=b"99 path=a\n")),
        tar(Member(name=b"x", type=b"x", content=b"path=a\n")),
        tar(Member(name=b"x", type=b"x", content=b"10 path:aa\n")),
        tar(Member(name=b"x", type=b"x", content=b"0 a=b\n")),
        tar(Member(name=b"x", type=b"x", size=1 << 40)),
        tar(Member(name=b"x", type=b"L", content=b"n" * ((1 << 20) + 1))),
    ],
)
def test_what_is_damaged_is_refused(stream: bytes) -> None:
    with pytest.raises(ImageBroken, match="layer 1"):
        read(stream)


@pytest.mark.parametrize("at", [0, 100, 124, 148, 156, 257])
def test_a_damaged_header_is_noticed(at: int) -> None:
    stream = bytearray(tar(file("a", b"1")))
    stream[at] ^= 0x15
    with pytest.raises(ImageBroken):
        read(bytes(stream))


def test_a_checksum_of_signed_bytes_is_taken() -> None:
    stream = bytearray(tar(file(b"\xff\xfe")))
    stream[148:156] = b" " * 8
    stream[148:156] = b"%06o\0 " % sum(byte - 256 if byte > 127 else byte for byte in stream[:512])
    assert one(bytes(stream)).name == b"\xff\xfe"


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=3000), st.integers(0, 2500))
def test_any_bytes_are_entries_or_refused(junk: bytes, at: int) -> None:
    stream = bytearray(tar(file("a", b"1"), symlink("b", LONG), file("c", pax={"mtime": b"1.5"})))
    stream[at : at + len(junk)] = junk
    try:
        read(bytes(stream))
    except ImageBroken as error:
        assert "layer 1" in str(error)


def test_what_python_writes_is_read() -> None:
    for dialect in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(
            fileobj=buffer, mode="w", format=dialect, encoding="utf-8", errors="surrogateescape"
        ) as archive:
            for name in ("a", "d\u00e9", "x" * 99 + "/" + "y" * 99):
                info = tarfile.TarInfo(name)
                info.size, info.mtime, info.mode = 3, MTIME, 0o640
                archive.addfile(info, io.BytesIO(b"abc"))
        found = read(buffer.getvalue())
        assert [entry.name.decode() for entry in found] == ["a", "d\u00e9", "x" * 99 + "/" + "y" * 99]
        assert {(entry.size, entry.mtime, entry.mode) for entry in found} == {(3, MTIME, 0o640)}


@pytest.mark.parametrize("dialect", ["v7", "ustar", "oldgnu", "gnu", "pax"])
def test_what_gnu_tar_writes_is_read(tmp_path: Path, dialect: str) -> None:
    tree = tmp_path / "tree"
    (tree / "directory").mkdir(parents=True)
    (tree / "directory/file").write_bytes(b"content")
    (tree / "directory/link").symlink_to("file")
    (tree / "hard").hardlink_to(tree / "directory/file")
    made = subprocess.run(
        ["tar", "-C", str(tree), f"--format={dialect}", "-cf", "-", "."], check=True, capture_output=True
    )
    found = {entry.name.strip(b"./"): entry for entry in read(made.stdout)}
    assert found.keys() == {b"", b"directory", b"directory/file", b"directory/link", b"hard"}
    assert found[b"directory/link"].link == b"file"
    content = [made.stdout[entry.offset : entry.offset + entry.size] for entry in found.values() if entry.size]
    assert content == [b"content"]


@pytest.mark.parametrize(
    "options", [["--sparse"], ["--sparse", "--format=pax"], ["--sparse", "--format=pax", "--sparse-version=0.0"]]
)
def test_sparse_files_are_named(tmp_path: Path, options: list[str]) -> None:
    with (tmp_path / "hole").open("wb") as holed:
        holed.truncate(10 << 20)
        holed.seek(5 << 20)
        holed.write(b"x")
    made = subprocess.run(["tar", "-C", str(tmp_path), *options, "-cf", "-", "hole"], check=True, capture_output=True)
    with pytest.raises(ImageBroken, match="sparse") as caught:
        read(made.stdout)
    assert "--sparse" in caught.value.hint


def test_devices_are_entries() -> None:
    assert one(tar(character_device("null", 1, 3))).type == b"3"


@pytest.mark.parametrize(("name", "shown"), [(b"a/b", "a/b"), (b"\xff", "\\xff"), (b"a\nb\x1b", "a\\x0ab\\x1b")])
def test_names_in_messages_have_no_control_characters(name: bytes, shown: str) -> None:
    assert printable(name) == shown
    assert len(printable(b"x" * 5000)) < 300


@pytest.mark.parametrize("act", [lambda s: s.take(10), lambda s: s.skip(10), lambda s: s.copy(10, lambda _: None)])
def test_a_stream_counts_what_it_passes(act: Callable[[ByteStream], object]) -> None:
    stream = ByteStream(iter([b"abcd", b"", b"efghijkl"]))
    act(stream)
    assert stream.position == 10
    assert stream.take(5) == b"kl"
    assert stream.position == 12
    assert stream.skip(1) is False
    assert stream.copy(1, lambda _: None) is False


def test_base_256_is_what_the_support_module_writes() -> None:
    assert number(8**7, 8)[0] == 0x80
