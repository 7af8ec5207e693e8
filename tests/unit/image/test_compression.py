"""Decompression: every form a layer comes in, in bounded pieces, and nothing that is cut off or followed by junk."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import lzma
import threading
from collections.abc import Iterator

import pytest
import zstandard

from hpcctr.errors import ImageBroken
from hpcctr.image.compression import CHUNK, decompressed, is_compressed, prefetched
from tests.support.oci import compress, file, tar

CONTENT = tar(*(file(f"f{number}", bytes([number % 256]) * 3000) for number in range(40)))


class Trickle(io.BytesIO):
    """Gives out few bytes at a time, as a network does."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(size if size and size > 0 else 7, 7))


def unpacked(blob: bytes) -> bytes:
    return b"".join(decompressed(io.BytesIO(blob), "layer 1"))


SKIPPABLE = b"\x5a\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"


@pytest.mark.parametrize(
    "blob",
    [
        CONTENT,
        gzip.compress(CONTENT),
        gzip.compress(CONTENT[:7001]) + gzip.compress(CONTENT[7001:]),
        gzip.compress(CONTENT) + bytes(512),
        gzip.compress(b"") + gzip.compress(CONTENT),
        compress(CONTENT, "zstd"),
        compress(CONTENT[:7001], "zstd") + compress(CONTENT[7001:], "zstd"),
        SKIPPABLE + compress(CONTENT, "zstd") + SKIPPABLE,
        zstandard.ZstdCompressor(write_content_size=False, write_checksum=True).compress(CONTENT),
    ],
    ids=["plain", "gzip", "two members", "padded", "empty member", "zstd", "two frames", "skippable", "checksum"],
)
def test_every_form_of_a_layer_gives_its_content(blob: bytes) -> None:
    assert unpacked(blob) == CONTENT
    assert b"".join(decompressed(Trickle(blob), "layer 1")) == CONTENT


def test_nothing_is_nothing() -> None:
    assert unpacked(b"") == b""


@pytest.mark.parametrize("cut", [3, 11, 100, -1, -5, -9])
def test_gzip_that_ends_early_is_refused(cut: int) -> None:
    blob = gzip.compress(CONTENT)
    with pytest.raises(ImageBroken, match="layer 1 is cut off"):
        unpacked(blob[:cut])


@pytest.mark.parametrize(
    "blob",
    [
        gzip.compress(CONTENT) + b"junk",
        gzip.compress(CONTENT)[:-8] + bytes(8),
        gzip.compress(CONTENT)[:50] + b"\xff" * 500,
        compress(CONTENT, "zstd")[:40] + b"\xff" * 500,
        compress(CONTENT, "zstd") + b"junkjunk",
        b"\x28\xb5\x2f\xfd",
    ],
)
def test_damaged_compression_is_refused_or_gives_less(blob: bytes) -> None:
    try:
        content = unpacked(blob)
    except ImageBroken as error:
        assert "layer 1" in str(error)
        return
    assert content == b""


@pytest.mark.parametrize(("blob", "name"), [(bz2.compress(b"x"), "bzip2"), (lzma.compress(b"x"), "xz")])
def test_other_compressions_are_named(blob: bytes, name: str) -> None:
    with pytest.raises(ImageBroken, match=name):
        unpacked(blob)


@pytest.mark.parametrize("how", ["gzip", "zstd"])
def test_a_bomb_comes_in_bounded_pieces(how: str) -> None:
    bomb = (
        gzip.compress(bytes(64 << 20)) if how == "gzip" else zstandard.ZstdCompressor(level=3).compress(bytes(64 << 20))
    )
    sizes = [len(piece) for piece in decompressed(io.BytesIO(bomb), "layer 1")]
    assert sum(sizes) == 64 << 20
    assert max(sizes) <= CHUNK


def test_a_compressed_archive_is_recognised() -> None:
    assert is_compressed(gzip.compress(b"x"))
    assert is_compressed(compress(b"x", "zstd"))
    assert not is_compressed(CONTENT[:8])


def test_prefetching_changes_nothing_but_the_thread() -> None:
    threads = set()

    def make() -> Iterator[bytes]:
        for number in range(100):
            threads.add(threading.current_thread())
            yield bytes([number])

    assert list(prefetched(make())) == [bytes([number]) for number in range(100)]
    assert threading.current_thread() not in threads


def test_an_error_while_prefetching_is_raised_where_the_chunks_are_taken() -> None:
    def make() -> Iterator[bytes]:
        yield b"1"
        raise ImageBroken("broken")

    taken = []
    with pytest.raises(ImageBroken, match="broken"):
        taken += [chunk for chunk in prefetched(make())]
    assert threading.active_count() == len([thread for thread in threading.enumerate() if thread.name != "decompress"])


def test_prefetching_that_is_given_up_ends_its_thread() -> None:
    chunks = prefetched(itertools.repeat(b"x"))
    assert next(chunks) == b"x"
    chunks.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "decompress"]


@pytest.mark.parametrize("size", [0, 1, 5000, CHUNK + 5])
def test_a_blob_of_many_members_gives_the_content_of_all(size: int) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    member = gzip.compress(content[:size], mtime=0)
    count = max(2, min(3000, 3 * CHUNK // (size + 1)))
    expected = content[:size] * count
    assert unpacked(member * count) == expected
    assert unpacked((member + bytes(700)) * count) == expected


@pytest.mark.parametrize("window", [28, 31])
def test_a_window_larger_than_a_reader_needs_is_refused(window: int) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=window, enable_ldm=False)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj().compress(b"x" * 1000)
    blob = b"\x28\xb5\x2f\xfd" + bytes([0x00, (window - 10) << 3]) + frame[6:] + b"\x01\x00\x00"
    with pytest.raises(ImageBroken, match="zstd"):
        unpacked(blob)
