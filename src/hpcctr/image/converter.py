"""The converter: the process that parses images, on the far side of :mod:`hpcctr.image.confinement`.

Layers come as descriptors, are decompressed, verified, merged and written out again as one image file; what was noted
goes back over the socket (:mod:`hpcctr.image.exchange`). It knows no path, no name, no credential. The layer below
begins while the next ones are still being downloaded; the second pass over the layers, the compression and the writing
of the file run beside one another."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import gzip
import io
import os
import resource
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

import zstandard

from hpcctr.errors import ConversionFailed, HpcctrError
from hpcctr.image import exchange, seccomp
from hpcctr.image.compression import CHUNK, decompressed, prefetched
from hpcctr.image.convert import Writer, find_tool
from hpcctr.image.exchange import Failure, Job, Layer
from hpcctr.image.layers import LayerMerge
from hpcctr.image.progress import Progress, ProgressReport
from hpcctr.image.treestream import MergeFacts, write_tree
from hpcctr.image.verification import Verification, VerifiedReader

_PR_SET_DUMPABLE = 4


def main() -> NoReturn:
    """The program that is confined: ``sys.argv[1]`` is the descriptor of its socket."""
    # One tree is built, and dropped by the end of the process: looking for garbage in it takes a fifth of the time.
    gc.disable()
    serve(socket.socket(fileno=int(sys.argv[1])))
    # Neither threads nor the writer are waited for: the pid namespace ends with this process.
    os._exit(0)


def serve(peer: socket.socket) -> None:
    """Make one image file, and answer."""
    # Others of this uid may not trace it or read its memory (ptrace(2), Ptrace access mode checking).
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, ctypes.c_ulong(0), 0, 0, 0)
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            facts = _convert(peer)
        except (EOFError, BrokenPipeError):
            raise
        except BaseException as error:  # noqa: BLE001 - the puller is told of everything
            exchange.send(peer, b"E", _failure(error))
        else:
            exchange.send_facts(peer, facts)


def _failure(error: BaseException) -> Failure:
    if isinstance(error, HpcctrError):
        return Failure(slug=error.slug, message=error.message, hint=error.hint)
    if isinstance(error, MemoryError):
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        return Failure(slug=ConversionFailed.slug, message=f"the converter needs more than {limit} bytes of memory")
    text = f"the converter failed: {type(error).__name__}: {error}"
    return Failure(slug=ConversionFailed.slug, message=text, errno=getattr(error, "errno", 0) or 0)


def _convert(peer: socket.socket) -> MergeFacts:
    job, output = exchange.receive_with_descriptor(peer, b"J", Job)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    limit = job.file_size_max if hard == resource.RLIM_INFINITY else min(job.file_size_max, hard)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    writer = Writer(find_tool(), output)
    _load_everything()
    seccomp.deny_all_but_descriptors()
    report = ProgressReport(lambda progress: _tell(peer, progress))
    layers = _Layers(peer, job)
    merge = LayerMerge()
    read = report.counter("read", job.blobs_size)
    for number in range(job.layers):
        merge.apply(layers.first_pass(number, read), f"layer {number + 1}")
    facts = write_tree(merge.tree, job.layers, layers.second_pass, writer.write, report.absolute("write"))
    writer.finish()
    report.finish("write")
    return facts


def _load_everything() -> None:
    """Afterwards no file can be opened: what is loaded on first use is used here."""
    compressed = (gzip.compress(b""), zstandard.ZstdCompressor().compress(b""))
    for blob in compressed:
        for _ in decompressed(io.BytesIO(blob), ""):
            pass
    for digest in ("sha256", "sha512"):
        Verification(f"{digest}:", 0, "").add(b"")
    threading.Thread(target=lambda: None).start()


def _tell(peer: socket.socket, progress: Progress) -> None:
    # What a layer has more than its manifest promises is found by its verification.
    done = min(progress.done, progress.total)
    exchange.send(peer, b"P", exchange.Advance(stage=progress.stage, done=done, total=progress.total))


class _Layers:
    """The layers, each from its blob; twice."""

    def __init__(self, peer: socket.socket, job: Job) -> None:
        self._peer = peer
        self._is_counted = job.blobs_size > 0
        self._all: list[tuple[Layer, int]] = []

    def first_pass(self, number: int, count: Callable[[int], None]) -> Iterator[bytes]:
        """Uncompressed, and verified as such; waits for a layer that has not come yet.

        The blob's digest is verified by the puller at the same time."""
        self._all.append(exchange.receive_with_descriptor(self._peer, b"L", Layer))
        layer, descriptor = self._all[number]
        what = f"layer {number + 1}"
        blob = _Blob(descriptor, layer, count if self._is_counted else lambda _: None)
        chunks = prefetched(_to_the_end(blob, decompressed(blob, what)))
        return _checked(chunks, Verification(layer.diff_id, -1, f"{what}, uncompressed,"))

    def second_pass(self, number: int) -> Iterator[bytes]:
        """Uncompressed once more; the cheaper of the two digests tells whether it is what it was."""
        layer, descriptor = self._all[number]
        what = f"layer {number + 1}"
        blob = VerifiedReader(_Blob(descriptor, layer, lambda _: None), Verification(layer.digest, layer.size, what))
        chunks = prefetched(_to_the_end(blob, decompressed(blob, what)))
        return chunks if layer.digest else _checked(chunks, Verification(layer.diff_id, -1, what))


class _Blob:
    """A blob's bytes, wherever in its file they lie. The descriptor has no position: the puller reads it as well."""

    def __init__(self, descriptor: int, layer: Layer, count: Callable[[int], None]) -> None:
        self._descriptor = descriptor
        self._at = layer.offset
        self._end = layer.offset + layer.size
        self._count = count

    def read(self, size: int) -> bytes:
        """Fewer bytes only at the end."""
        piece = os.pread(self._descriptor, min(size, self._end - self._at), self._at)
        self._at += len(piece)
        self._count(len(piece))
        return piece


def _to_the_end(blob: _Blob | VerifiedReader, chunks: Iterator[bytes]) -> Iterator[bytes]:
    yield from chunks
    # A decompressor may stop at the end of its data; digest and size are of the whole blob.
    while blob.read(CHUNK):
        pass


def _checked(chunks: Iterator[bytes], check: Verification) -> Iterator[bytes]:
    for chunk in chunks:
        check.add(chunk)
        yield chunk
    check.require_agreement()
