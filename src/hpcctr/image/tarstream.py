"""Reading tar streams of every dialect.

Formats: POSIX.1-2001 pax (``path``, ``linkpath``, ``size``, ``mtime``, ``SCHILY.xattr.*``), ustar, GNU (long names,
base-256 numbers), v7. Names are bytes: nothing here decodes them, so ``hdrcharset`` changes nothing. Sparse files are
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from hpcctr.errors import ImageBroken

BLOCK = 512
#: Largest pax header and longest name, bytes; Go's archive/tar, which containerd uses, has the same limit.
_SPECIAL_MAX = 1 << 20
#: include/uapi/linux/limits.h: a longer path cannot be used by a program.
PATH_MAX = 4096
XATTR_PREFIX = b"SCHILY.xattr."
_OTHER_XATTRS = (b"LIBARCHIVE.xattr.", b"SCHILY.acl.", b"RHT.security.")

REGULAR, HARDLINK, SYMLINK, DIRECTORY = b"0", b"1", b"2", b"5"
#: Character and block devices and FIFOs.
SPECIAL = (b"3", b"4", b"6")


class Entry:
    """One entry: its header after all extensions. ``offset`` is where its content begins in the uncompressed stream."""

    __slots__ = ("kept_xattrs", "link", "mode", "mtime", "name", "offset", "other_xattrs", "size", "type")

    def __init__(
        self,
        *,
        name: bytes,
        type: bytes,
        mode: int,
        size: int,
        mtime: int,
        link: bytes,
        offset: int,
        kept_xattrs: dict[bytes, bytes] | None,
        other_xattrs: int,
    ) -> None:
        self.name = name
        self.type = type
        self.mode = mode
        self.size = size
        self.mtime = mtime
        self.link = link
        self.offset = offset
        #: Extended attributes of the namespace ``user.``, and the number of others.
        self.kept_xattrs = kept_xattrs
        self.other_xattrs = other_xattrs


class ByteStream:
    """A cursor over chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._chunk = b""
        self._at = 0
        self.position = 0

    def take(self, count: int) -> bytes:
        """Exactly ``count`` bytes; fewer only at the end."""
        end = self._at + count
        if end <= len(self._chunk):
            out = self._chunk[self._at : end]
            self._at = end
            self.position += count
            return out
        parts: list[bytes] = []
        self.copy(count, parts.append)
        return b"".join(parts)

    def skip(self, count: int) -> bool:
        """Whether there were so many bytes to skip."""
        available = len(self._chunk) - self._at
        if count <= available:
            self._at += count
            self.position += count
            return True
        self.position += available
        count -= available
        for chunk in self._chunks:
            if count < len(chunk):
                self._chunk, self._at = chunk, count
                self.position += count
                return True
            self.position += len(chunk)
            count -= len(chunk)
        self._chunk, self._at = b"", 0
        return count == 0

    def copy(self, count: int, write: Callable[[bytes], object]) -> bool:
        """Hand the next ``count`` bytes on. Whether there were so many."""
        while count:
            available = len(self._chunk) - self._at
            if not available:
                chunk = next(self._chunks, None)
                if chunk is None:
                    return False
                self._chunk, self._at = chunk, 0
                continue
            part = min(available, count)
            whole = part == len(self._chunk)
            write(self._chunk if whole else self._chunk[self._at : self._at + part])
            self._at += part
            self.position += part
            count -= part
        return True

    def drain(self) -> None:
        """To the end."""
        self.position += len(self._chunk) - self._at
        self._chunk, self._at = b"", 0
        for chunk in self._chunks:
            self.position += len(chunk)


class Cursor(Protocol):
    """What headers are read from."""

    position: int

    def take(self, count: int, /) -> bytes:
        """Exactly ``count`` bytes; fewer only at the end."""
        ...

    def skip(self, count: int, /) -> bool:
        """Whether there were so many bytes to skip."""
        ...


