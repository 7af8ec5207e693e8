"""What may be noted of a file, and how a file reads of which only the beginning and the end are held."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcctr.image.libraryfile import NAME_MAX, PATH_MAX, Held, data_of, is_library_name, is_path, is_word, noted_path
from tests.support.linked_images import library


@given(st.binary(max_size=60), st.integers(0, 60), st.integers(0, 60), st.integers(0, 70), st.integers(0, 70))
def test_what_is_held_reads_as_the_file_and_the_rest_as_missing(
    content: bytes, head: int, tail: int, at: int, size: int
) -> None:
    tail = min(tail, max(len(content) - head, 0))
    held = Held(content[:head], content[len(content) - tail :], len(content))
    held.seek(at)
    piece = held.read(size)
    assert content[at : at + size].startswith(piece)
    if at + size <= head or at >= len(content) - tail:
        assert piece == content[at : at + size]


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "lib",
        "//lib",
        "/lib/",
        "/a//b",
        "/a/../b",
        "/a/./b",
        "/a\n",
        "/a\x1b[1m",
        "/\udcff",
        "/" + "a" * PATH_MAX,
    ],
)
def test_no_other_path_than_a_plain_one_is_noted(path: str) -> None:
    assert not is_path(path)


@pytest.mark.parametrize("path", ["/a", "/usr/lib/libä.so", "/a/.b/..c", "/" + "a" * (PATH_MAX - 1)])
def test_plain_paths_are_noted(path: str) -> None:
    assert is_path(path)
    assert noted_path(path[1:].encode()) == path


def test_words_are_short_and_printable() -> None:
    assert is_word("GLIBC_2.36") and is_word("x" * NAME_MAX)
    assert not any(map(is_word, ("", "x" * (NAME_MAX + 1), "a\nb", "\udcff", "\u202e")))


def test_a_path_that_is_no_text_is_not_noted() -> None:
    assert noted_path(b"lib/\xff") == noted_path(b"lib//a") == ""


@pytest.mark.parametrize(
    "name", ["libc.so.6", "libstdc++.so.6.0.30", "libLLVM-17.so", "ld-musl-x86_64.so.1", "libc.so"]
)
def test_names_of_libraries(name: str) -> None:
    assert is_library_name(name.encode())


@pytest.mark.parametrize("name", ["ld.so.conf", "demo.so", "libdemo.a", "libdemo.so.1/x", "lib.so", "libdemo.sox"])
def test_names_of_other_files(name: str) -> None:
    assert not is_library_name(name.encode())


def test_texts_of_a_library_are_in_what_is_not_executed() -> None:
    body = 'const char text[] = "a text";\nvoid nothing(void) { __asm__(".fill 200000, 1, 0x90"); }\n'
    content = library("libtext.so.1", body=body)
    data = data_of(content)
    assert b"a text\0" in data and b"libtext.so.1\0" in data
    assert b"\x90" * 1000 not in data and len(data) < len(content) // 2


def test_where_texts_may_be_executed_all_of_it_counts() -> None:
    content = bytearray(library("libtext.so.1"))
    content[64 + 4] |= 1
    assert data_of(bytes(content)) == content


@given(st.integers(24, 64 + 3 * 56), st.binary(min_size=1, max_size=16))
def test_headers_that_lie_give_no_more_than_the_file(at: int, changed: bytes) -> None:
    good = library("libtext.so.1")
    content = good[:at] + changed + good[at + len(changed) :]
    assert len(data_of(content)) <= len(content)
