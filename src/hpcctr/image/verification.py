"""Digests and sizes: what was promised, compared with what came."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from hpcctr.errors import ImageBroken
from hpcctr.image.compression import ByteSource


class Verification:
    """Digest and size of something, compared with what was promised."""

    def __init__(self, digest: str, size: int, what: str) -> None:
        self._promised = digest
        self._size = size
        self._what = what
        self._hash = hashlib.new(digest.partition(":")[0]) if digest else None
        self.count = 0

    def add(self, chunk: bytes) -> None:
        """Raises :class:`ImageBroken` as soon as there is too much."""
        self.count += len(chunk)
        if self._hash is not None:
            self._hash.update(chunk)
        if 0 <= self._size < self.count:
            raise ImageBroken(f"{self._what} is larger than the {self._size} bytes its manifest promises")

    def require_size(self, size: int) -> None:
        """Raise :class:`ImageBroken` unless so many bytes were promised, or nothing was."""
        if 0 <= self._size != size:
            raise ImageBroken(f"{self._what} has {size} bytes, its manifest promises {self._size}")

    def require_agreement(self) -> None:
        """Raise :class:`ImageBroken` unless digest and size are as promised."""
        self.require_size(self.count)
        if self._hash is not None and self._hash.hexdigest() != self._promised.partition(":")[2]:
            raise ImageBroken(
                f"{self._what} has the digest {self._hash.name}:{self._hash.hexdigest()}, promised is {self._promised}",
                hint="fetch it again; the image may be damaged where it came from",
            )


class VerifiedReader:
    """A source of bytes that is checked while it is read, and as a whole when it ends.

    ``count`` is told how many bytes more were read.
    """

    def __init__(self, source: ByteSource, check: Verification, count: Callable[[int], None] = lambda _: None) -> None:
        self._source = source
        self._check = check
        self._count = count
        self._ended = False

    def read(self, size: int = -1) -> bytes:
        """Raises :class:`ImageBroken`."""
        chunk = self._source.read(size)
        if chunk:
            self._check.add(chunk)
            self._count(len(chunk))
        elif not self._ended:
            self._ended = True
            self._check.require_agreement()
        return chunk


def sha256_of(content: bytes) -> str:
    """``sha256:<64 hex>`` of some bytes."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
