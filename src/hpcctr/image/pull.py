"""Pulling: from a reference to an image in the store.

Find the image in its source, verify and merge its layers, write the image file, publish, name. Downloads run beside
the merging, at most four at once. Nothing is published unless every digest agreed; what is unfinished is removed,
also when the pull is interrupted or terminated."""

from __future__ import annotations

import contextlib
import io
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from hpcctr.errors import ConversionFailed, UsageWrong
from hpcctr.image.archive import find_image, open_files
from hpcctr.image.compression import CHUNK, Blob, decompressed, prefetched
from hpcctr.image.convert import ImageFile, find_tool, inode_count, write_squashfs
from hpcctr.image.layers import LayerMerge
from hpcctr.image.platform import of_this_node
from hpcctr.image.progress import Progress as Progress
from hpcctr.image.progress import ProgressReport
from hpcctr.image.publish import now, publish, set_name, workspace
from hpcctr.image.record import ImageRecord, Platform, StoredImage
from hpcctr.image.reference import ImageRef
from hpcctr.image.source import LayerBlob, SourceImage
from hpcctr.image.store import IMAGE_FILE, SCHEMA, Store, source_text
from hpcctr.image.treestream import MergeFacts, write_tree
from hpcctr.image.verification import Verification, VerifiedReader
from hpcctr.site import RegistrySettings, Site

if TYPE_CHECKING:
    from hpcctr.image.registry import RegistrySource

_DOWNLOADS = 4

OpenBlob = Callable[[LayerBlob], Blob]


@dataclass(frozen=True, kw_only=True)
class PullResult:
    """What a pull came to. ``name`` is what ``hpcctr run`` takes; ``was_stored`` when the store had the image
    already."""

    image: StoredImage
    name: str
    was_stored: bool


