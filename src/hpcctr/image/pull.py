"""Pulling: from a reference to an image in the store.

Find the image in its source; if the store lacks it, one process of all that want it brings it, on whatever node
(:mod:`hpcctr.image.claims`): it downloads, verifies, converts and publishes, while the others wait and watch. Then the
name. Nothing is published unless every digest agreed; what is unfinished is removed, also when the pull is interrupted
or terminated. Runs as whoever owns the store, and needs no root."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Literal, Protocol

from hpcctr.errors import ConversionFailed, HpcctrError, PlatformMissing, UsageWrong
from hpcctr.image import blobs, claims, layout
from hpcctr.image.archive import find_image, open_files
from hpcctr.image.conversion import FILE_SIZE_MAX, OpenBlob, convert
from hpcctr.image.convert import ImageFile, find_tool
from hpcctr.image.gc import drop_unfinished
from hpcctr.image.platform import acceptable, of_this_node
from hpcctr.image.progress import Progress as Progress
from hpcctr.image.progress import ProgressReport
from hpcctr.image.publish import is_intact, is_kept, now, publish, remove_image, set_name, workspace
from hpcctr.image.record import ImageRecord, Platform, StoredImage
from hpcctr.image.reference import ImageRef
from hpcctr.image.source import SourceImage
from hpcctr.image.store import IMAGE_FILE, SCHEMA, Store, source_text
from hpcctr.image.treestream import MergeFacts
from hpcctr.site import Site


@dataclass(frozen=True, kw_only=True)
class PullResult:
    """What a pull came to. ``name`` is what ``hpcctr run`` takes; ``was_stored`` when the store had the image
    already, ``brought_here`` when this process brought it and no other."""

    image: StoredImage
    name: str
    was_stored: bool
    brought_here: bool


def pull(
    ref: ImageRef,
    *,
    site: Site,
    platform: Platform | None = None,
    name: str | None = None,
    source: str = "",
    verify: bool = False,
    room: Room | None = None,
    worker: socket.socket | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> PullResult:
    """Bring an image into the site's store, under its own name or under ``name``.

    However many processes do this at once, one brings the image. With ``verify`` a stored image is compared with its
    digest, and brought anew when it is damaged. ``source`` is what records say of where it came from, where ``ref``
    does not tell. ``room`` limits the image file. ``worker`` is the socket of a converter that somebody else has
    started (:func:`hpcctr.image.conversion.convert`); it is used up when this process brings the image, else left open.

    Raises :class:`RegistryFailed`, :class:`NotAnImage`, :class:`PlatformMissing`, :class:`ImageBroken`,
    :class:`ConversionFailed`, :class:`StoreUnusable`, :class:`ReferenceWrong`, :class:`UsageWrong`.
    """
    ref = ref.absolute()
    named = _name(ref, name)
    wanted = platform or of_this_node()
    store = Store.open(site.store, writable=True)
    origin = source or source_text(ref)
    with _ended_orderly(), _opened(ref, site, store, wanted) as opened:
        damaged = _damaged_file(store, opened.digest) if verify else None
        work = _Work(opened, store, named, origin, damaged, room, worker, progress)
        was_stored, brought_here = work.is_done(False) and is_kept(store, opened.digest), False
        if not was_stored:
            find_tool()
            brought_here = claims.once(
                claims.directory_of(store.path, opened.digest),
                is_done=work.is_done,
                work=work.bring,
                waiting=ProgressReport(progress).waiting,
                now=now,
            )
        image = store.image(opened.digest, name=str(named))
        if image.record.platform not in acceptable(wanted):
            raise PlatformMissing(
                f"{ref.familiar} is for {image.record.platform}, not for {wanted}",
                hint=f"hpcctr pull --platform {image.record.platform} {ref.familiar}",
            )
        set_name(store, named, image.record.platform, image.record.digest, origin)
    return PullResult(image=image, name=str(named), was_stored=was_stored, brought_here=brought_here)


#: Seconds between two looks at what a user's images take, while one is written.
_LOOK_SECONDS = 1.0


class Room(Protocol):
    """What the images of somebody may take, :class:`hpcctr.storekeeper.room.Room`."""

    def left(self, growing: Literal["images"]) -> int: ...

    def require(self, growing: Literal["images"]) -> None: ...


class _Work:
    """What one process does for all that want the image."""

    def __init__(
        self,
        source: _Source,
        store: Store,
        named: ImageRef,
        origin: str,
        damaged: tuple[int, int] | None,
        room: Room | None,
        converter: socket.socket | None,
        progress: Callable[[Progress], None],
    ) -> None:
        self._source = source
        self._named = named
        self._origin = origin
        self._store = store
        self._damaged = damaged
        self._room = room
        self._next_look = 0.0
        self._converters = [converter]
        self._progress = progress

    def is_done(self, afresh: bool) -> bool:
        """Whether the store has the image, and not the damaged file that is to be replaced."""
        if afresh:
            # NFS clients remember for a minute what was not there (nfs(5), lookupcache); reading the directory ends it.
            with contextlib.suppress(OSError):
                os.listdir(f"{self._store.path}/images")
        return self._store.is_whole(self._source.digest) and not self._is_damaged()

    def bring(self, claim: claims.Claim) -> None:
        """Download, convert, publish."""
        if not self._converters:
            raise ConversionFailed(
                "this process stood still while it converted, and its converter has ended", hint="pull again"
            )

        def tell(step: Progress) -> None:
            claim.tell(step.stage, step.done, step.total)
            self._look_at_room()
            self._progress(step)

        drop_unfinished(self._store)
        report = ProgressReport(tell)
        image = self._source.image()
        with workspace(self._store) as directory, self._source.layers(image, claim, report) as open_blob:
            converter = self._converters[0]
            if converter is not None:
                self._converters.clear()
            limit = FILE_SIZE_MAX
            if self._room is not None:
                self._room.require("images")
                limit = min(limit, self._room.left("images"))
            file, facts = convert(image, open_blob, directory, report, worker=converter, file_size_max=limit)
            claim.require_held()
            if self._room is not None:
                self._room.require("images")
            if self._is_damaged():
                remove_image(self._store, image.digest)
            publish(self._store, _record(self._origin, image, file, facts), file.path, facts.facts)
            # Here already, and not only by everybody afterwards: most of those who wait have the same name for it.
            set_name(self._store, self._named, image.platform, image.digest, self._origin)
        self._source.keep(image, str(self._named))
        blobs.drop(blobs.directory_of(self._store.path, image.digest))

    def _look_at_room(self) -> None:
        """Others of the same user's write as well."""
        now = time.monotonic()
        if self._room is not None and now >= self._next_look:
            self._next_look = now + _LOOK_SECONDS
            self._room.require("images")

    def _is_damaged(self) -> bool:
        return self._damaged is not None and _file(self._store, self._source.digest) == self._damaged


