"""Blobs on their way: downloaded beside the conversion, kept until the image is published.

    STORE/blobs/<image digest>/<blob digest>                 finished, verified
    STORE/blobs/<image digest>/<blob digest>.<token>.part    growing, of the worker with that claim

Only who holds the claim on the image works here. One that takes over finds what its predecessor finished, and verifies
it once more."""

from __future__ import annotations

import contextlib
import io
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Protocol

from hpcctr.errors import ImageBroken
from hpcctr.image import layout
from hpcctr.image.compression import CHUNK
from hpcctr.image.conversion import OpenBlob
from hpcctr.image.imagefile import store_unusable
from hpcctr.image.source import LayerBlob
from hpcctr.image.verification import Verification

#: Downloads at once: as docker does. More gains nothing on one line, and registries limit.
_DOWNLOADS = 4
#: Seconds an ended download gets to notice.
_NOTICE = 2.0


class Downloader(Protocol):
    """What blobs come from: see :class:`hpcctr.image.registry.RegistrySource`."""

    def download(self, layer: LayerBlob, path: str, *, progress: Callable[[int], None]) -> None: ...

    def abort(self) -> None: ...


def directory_of(store_path: str, digest: str) -> str:
    """Where the blobs of an image are while it is brought."""
    return f"{store_path}/blobs/{digest.replace(':', '-')}"


def drop(directory: str) -> None:
    """The image is published: its blobs are needed no more."""
    shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def downloaded(
    source: Downloader,
    layers: tuple[LayerBlob, ...],
    directory: str,
    token: str,
    count: Callable[[int], None],
    kept: str = "",
) -> Iterator[OpenBlob]:
    """Download all layers beside what the caller does; a layer opens once it is there and verified. What the layout
    ``kept`` has of them is not downloaded.

    However it ends, no download goes on and no unfinished file stays. Opening raises what the download raised."""
    try:
        os.makedirs(directory, 0o700, exist_ok=True)
    except OSError as error:
        raise store_unusable(directory, error) from None
    jobs: queue.SimpleQueue[tuple[LayerBlob, Future[str]]] = queue.SimpleQueue()
    ready: dict[str, Future[str]] = {}
    for layer in layers:
        if layer.digest not in ready:
            ready[layer.digest] = Future()
            jobs.put((layer, ready[layer.digest]))
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                layer, future = jobs.get_nowait()
            except queue.Empty:
                return
            try:
                future.set_result(_bring(source, layer, directory, token, count, stop, kept))
            except BaseException as error:  # noqa: BLE001 - it is raised where the layer is opened
                future.set_exception(error)

    # Daemons: a thread that hangs in the network must not keep a process that was told to end.
    threads = [threading.Thread(target=work, name="download", daemon=True) for _ in range(min(_DOWNLOADS, len(ready)))]
    for thread in threads:
        thread.start()
    try:
        yield lambda layer: _opened(ready[layer.digest].result())
    finally:
        stop.set()
        if any(not future.done() for future in ready.values()):
            source.abort()
        for thread in threads:
            thread.join(_NOTICE)
        for digest in ready:
            with contextlib.suppress(OSError):
                os.unlink(_part(directory, digest, token))


def _bring(
    source: Downloader,
    layer: LayerBlob,
    directory: str,
    token: str,
    count: Callable[[int], None],
    stop: threading.Event,
    kept: str,
) -> str:
    path = f"{directory}/{layer.digest.replace(':', '-')}"
    if _is_finished(path, layer) or (kept and layout.lend(kept, layer.digest, path) and _is_finished(path, layer)):
        count(layer.size)
        return path
    part = _part(directory, layer.digest, token)
    source.download(layer, part, progress=count)
    if stop.is_set():
        raise ImageBroken(f"blob {layer.digest}: its download was ended")
    try:
        os.rename(part, path)
    except OSError as error:
        raise store_unusable(path, error) from None
    return path


def _is_finished(path: str, layer: LayerBlob) -> bool:
    """Whether a predecessor finished that blob, by its digest; a damaged one is removed."""
    check = Verification(layer.digest, layer.size, path)
    try:
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(CHUNK):
                check.add(chunk)
        check.require_agreement()
    except FileNotFoundError:
        return False
    except (OSError, ImageBroken):
        with contextlib.suppress(OSError):
            os.unlink(path)
        return False
    return True


def _opened(path: str) -> io.FileIO:
    try:
        return io.FileIO(path)
    except OSError as error:
        raise store_unusable(path, error) from None


def _part(directory: str, digest: str, token: str) -> str:
    return f"{directory}/{digest.replace(':', '-')}.{token}.part"
