"""What a storekeeper does, as the store's owner. Everything here is the user's word or a registry's, and hostile.

The socket to the user's command is a stream: lines of JSON (:data:`hpcctr.errand.Said`) one way; for ``import``, the
bytes of an archive the other way, to its end.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from types import FrameType

import msgspec

from hpcctr.errand import Ended, Failed, Listed, Pulled, Quota, Removed, Said
from hpcctr.errors import HpcctrError, ImageNotInStore, NotAnImage, StoreUnusable
from hpcctr.image import platform as platforms
from hpcctr.image.compression import is_compressed
from hpcctr.image.imagefile import store_unusable
from hpcctr.image.publish import remove, require_intact, workspace
from hpcctr.image.quota import bytes_of
from hpcctr.image.record import Platform
from hpcctr.image.reference import ImageRef
from hpcctr.image.sharing import drop_dangling
from hpcctr.image.shelves import private_path
from hpcctr.image.store import Store
from hpcctr.image.uses import last_used
from hpcctr.site import Site
from hpcctr.storekeeper import sharing
from hpcctr.storekeeper.job import Job
from hpcctr.storekeeper.room import ARCHIVE, LOOK_EVERY, Room

_CHUNK = 1 << 20
#: Seconds an archive may not come on: its sender reads a file server that hangs.
_SILENCE_MAX = 300.0


def work(job: Job, peer: socket.socket, converter: socket.socket | None) -> int:
    """Do the errand; the exit status. The last line on the socket, and the only one on the outcome, says how it
    ended.
    """
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_end_with, args=(peer,), daemon=True).start()
    last: Said = Ended()
    try:
        for said in _do(job, peer, converter):
            _say(peer, said)
            last = said
    except HpcctrError as error:
        last = Failed.of(error)
    except OSError as error:
        last = Failed.of(StoreUnusable(f"{error.filename or job.site.store}: {error.strerror or error}"))
    if not isinstance(last, Pulled | Failed):
        last = Ended()
    with contextlib.suppress(OSError):
        os.write(job.outcome, msgspec.json.encode(last) + b"\n")
    if not isinstance(last, Pulled):
        _say(peer, last)
    return 1 if isinstance(last, Failed) else 0


def _do(job: Job, peer: socket.socket, converter: socket.socket | None) -> Iterator[Said]:
    errand = job.errand
    if errand.task == "pull":
        yield _pull(job, job.site, ImageRef.parse(errand.image), peer, converter)
        return
    if errand.task in ("share", "unshare", "shares"):
        yield from sharing.change(job)
        return
    if errand.task == "shared":
        yield from sharing.listed(job)
        return
    if errand.task == "inspect":
        yield sharing.inspected(job)
        return
    site = _part_of(job)
    if errand.task == "import":
        if job.uid:
            _make(site)
        yield _import(job, site, peer, converter)
    elif errand.task == "verify":
        _verify(site, errand.image)
    elif errand.task == "images":
        if os.path.isdir(site.store):
            yield from _list(site)
            if job.uid:
                yield Quota(used=bytes_of(site.store), limit=job.site.limits.bytes_per_uid)
    else:
        if not os.path.isdir(site.store):
            raise ImageNotInStore(f"{errand.image} is none of your images", hint="hpcctr images")
        store = Store.open(site.store, writable=True)
        removed = remove(store, errand.image, _platform(errand.platform))
        drop_dangling(store)
        yield Removed(names=removed.names, digests=removed.digests, freed=removed.freed, used_on=removed.used_on)


def _part_of(job: Job) -> Site:
    """The site as the user has it: its store is theirs. Root's is the site's own."""
    if job.uid == 0:
        return job.site
    return msgspec.structs.replace(job.site, store=private_path(job.site.store, job.uid))


def _make(site: Site) -> None:
    """A user's part, closed to everybody else."""
    for directory, mode in ((os.path.dirname(site.store), 0o711), (site.store, 0o700)):
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(directory, mode)
                os.chmod(directory, mode)
            status = os.lstat(directory)
        except OSError as error:
            raise store_unusable(directory, error) from None
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise StoreUnusable(f"{directory} is not a directory of the store's owner", hint=f"remove {directory}")