def _damaged_file(store: Store, digest: str) -> tuple[int, int] | None:
    """The stored image file when it is not, byte for byte, what was published."""
    file = _file(store, digest)
    return file if store.is_whole(digest) and not is_intact(store.image(digest)) else None


def _file(store: Store, digest: str) -> tuple[int, int] | None:
    """What tells an image file from another one in its place."""
    try:
        status = os.stat(f"{store.image_directory(digest)}/{IMAGE_FILE}")
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


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
    """A registry or a file in which the image was located: its digest, what it is, and how to get at its layers."""

    digest: str
    image: Callable[[], SourceImage]
    layers: Callable[[SourceImage, claims.Claim, ProgressReport], contextlib.AbstractContextManager[OpenBlob]]
    #: Keep what was downloaded, under a name, where the site wants that.
    keep: Callable[[SourceImage, str], None] = lambda *_: None


@contextlib.contextmanager
def _opened(ref: ImageRef, site: Site, store: Store, wanted: Platform) -> Iterator[_Source]:
    if ref.is_file:
        with workspace(store) as directory:
            files = open_files(ref, directory)
            image = find_image(files, ref, wanted)
            yield _Source(
                digest=image.digest,
                image=lambda: image,
                layers=lambda *_: contextlib.nullcontext(files.open_layer),
            )
        return
    # requests and oras cost half a second: files do without.
    from hpcctr.image.registry import RegistrySource

    with RegistrySource(ref, site.registry) as registry:
        found = registry.locate(wanted)

        def layers(
            image: SourceImage, claim: claims.Claim, report: ProgressReport
        ) -> contextlib.AbstractContextManager[OpenBlob]:
            count = report.counter("download", sum({layer.digest: layer.size for layer in image.layers}.values()))
            directory = blobs.directory_of(store.path, image.digest)
            return blobs.downloaded(registry, image.layers, directory, claim.worker.token, count, kept)

        def keep(image: SourceImage, name: str) -> None:
            # The image is published: what cannot be kept is downloaded once more when it is wanted again.
            with contextlib.suppress(OSError, HpcctrError):
                if site.keep_blobs:
                    directory = blobs.directory_of(store.path, image.digest)
                    layout.keep(kept, registry, image, directory, name=name, since=now())

        kept = layout.directory_of(store.path)
        yield _Source(digest=found.digest, image=lambda: registry.image(found, wanted), layers=layers, keep=keep)


def _record(origin: str, image: SourceImage, file: ImageFile, facts: MergeFacts) -> ImageRecord:
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
        source=origin,
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
