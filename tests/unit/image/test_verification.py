"""Digests and sizes are compared while bytes pass and when they end."""

from __future__ import annotations

import hashlib
import io

import pytest

from hpcctr.errors import ImageBroken
from hpcctr.image.verification import Verification, VerifiedReader, sha256_of

CONTENT = b"content" * 100
DIGEST = sha256_of(CONTENT)


def read_all(content: bytes, digest: str, size: int) -> bytes:
    reader = VerifiedReader(io.BytesIO(content), Verification(digest, size, "blob"))
    out = b""
    while chunk := reader.read(64):
        out += chunk
    return out


def test_what_agrees_passes() -> None:
    assert read_all(CONTENT, DIGEST, len(CONTENT)) == CONTENT
    assert read_all(CONTENT, f"sha512:{hashlib.sha512(CONTENT).hexdigest()}", len(CONTENT)) == CONTENT
    assert read_all(CONTENT, DIGEST, -1) == CONTENT
    assert read_all(CONTENT, "", -1) == CONTENT


def test_too_much_is_refused_before_it_is_all_read() -> None:
    reader = VerifiedReader(io.BytesIO(CONTENT), Verification(DIGEST, 10, "blob"))
    with pytest.raises(ImageBroken, match="larger than the 10 bytes"):
        reader.read(64)


def test_too_little_is_refused() -> None:
    with pytest.raises(ImageBroken, match="blob has 699 bytes"):
        read_all(CONTENT[:-1], DIGEST, len(CONTENT))


def test_another_content_is_refused() -> None:
    with pytest.raises(ImageBroken, match=f"promised is {DIGEST}"):
        read_all(b"C" + CONTENT[1:], DIGEST, len(CONTENT))