def _pull(
    job: Job,
    site: Site,
    ref: ImageRef,
    peer: socket.socket,
    converter: socket.socket | None,
    origin: str = "",
    room: Room | None = None,
) -> Pulled:
    # The registry client behind this costs half a second of imports: only a pull pays for it.
    from hpcctr.image.pull import pull

    result = pull(
        ref,
        site=site,
        platform=_platform(job.errand.platform),
        name=job.errand.name or None,
        source=origin,
        room=room,
        verify=bool(job.errand.verify),
        progress=lambda progress: _say(peer, progress.said()),
        worker=converter,
    )
    record = result.image.record
    return Pulled(
        name=result.name,
        digest=record.digest,
        file_size=record.file_size,
        was_stored=not result.brought_here,
        platform=str(record.platform),
    )


def _import(job: Job, site: Site, peer: socket.socket, converter: socket.socket | None) -> Pulled:
    """The archive is copied first: bytes that a user can change while they are read prove nothing."""
    transport, _, layout_ref = job.errand.image.partition(":")
    if transport not in ("oci-archive", "docker-archive"):
        raise StoreUnusable(
            f"an archive of kind {transport!r} cannot be imported", hint="oci-archive or docker-archive"
        )
    store = Store.open(site.store, writable=True)
    with workspace(store) as directory:
        path = f"{directory}/{ARCHIVE}"
        room = Room(part=store.path, limit=job.site.limits.bytes_per_uid) if job.uid else None
        _receive(peer, path, room)
        with open(path, "rb") as file:
            if is_compressed(file.read(8)):
                # Whoever writes the store decompresses nothing outside of the converter.
                raise NotAnImage("the archive that came is compressed as a whole", hint="gunzip it, or unzstd")
        text = f"{transport}:{path}" + (f":{layout_ref}" if layout_ref else "")
        return _pull(job, site, ImageRef.parse(text), peer, converter, job.errand.source, room)


def _receive(peer: socket.socket, path: str, room: Room | None) -> None:
    peer.settimeout(_SILENCE_MAX)
    since_look = LOOK_EVERY
    try:
        with open(path, "xb", buffering=0) as file:
            while chunk := peer.recv(_CHUNK):
                view = memoryview(chunk)
                while view:
                    view = view[file.write(view) :]
                since_look += len(chunk)
                if room is not None and since_look >= LOOK_EVERY:
                    room.require("archives")
                    since_look = 0
        if room is not None:
            room.require("archives")
    except TimeoutError:
        raise StoreUnusable(f"the archive stopped coming for {_SILENCE_MAX:.0f} s") from None
    except OSError as error:
        raise store_unusable(path, error) from None
    finally:
        peer.settimeout(None)


def _verify(site: Site, text: str) -> None:
    """Raise :class:`ImageDamaged` unless one of the user's own images is, byte for byte, what was published."""
    if not os.path.isdir(site.store):
        raise ImageNotInStore(f"{text} is none of your images", hint="hpcctr images")
    require_intact(Store.open(site.store).find(text))


def _list(site: Site) -> Iterator[Said]:
    store = Store.open(site.store, writable=True)
    for stored in store.images():
        record = stored.image.record if stored.image is not None else None
        yield Listed(
            name=stored.name,
            platform=str(stored.platform),
            digest=stored.digest,
            since=stored.since,
            # Bounded: passwd and group of an image may be long.
            record=None if record is None else msgspec.structs.replace(record, passwd=b"", group=b""),
            last_used=last_used(store.image_directory(stored.digest)),
        )


def _platform(text: str) -> Platform | None:
    return platforms.parse(text) if text else None


_saying = threading.Lock()


def _say(peer: socket.socket, said: Said) -> None:
    with _saying:
        peer.sendall(msgspec.json.encode(said) + b"\n")


def _end_with(peer: socket.socket) -> None:
    """End in good order once the user's command is gone: nobody wants what it asked for any more."""
    poll = select.poll()
    poll.register(peer, 0)  # POLLHUP alone: the sender of an archive shuts down its half
    poll.poll()
    # To the main thread: one that waits in the kernel notices no signal that came to another.
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