def entries(stream: Cursor, what: str) -> Iterator[Entry]:
    """Every entry up to the end-of-archive mark, or to a clean end; contents are skipped.

    Raises :class:`ImageBroken`; ``what`` names the stream.
    """
    pax: dict[bytes, bytes] = {}
    long_name: bytes | None = None
    long_link: bytes | None = None
    zero = bytes(BLOCK)
    while True:
        begin = stream.position
        header = stream.take(BLOCK)
        if len(header) < BLOCK or header == zero:
            if header and len(header) < BLOCK:
                raise _cut_off(what)
            if header and (second := stream.take(BLOCK)) and second != zero[: len(second)]:
                raise ImageBroken(f"{what} has a zero block amid its tar headers, at byte {begin}")
            if pax or long_name is not None or long_link is not None:
                raise _cut_off(what)
            return
        _require_checksum(header, what, begin)
        kind = header[156:157]
        size = _number(header[124:136], what, begin)
        if size < 0:
            raise ImageBroken(f"{what} has a negative size in the tar header at byte {begin}")
        if kind in (b"x", b"g", b"L", b"K", b"X"):
            content = _special(stream, size, what, begin)
            if kind in (b"x", b"X"):
                pax = _pax_records(content, what, begin)
            elif kind == b"L":
                long_name = content.split(b"\0", 1)[0]
            elif kind == b"K":
                long_link = content.split(b"\0", 1)[0]
            continue
        name, link = _text(header[0:100]), _text(header[157:257])
        if header[257:263] == b"ustar\0" and header[345]:
            name = _text(header[345:500]) + b"/" + name
        mode, mtime = _number(header[100:108], what, begin), _number(header[136:148], what, begin)
        kept_xattrs, other_xattrs = None, 0
        if pax:
            name, link = pax.get(b"path", name), pax.get(b"linkpath", link)
            size = _decimal(pax.get(b"size"), size, what, begin)
            mtime = _decimal(pax.get(b"mtime"), mtime, what, begin)
            kept_xattrs, other_xattrs = _xattrs(pax)
            if any(key.startswith(b"GNU.sparse.") for key in pax):
                kind = b"S"
        name = name if long_name is None else long_name
        link = link if long_link is None else long_link
        pax, long_name, long_link = {}, None, None
        if size < 0 or b"\0" in name or b"\0" in link:
            raise ImageBroken(f"{what} has a header that no file can have, at byte {begin}")
        if kind == b"\0":
            kind = DIRECTORY if name.endswith(b"/") else REGULAR
        elif kind == b"7":
            kind = REGULAR
        elif kind == b"S":
            raise ImageBroken(
                f"{what}: {printable(name)} is stored as a sparse file", hint="build the image without tar's --sparse"
            )
        if kind != REGULAR:
            if kind not in (HARDLINK, SYMLINK, DIRECTORY, *SPECIAL):
                raise ImageBroken(f"{what}: {printable(name)} is of the unknown tar type {kind!r}")
            # Such headers carry no content whatever their size says (Go archive/tar, isHeaderOnlyType).
            size = 0
        yield Entry(
            name=name,
            type=kind,
            mode=mode & 0o7777,
            size=size,
            mtime=mtime,
            link=link,
            offset=stream.position,
            kept_xattrs=kept_xattrs,
            other_xattrs=other_xattrs,
        )
        if size and not stream.skip(size + -size % BLOCK):
            raise _cut_off(what)


def printable(name: bytes) -> str:
    """A name for a message."""
    text = name.decode("utf-8", "backslashreplace")
    text = "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in text)
    return text if len(text) <= 200 else text[:200] + "…"


def _require_checksum(header: bytes, what: str, begin: int) -> None:
    said = _number(header[148:156], what, begin)
    actual = sum(header) - sum(header[148:156]) + 8 * 32
    if said == actual:
        return
    # Historic tars added signed bytes.
    if said != actual - 256 * sum(byte > 127 for byte in header[:148] + header[156:]):
        raise ImageBroken(f"{what} is not a tar stream: there is no valid header at byte {begin}")


def _text(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def _number(field: bytes, what: str, begin: int) -> int:
    if field[0] & 0x80:
        # Two's complement without the highest bit, which only marks the format.
        value = int.from_bytes(field, "big") & ((1 << (len(field) * 8 - 1)) - 1)
        return value - (1 << (len(field) * 8 - 1)) if field[0] & 0x40 else value
    digits = field.strip(b" \0").split(b"\0", 1)[0]
    if not digits:
        return 0
    try:
        if digits.isdigit():
            return int(digits, 8)
    except ValueError:
        pass
    raise ImageBroken(f"{what} is not a tar stream: there is no valid number in the header at byte {begin}")


def _decimal(text: bytes | None, otherwise: int, what: str, begin: int) -> int:
    """A number of a pax record, its fraction cut off."""
    if text is None:
        return otherwise
    whole, _, fraction = text.partition(b".")
    if not whole.removeprefix(b"-").isdigit() or (fraction and not fraction.isdigit()) or len(whole) > 20:
        raise ImageBroken(f"{what} has an invalid number in the pax header before byte {begin}")
    return int(whole)


def _special(stream: Cursor, size: int, what: str, begin: int) -> bytes:
    if size > _SPECIAL_MAX:
        raise ImageBroken(
            f"{what} has a name or pax header of {size} bytes at byte {begin}, {_SPECIAL_MAX} are possible"
        )
    content = stream.take(size + -size % BLOCK)
    if len(content) < size:
        raise _cut_off(what)
    return content[:size]


def _pax_records(content: bytes, what: str, begin: int) -> dict[bytes, bytes]:
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(content):
        space = content.find(b" ", at, at + 12)
        digits = content[at:space]
        end = at + int(digits) if space > 0 and digits.isdigit() else 0
        equals = content.find(b"=", space + 1, end)
        if not space < equals < end <= len(content) or content[end - 1 : end] != b"\n":
            raise ImageBroken(f"{what} has an invalid pax header at byte {begin}")
        key, value = content[space + 1 : equals], content[equals + 1 : end - 1]
        if value:
            records[key] = value
        else:
            records.pop(key, None)
        at = end
    return records


def _xattrs(pax: dict[bytes, bytes]) -> tuple[dict[bytes, bytes] | None, int]:
    kept: dict[bytes, bytes] = {}
    others = 0
    for key, value in pax.items():
        name = key.removeprefix(XATTR_PREFIX)
        if name == key:
            others += key.startswith(_OTHER_XATTRS)
        elif name.startswith(b"user.") and 5 < len(name) <= 255 and len(value) <= 65536 and b"\0" not in name:
            kept[name] = value
        else:
            others += 1
    return kept or None, others


def _cut_off(what: str) -> ImageBroken:
    return ImageBroken(f"{what} is cut off", hint="fetch it again; the image may be damaged where it came from")
