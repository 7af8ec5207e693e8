"""The conversion of an image, seen by the puller: layers are handed to a confined converter as they become complete,
and what it made of them is believed only as far as it can be checked.

The puller reads no byte of a layer but to hash it. A blob whose digest is wrong is named as that whatever the
converter said, and nothing is kept of it. Neither the end of the converter nor nonsense, silence, a flood or a huge
file from it does more than end the conversion."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from types import TracebackType

from hpcctr.errors import ConversionFailed, HpcctrError
from hpcctr.image import confinement, exchange
from hpcctr.image.archive import Slice
from hpcctr.image.compression import CHUNK, Blob
from hpcctr.image.convert import TOO_LARGE_HINT, ImageFile
from hpcctr.image.exchange import Job, Layer
from hpcctr.image.output import Output
from hpcctr.image.progress import ProgressReport
from hpcctr.image.source import LayerBlob, SourceImage
from hpcctr.image.treestream import MergeFacts
from hpcctr.image.verification import Verification

#: A layer's blob, once it is wholly there; may block until then.
OpenBlob = Callable[[LayerBlob], Blob]

#: Bytes an image file may have unless its owner's quota is less: what layers may have uncompressed.
FILE_SIZE_MAX = 1 << 40
#: Seconds without any progress after which a converter is given up. A stalled file server comes back, or it does not.
SILENCE_MAX = 300.0
#: Seconds a conversion may take once its last layer is there: a thousand bytes a millisecond of the largest image.
DURATION_MAX = 12 * 3600.0
#: An honest converter says ten things a second, and the pieces of its answer.
_FRAMES_MAX = 1 << 20
#: Seconds between two looks at the clock and at the file's size.
_TICK = 0.5
#: Seconds until the converter is gone after it was told that it may go.
_END_MAX = 30.0


def convert(
    image: SourceImage,
    open_blob: OpenBlob,
    directory: str,
    report: ProgressReport,
    *,
    worker: socket.socket | None = None,
    file_size_max: int = FILE_SIZE_MAX,
) -> tuple[ImageFile, MergeFacts]:
    """Write ``directory``/root.squashfs; ``directory`` is one that only this uid can enter.

    ``worker`` is the socket of a converter that somebody else has started (:func:`hpcctr.image.confinement.spawn`); it
    is used up. Without one a converter is started here. Nothing is left in the directory unless this returns.
    Raises :class:`ImageBroken`, :class:`ConversionFailed`, :class:`StoreUnusable`, and what ``open_blob`` raises.
    """
    with Converter.of(worker) if worker else Converter.start() as converter, Output(directory) as output:
        facts = converter.run(image, open_blob, output, report, file_size_max=file_size_max)
        converter.end()
        return output.keep(facts.inodes), facts


class Converter:
    """The puller's end of a converter's socket. Good for one image."""

    def __init__(self, peer: socket.socket, supervisor: subprocess.Popen[bytes] | None) -> None:
        self._peer = peer
        self._supervisor = supervisor

    @classmethod
    def of(cls, peer: socket.socket) -> Converter:
        """One that somebody else has started."""
        return cls(peer, None)

    @classmethod
    def start(cls) -> Converter:
        """One of this process's own. Raises :class:`ConversionFailed`."""
        try:
            return cls(*confinement.start())
        except OSError as error:
            raise ConversionFailed(f"the converter cannot be started: {error.strerror}") from None

    def __enter__(self) -> Converter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Shut down, and not only closed: a thread that feeds it may hold another descriptor.
        with contextlib.suppress(OSError):
            self._peer.shutdown(socket.SHUT_RDWR)
        self._peer.close()
        if self._supervisor is None:
            return
        try:
            self._supervisor.wait(_END_MAX)
        except subprocess.TimeoutExpired:
            # Something of it waits in the kernel, as for a file server.
            threading.Thread(target=self._supervisor.wait, name="converter", daemon=True).start()

    def run(
        self,
        image: SourceImage,
        open_blob: OpenBlob,
        output: Output,
        report: ProgressReport,
        *,
        file_size_max: int = FILE_SIZE_MAX,
        silence_max: float = SILENCE_MAX,
        duration_max: float = DURATION_MAX,
    ) -> MergeFacts:
        """Have ``output`` written. Raises as :func:`convert`."""
        output.lend()
        sizes = [max(layer.size, 0) for layer in image.layers]
        job = Job(layers=len(image.layers), file_size_max=file_size_max, blobs_size=sum(sizes))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            # Nobody there: why, is said when the answer is read.
            exchange.send(self._peer, b"J", job, output.descriptor)
        feed = _Feed(self._peer, image, open_blob)
        try:
            facts = self._answer(feed, output, report, file_size_max, silence_max, duration_max)
            feed.require_all_given()
        except HpcctrError:
            feed.require_verified()
            raise
        finally:
            feed.stop()
        return facts

    def end(self) -> None:
        """See it gone. Its end of the socket is held by its supervisor until none of its processes is left."""
        with contextlib.suppress(OSError):
            self._peer.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + _END_MAX
        while _is_readable(self._peer, deadline - time.monotonic()):
            if not _receive(self._peer):
                return
        raise ConversionFailed("the converter does not end", hint="look for processes that wait for a file server")

    def _answer(
        self,
        feed: _Feed,
        output: Output,
        report: ProgressReport,
        file_size_max: int,
        silence_max: float,
        duration_max: float,
    ) -> MergeFacts:
        untrusted_answer = bytearray()
        frames = 0
        last_heard = time.monotonic()
        while True:
            now = time.monotonic()
            last_heard = now if feed.is_waiting else max(last_heard, feed.last_sent)
            if output.size > file_size_max:
                raise ConversionFailed(
                    f"the image file would be larger than {file_size_max} bytes", hint=TOO_LARGE_HINT
                )
            if now - last_heard > silence_max:
                raise ConversionFailed(f"the converter made no progress for {silence_max:.0f} seconds")
            if not feed.is_waiting and now - feed.last_sent > duration_max:
                raise ConversionFailed(f"the converter did not finish within {duration_max:.0f} seconds")
            if not _is_readable(self._peer, _TICK):
                continue
            untrusted_frame = _receive(self._peer)
            frames += 1
            last_heard = time.monotonic()
            kind, content = untrusted_frame[:1], untrusted_frame[1:]
            if not kind:
                feed.require_fed()
                raise ConversionFailed("the converter ended without an answer")
            if kind == b"E":
                raise exchange.parse_failure(content, os.path.dirname(output.path))
            if frames > _FRAMES_MAX or len(untrusted_answer) + len(content) > exchange.ANSWER_MAX:
                raise exchange.nonsense()
            if kind == b"P" and not untrusted_answer:
                advance = exchange.parse_advance(content)
                report.absolute(advance.stage)(advance.done, advance.total)
            elif kind == b"R" and content:
                untrusted_answer += content
            elif kind == b"R":
                return exchange.parse_facts(bytes(untrusted_answer))
            else:
                raise exchange.nonsense()