def pull(
    ref: ImageRef,
    *,
    site: Site,
    platform: Platform | None = None,
    name: str | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> PullResult:
    """Bring an image into the site's store, under its own name or under ``name``.

    Raises :class:`RegistryFailed`, :class:`NotAnImage`, :class:`PlatformMissing`, :class:`ImageBroken`,
    :class:`ConversionFailed`, :class:`StoreUnusable`, :class:`ReferenceWrong`, :class:`UsageWrong`.
    """
    ref = ref.absolute()
    named = _name(ref, name)
    wanted = platform or of_this_node()
    store = Store.open(site.store, writable=True)
    report = ProgressReport(progress)
    with (
        _ended_orderly(),
        workspace(store) as directory,
        _opened(ref, site, directory, report) as source,
    ):
        image = source.find(wanted)
        was_stored = store.is_whole(image.digest)
        if not was_stored:
            find_tool()
            with source.layers(image) as open_blob:
                file, facts = _convert(image, open_blob, directory, report)
            publish(store, _record(ref, image, file, facts), file.path)
        set_name(store, named, image.platform, image.digest, source_text(ref))
    return PullResult(image=store.image(image.digest, name=str(named)), name=str(named), was_stored=was_stored)


def _name(ref: ImageRef, name: str | None) -> ImageRef:
    if name is None:
        return ref.name_in_store()
    named = ImageRef.parse(name)
    if named.is_file or named.digest:
        raise UsageWrong(
            f"--name {name}: an image is named by repository and tag", hint="for instance --name local/app:1.0"
        )
    return named


# sources


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A registry or a file: how to find an image in it, and how to get at its layers."""

    find: Callable[[Platform], SourceImage]
    layers: Callable[[SourceImage], contextlib.AbstractContextManager[OpenBlob]]


@contextlib.contextmanager
def _opened(ref: ImageRef, site: Site, directory: str, report: ProgressReport) -> Iterator[_Source]:
    if ref.is_file:
        files = open_files(ref, directory)
        yield _Source(
            find=lambda wanted: find_image(files, ref, wanted),
            layers=lambda _: contextlib.nullcontext(files.open_layer),
        )
        return
    # requests and oras cost half a second: files do without.
    from hpcctr.image.registry import RegistrySource as Source

    with Source(ref, site.registry.get(ref.registry, RegistrySettings())) as registry:
        yield _Source(find=registry.find, layers=lambda image: _downloaded(registry, image, directory, report))


@contextlib.contextmanager
def _downloaded(
    registry: RegistrySource, image: SourceImage, directory: str, report: ProgressReport
) -> Iterator[OpenBlob]:
    """Downloads all layers beside what the caller does; a layer opens once it is there and verified."""
    stop = threading.Event()
    count = report.counter("download", sum({layer.digest: layer.size for layer in image.layers}.values()))

    def download(layer: LayerBlob, path: str) -> str:
        registry.download(layer, path, stop=stop, progress=count)
        return path

    with ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="download") as pool:
        paths: dict[str, Future[str]] = {}
        for number, layer in enumerate(image.layers):
            if layer.digest not in paths:
                paths[layer.digest] = pool.submit(download, layer, f"{directory}/layer-{number}")
        try:
            yield lambda layer: io.FileIO(paths[layer.digest].result())
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


# conversion


def _convert(
    image: SourceImage, open_blob: OpenBlob, directory: str, report: ProgressReport
) -> tuple[ImageFile, MergeFacts]:
    merge = LayerMerge()
    read = report.counter("read", sum(max(layer.size, 0) for layer in image.layers))
    for number, layer in enumerate(image.layers):
        what = f"layer {number + 1}"
        chunks = prefetched(_verified(layer, open_blob, what, read))
        merge.apply(_checked(chunks, Verification(layer.diff_id, -1, f"{what}, uncompressed,")), what)

    def again(number: int) -> Iterator[bytes]:
        layer, what = image.layers[number], f"layer {number + 1}"
        chunks = prefetched(_verified(layer, open_blob, what, lambda _: None))
        return chunks if layer.digest else _checked(chunks, Verification(layer.diff_id, -1, what))

    def produce(write: Callable[[bytes], object]) -> MergeFacts:
        return write_tree(merge.tree, len(image.layers), again, write, report.absolute("write"))

    file, facts = write_squashfs(directory, produce)
    written = inode_count(file.path)
    if written != facts.inodes:
        raise ConversionFailed(
            f"the image file has {written} inodes, the image {facts.inodes}",
            hint="install another version of squashfs-tools-ng",
        )
    report.finish("write")
    return file, facts


def _verified(layer: LayerBlob, open_blob: OpenBlob, what: str, count: Callable[[int], None]) -> Iterator[bytes]:
    """A layer's uncompressed bytes; its blob is read to the end and agrees with the manifest, or this raises.

    ``count`` is told how many bytes of the blob were read, where the source says how many there are.
    """
    with contextlib.closing(open_blob(layer)) as blob:
        if not layer.digest:
            yield from decompressed(blob, what)
            return
        reader = VerifiedReader(blob, Verification(layer.digest, layer.size, what), count)
        yield from decompressed(reader, what)
        # A decompressor may stop at the end of its data; digest and size are of the whole blob.
        while reader.read(CHUNK):
            pass


def _checked(chunks: Iterator[bytes], check: Verification) -> Iterator[bytes]:
    for chunk in chunks:
        check.add(chunk)
        yield chunk
    check.require_agreement()


def _record(ref: ImageRef, image: SourceImage, file: ImageFile, facts: MergeFacts) -> ImageRecord:
    return ImageRecord(
        schema=SCHEMA,
        digest=image.digest,
        platform=image.platform,
        config=image.config,
        file=IMAGE_FILE,
        file_size=file.size,
        file_digest=file.digest,
        content_size=facts.content_size,
        entries=facts.entries,
        created=now(),
        source=source_text(ref),
        passwd=facts.passwd,
        group=facts.group,
        changed=facts.changed,
    )


# around


@contextlib.contextmanager
def _ended_orderly() -> Iterator[None]:
    """While this lasts SIGTERM and SIGHUP end the program as an exit does, so that what is unfinished is removed."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {
        number: signal.signal(number, handle)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is signal.SIG_DFL
    }
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
