"""Layers come compressed: gzip (several members), zstd (several frames), or not at all. The first bytes tell, not the
media type.

Output arrives in chunks of bounded size, so a bomb costs time and never memory; what ends early is caught by the tar
stream and by the digest of the uncompressed layer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Protocol

from hpcctr.errors import ImageBroken

#: Bytes read and handed on at once.
CHUNK = 1 << 20
#: Bytes of a gzip member that are decompressed first.
_FIRST_STEP = 1 << 12
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
#: RFC 8878 section 3.1.2: skippable frames, which may come first.
_ZSTD_SKIPPABLE = tuple(bytes([digit]) + b"\x2a\x4d\x18" for digit in range(0x50, 0x60))
_OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x04\x22\x4d\x18": "lz4"}


class ByteSource(Protocol):
    """What is decompressed: at most ``size`` bytes a call, none at the end."""

    def read(self, size: int, /) -> bytes: ...


class Blob(ByteSource, Protocol):
    """A source that is closed after use."""

    def close(self) -> None: ...


def decompressed(source: ByteSource, what: str) -> Iterator[bytes]:
    """The content of ``source`` in chunks of at most :data:`CHUNK`. Raises :class:`ImageBroken`; ``what`` names the
    source."""
    head = _Headed(source)
    if head.first.startswith(_GZIP):
        return _gunzip(head, what)
    if head.first.startswith((_ZSTD, *_ZSTD_SKIPPABLE)):
        return _unzstd(head, what)
    for magic, name in _OTHERS.items():
        if head.first.startswith(magic):
            raise ImageBroken(
                f"{what} is compressed with {name}", hint="OCI images have gzip, zstd or uncompressed layers"
            )
    return iter(lambda: head.read(CHUNK), b"")


def is_compressed(first: bytes) -> bool:
    """Whether a file that begins so is one :func:`decompressed` decompresses."""
    return first.startswith((_GZIP, _ZSTD, *_ZSTD_SKIPPABLE))


class _Headed:
    """A source whose first bytes have been looked at."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self.first = b""
        while len(self.first) < 8 and (more := source.read(CHUNK)):
            self.first += more
        self._pending = self.first

    def read(self, size: int = CHUNK) -> bytes:
        if not self._pending:
            return self._source.read(size)
        out, self._pending = self._pending[:size], self._pending[size:]
        return out


def _gunzip(source: _Headed, what: str) -> Iterator[bytes]:
    from isal.igzip_lib import DECOMP_GZIP, IgzipDecompressor, IsalError

    member = IgzipDecompressor(DECOMP_GZIP)
    begun = False
    while raw := source.read(CHUNK):
        at, step = 0, _FIRST_STEP
        while at < len(raw):
            # What is left after a member is copied: a blob of tiny members would be copied again and again.
            piece = raw[at : at + step]
            if not begun:
                # gzip(1) pads with zeros on tapes; anything else after a member must be the next one.
                at += len(piece) - len(piece.lstrip(b"\0"))
                piece = piece.lstrip(b"\0")
                if not piece:
                    continue
            begun = True
            at += len(piece)
            step = min(step * 16, CHUNK)
            try:
                out = member.decompress(piece, CHUNK)
                if out:
                    yield out
                while not member.eof and not member.needs_input:
                    out = member.decompress(b"", CHUNK)
                    if out:
                        yield out
            except (IsalError, EOFError) as error:  # type: ignore[misc] # its stub calls the class an instance
                raise ImageBroken(f"{what} is not valid gzip: {error}") from None
            if member.eof:
                at -= len(member.unused_data)
                begun, step = False, _FIRST_STEP
                member = IgzipDecompressor(DECOMP_GZIP)
    if begun:
        raise ImageBroken(f"{what} is cut off: its gzip data does not end")


def _unzstd(source: _Headed, what: str) -> Iterator[bytes]:
    from zstandard import ZstdDecompressor, ZstdError

    with ZstdDecompressor().stream_reader(source, read_size=CHUNK, read_across_frames=True) as reader:  # type: ignore[arg-type]
        while True:
            try:
                out = reader.read(CHUNK)
            except ZstdError as error:
                raise ImageBroken(f"{what} is not valid zstd: {error}") from None
            if not out:
                return
            yield out


def prefetched(chunks: Iterator[bytes], depth: int = 8) -> Iterator[bytes]:
    """The same chunks, made by a thread of their own up to ``depth`` ahead: decompressors release the interpreter."""
    ready: queue.Queue[bytes | BaseException | None] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: bytes | BaseException | None) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for chunk in chunks:
                if not put(chunk):
                    return
        except BaseException as error:  # noqa: BLE001 - it is raised where the chunks are taken
            put(error)
        else:
            put(None)

    thread = threading.Thread(target=work, name="decompress", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