class _Feed:
    """A thread that gives the converter one layer after the other, and hashes each blob itself."""

    def __init__(self, peer: socket.socket, image: SourceImage, open_blob: OpenBlob) -> None:
        self._peer = peer.dup()
        self._image = image
        self._open_blob = open_blob
        self._error: BaseException | None = None
        self._is_stopped = self._has_given_all = False
        self._idle = threading.Event()
        #: Whether it waits for a layer to become complete, and when the last one was sent.
        self.is_waiting = True
        self.last_sent = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No further layer."""
        self._is_stopped = True

    def require_fed(self) -> None:
        """Raise what kept a layer from being given."""
        if self._error is not None:
            raise self._error

    def require_verified(self) -> None:
        """Raise unless all blobs that were given are what was promised; waits until that is known."""
        self._idle.wait()
        self.require_fed()

    def require_all_given(self) -> None:
        """Raise unless all blobs were given and are what was promised."""
        self.require_verified()
        if not self._has_given_all:
            raise exchange.nonsense()

    def _run(self) -> None:
        try:
            for number, layer in enumerate(self._image.layers):
                self._idle.set()
                self.is_waiting = True
                with contextlib.closing(self._open_blob(layer)) as blob:
                    self._idle.clear()
                    self.is_waiting = False
                    if self._is_stopped:
                        return
                    self._give(layer, blob, f"layer {number + 1}")
            self._has_given_all = True
        except BaseException as error:  # noqa: BLE001 - raised where the answer is waited for
            self._error = error
            with contextlib.suppress(OSError):
                self._peer.shutdown(socket.SHUT_RDWR)
        finally:
            self._peer.close()
            self.is_waiting = False
            self._idle.set()

    def _give(self, layer: LayerBlob, blob: Blob, what: str) -> None:
        descriptor, offset, size = place_of(blob)
        check = Verification(layer.digest, layer.size, what)
        check.require_size(size)
        self.last_sent = time.monotonic()
        frame = Layer(offset=offset, size=size, digest=layer.digest, diff_id=layer.diff_id)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            # Nobody there: why, is said where the answer is read.
            exchange.send(self._peer, b"L", frame, descriptor)
        if layer.digest:
            at, end = offset, offset + size
            while not self._is_stopped and (piece := os.pread(descriptor, min(CHUNK, end - at), at)):
                check.add(piece)
                at += len(piece)
            check.require_agreement()


def place_of(blob: Blob) -> tuple[int, int, int]:
    """Where a blob lies: descriptor of its file, offset and bytes. The converter may not write to that file."""
    raw = blob.raw if isinstance(blob, io.BufferedReader) else blob
    if not isinstance(raw, io.FileIO | Slice):
        raise TypeError(f"a layer in {type(raw).__name__} lies in no file")
    descriptor = raw.fileno()
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
        raise ValueError("a layer's file is open for writing")
    return (
        (descriptor, raw.offset, raw.size) if isinstance(raw, Slice) else (descriptor, 0, os.fstat(descriptor).st_size)
    )


def _is_readable(peer: socket.socket, seconds: float) -> bool:
    waiting = select.poll()
    waiting.register(peer, select.POLLIN)
    return bool(waiting.poll(max(seconds, 0) * 1000))


def _receive(peer: socket.socket) -> bytes:
    """A frame; nothing at the end. No room is given for descriptors: the kernel drops them (unix(7))."""
    for _ in range(2):
        # An end that is closed while a layer waits in it unread is reported once, before what it had said.
        with contextlib.suppress(ConnectionResetError):
            return peer.recv(exchange.FRAME_MAX)
    return b""
