"""The converter's own side of the socket: it answers or says why not, whatever it is sent. It is spoken to where it
belongs, behind the confinement: it takes rights from its own process that no test has to spare."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Iterator

import msgspec
import pytest

from hpcctr.image import confinement, exchange
from hpcctr.image.exchange import Job, Layer, parse_facts
from hpcctr.image.treestream import MergeFacts
from tests.support.oci import compress, digest_of, file, tar

CONTENT = tar(file("a", b"1" * 5000))


@pytest.fixture
def peer() -> Iterator[socket.socket]:
    ours, process = confinement.start()
    with ours:
        yield ours
    process.wait(20)


def descriptor_of(content: bytes) -> int:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        return os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY)


def output() -> int:
    with tempfile.TemporaryFile() as file:
        os.fchmod(file.fileno(), 0o666)
        return os.dup(file.fileno())


def give(peer: socket.socket, kind: bytes, content: msgspec.Struct | bytes, descriptor: int) -> None:
    exchange.send(peer, kind, content, descriptor)
    os.close(descriptor)


def job(peer: socket.socket, *blobs: bytes, file_size_max: int = 1 << 30) -> None:
    size = sum(len(blob) for blob in blobs)
    give(peer, b"J", Job(layers=len(blobs), file_size_max=file_size_max, blobs_size=size), output())
    for blob in blobs:
        layer = Layer(offset=0, size=len(blob), digest=digest_of(blob), diff_id=digest_of(CONTENT))
        give(peer, b"L", layer, descriptor_of(blob))


def answer(peer: socket.socket) -> tuple[bytes, bytes]:
    """The last frame's kind, and the content of all of that kind."""
    content = b""
    while frame := peer.recv(exchange.FRAME_MAX):
        if frame[:1] == b"R" and frame != b"R":
            content += frame[1:]
        elif frame[:1] != b"P":
            return frame[:1], content or frame[1:]
    return b"", b""


@pytest.mark.parametrize("how", ["gzip", "zstd", "none"])
def test_a_layer_of_any_compression_is_converted(peer: socket.socket, how: str) -> None:
    job(peer, compress(CONTENT, how))  # type: ignore[arg-type]
    kind, content = answer(peer)
    assert kind == b"R", content
    facts = parse_facts(content)
    assert isinstance(facts, MergeFacts)
    assert (facts.entries, facts.content_size) == (2, 5000)
    assert answer(peer) == (b"", b"")


def test_an_image_without_layers_is_an_empty_directory(peer: socket.socket) -> None:
    job(peer)
    assert parse_facts(answer(peer)[1]).entries == 1


def test_what_is_wrong_with_a_layer_is_said(peer: socket.socket) -> None:
    job(peer, compress(tar(file("b")), "gzip"))
    kind, content = answer(peer)
    assert kind == b"E"
    words = json.loads(content)
    assert words["slug"] == "image-broken"
    assert "layer 1, uncompressed, has the digest" in words["message"]


@pytest.mark.parametrize("frame", [b"J", b"Jx", b"J{}", b"X", b"L{}"])
def test_what_is_no_job_is_said(peer: socket.socket, frame: bytes) -> None:
    give(peer, frame[:1], frame[1:], output())
    assert answer(peer)[0] == b"E"


def test_an_output_that_cannot_be_opened_is_said(peer: socket.socket) -> None:
    give(peer, b"J", Job(layers=0, file_size_max=1, blobs_size=0), descriptor_of(b""))
    kind, content = answer(peer)
    assert kind == b"E"
    assert json.loads(content)["slug"] == "conversion"


def test_the_size_of_the_file_is_limited(peer: socket.socket) -> None:
    blob = tar(file("a", os.urandom(3 << 20)))
    give(peer, b"J", Job(layers=1, file_size_max=1 << 20, blobs_size=1), output())
    layer = Layer(offset=0, size=len(blob), digest=digest_of(blob), diff_id=digest_of(blob))
    give(peer, b"L", layer, descriptor_of(blob))
    kind, content = answer(peer)
    assert kind == b"E"
    assert json.loads(content)["message"] == "the image file would be larger than 1048576 bytes"
