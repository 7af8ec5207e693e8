"""Writing tar headers: the one dialect that image writers are given, GNU's, with extended attributes in pax headers.

Every header is built from checked values, so that a writer never parses a byte of a foreign one.
"""

from __future__ import annotations

from hpcctr.image.tarstream import BLOCK, XATTR_PREFIX

#: A squashfs has 32 bits for a time.
_TIME_MAX = 2**32 - 1


def header(
    path: bytes,
    kind: bytes,
    *,
    mode: int,
    size: int = 0,
    mtime: int = 0,
    link: bytes = b"",
    xattrs: dict[bytes, bytes] | None = None,
) -> bytes:
    """The blocks before an entry's content, in GNU format owned by 0:0; extended attributes in a pax header before
    them."""
    before = b""
    if xattrs:
        records = b"".join(_pax_record(XATTR_PREFIX + key, value) for key, value in sorted(xattrs.items()))
        before = _plain_header(b"pax", b"x", 0o644, len(records), 0, b"") + _padded(records)
    if len(link) > 100:
        before += _plain_header(b"././@LongLink", b"K", 0o644, len(link) + 1, 0, b"") + _padded(link + b"\0")
    if len(path) > 100:
        before += _plain_header(b"././@LongLink", b"L", 0o644, len(path) + 1, 0, b"") + _padded(path + b"\0")
    return before + _plain_header(path[:100], kind, mode, size, min(max(mtime, 0), _TIME_MAX), link[:100])


def padding(size: int) -> bytes:
    """What follows a content of that size."""
    return bytes(-size % BLOCK)


def _plain_header(path: bytes, kind: bytes, mode: int, size: int, mtime: int, link: bytes) -> bytes:
    octal_size = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    front = path.ljust(100, b"\0") + b"%07o\0" % mode + b"0000000\0" + b"0000000\0" + octal_size + b"%011o\0" % mtime
    back = kind + link.ljust(100, b"\0") + b"ustar  \0"
    # The field itself counts as eight spaces.
    checksum = sum(front) + sum(back) + 8 * 32
    return (front + b"%06o\0 " % checksum + back).ljust(BLOCK, b"\0")


def _padded(content: bytes) -> bytes:
    return content + padding(len(content))


def _pax_record(key: bytes, value: bytes) -> bytes:
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return b"%d" % length + body
