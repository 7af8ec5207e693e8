"""Writing the store: new images and names, and taking them away.

Safe on NFS and Lustre: no lock, nothing rewritten in place. A file is written under another name, flushed with its
directory, and renamed; a reader sees the old or the new one. An image's directory is renamed as a whole, and whoever
comes second finds it there already: the same digest is the same image, so the first one stays."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime

import msgspec

from hpcctr.errors import ImageDamaged, ImageNotInStore, StoreUnusable
from hpcctr.image import verity
from hpcctr.image.imagefile import store_unusable
from hpcctr.image.record import (
    FactsRecord,
    FactsSummary,
    ImageFacts,
    ImageRecord,
    NameEntry,
    NameRecord,
    Platform,
    StoredImage,
)
from hpcctr.image.reference import ImageRef, is_digest_or_prefix
from hpcctr.image.stale import looked_up_again
from hpcctr.image.store import FACTS_FILE, IMAGE_FILE, RECORD_FILE, SCHEMA, Store
from hpcctr.image.uses import LEAVING, close_gate, has_gate, is_renewed, make_gate, marks

_READABLE = 0o755
#: Meanings of a name that are remembered.
_HISTORY_MAX = 100


def require_writable(path: str) -> None:
    """Make the store's directories that are missing. Raises :class:`StoreUnusable` when nothing can be written
    there."""
    for directory, mode in (
        (path, 0o755),
        (f"{path}/images", 0o755),
        (f"{path}/names", 0o755),
        (f"{path}/claims", 0o700),
        (f"{path}/blobs", 0o700),
        (os.path.join(path, "tmp"), 0o700),
    ):
        try:
            looked_up_again(lambda directory=directory, mode=mode: _make_directories("/", directory, mode))  # type: ignore[misc]
        except OSError as error:
            raise store_unusable(directory, error) from None
        if not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
            raise StoreUnusable(
                f"store {directory} is not writable for uid {os.geteuid()}", hint="pull as the store's administrator"
            )


@contextlib.contextmanager
def workspace(store: Store) -> Iterator[str]:
    """A directory below the store's tmp/ that only this uid can enter, gone afterwards whatever happens."""
    path = temporary_path(store, "pull")
    try:
        os.mkdir(path, 0o700)
    except OSError as error:
        raise store_unusable(path, error) from None
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def publish(store: Store, record: ImageRecord, image_file: str, facts: ImageFacts | None = None) -> StoredImage:
    """Put an image into the store. ``image_file`` (in a :func:`workspace`) is moved away; its sizes are in ``record``,
    which gets the summary of ``facts``.

    Returns what the store has then: the earlier image when the digest was there already, and whole.
    Raises :class:`StoreUnusable`.
    """
    target = store.image_directory(record.digest)
    made = f"{os.path.dirname(image_file)}/publish"
    try:
        os.mkdir(made, 0o700)
        os.rename(image_file, f"{made}/{IMAGE_FILE}")
        os.chmod(f"{made}/{IMAGE_FILE}", 0o644)
        flush(f"{made}/{IMAGE_FILE}")
        summary = None if facts is None else FactsSummary.of(facts)
        record = msgspec.structs.replace(record, verity=verity.enable(f"{made}/{IMAGE_FILE}"), facts=summary)
        if facts is not None:
            about = FactsRecord(schema=SCHEMA, digest=record.digest, facts=facts)
            write_flushed(f"{made}/{FACTS_FILE}", msgspec.json.encode(about))
        write_flushed(f"{made}/{RECORD_FILE}", msgspec.json.format(msgspec.json.encode(record), indent=1))
        make_gate(made)
        os.chmod(made, _READABLE)
        flush(made)
        if not store.is_whole(record.digest):
            # Something damaged is in its place, or something that is being removed, or nothing.
            remove_image(store, record.digest)
        try:
            os.rename(made, target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        flush(os.path.dirname(target))
    except OSError as error:
        raise store_unusable(error.filename or target, error) from None
    return store.image(record.digest)


def is_intact(image: StoredImage) -> bool:
    """Whether the file is, byte for byte, what was published. Reads all of it."""
    try:
        with open(image.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    except FileNotFoundError:
        return False
    except OSError as error:
        raise store_unusable(image.path, error) from None
    return (size, digest) == (image.record.file_size, image.record.file_digest)


def require_intact(image: StoredImage) -> None:
    """Raise :class:`ImageDamaged` unless the file is, byte for byte, what was published. Reads all of it."""
    if not is_intact(image):
        raise ImageDamaged(
            f"{image.path} is damaged: it is not what was published, its size or digest differs",
            hint=f"hpcctr pull --verify {image.record.source}",
        )


def is_kept(store: Store, digest: str) -> bool:
    """Whether an image that is there stays for as long as it takes to name it; False when it is just being removed.

    Raises :class:`StoreUnusable`.
    """
    directory = store.image_directory(digest)
    try:
        return is_renewed(directory)
    except OSError as error:
        raise store_unusable(directory, error) from None


def set_name(store: Store, named: ImageRef, platform: Platform, digest: str, source: str = "") -> None:
    """Let ``named`` mean ``digest`` from now on. A name that means it already, from the same source, keeps its
    record."""
    earlier = store.name_record(named, platform)
    if earlier is not None and (earlier.history[0].digest, earlier.history[0].source) == (digest, source):
        return
    entry = NameEntry(digest=digest, since=now(), source=source)
    history = (entry, *(earlier.history if earlier else ()))[:_HISTORY_MAX]
    path = store.name_file(named, platform)
    temporary = temporary_path(store, "name")
    record = NameRecord(schema=SCHEMA, name=str(named), history=history)
    try:
        looked_up_again(lambda: _make_directories(store.path, os.path.dirname(path)))
        write_flushed(temporary, msgspec.json.format(msgspec.json.encode(record), indent=1))
        try:
            os.rename(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        flush(os.path.dirname(path))
    except OSError as error:
        raise store_unusable(error.filename or path, error) from None


class Removed(msgspec.Struct, frozen=True, kw_only=True):
    """What :func:`remove` took away: names (with their platform in brackets) and digests."""

    names: tuple[str, ...]
    digests: tuple[str, ...]
    #: Bytes of the image files that were freed.
    freed: int
    #: Nodes that run a removed image: its file stays until a gc after their last program.
    used_on: tuple[str, ...] = ()


def remove(store: Store, text: str, platform: Platform | None = None) -> Removed:
    """Take a name away, on ``platform`` or on every one, and its image when no other name means it; or by digest, an
    image with all its names.

    A program that runs in the image keeps it, on whatever node.
    Raises :class:`ImageNotInStore`, :class:`StoreUnusable`.
    """
    names = list(store.names())
    if text.startswith("sha256:") and is_digest_or_prefix(text):
        digest = store.whole_digest(text)
        doomed = [line for line in names if line[2].history[0].digest == digest]
        digests = {digest}
        if digest not in store.digests() and not doomed:
            raise ImageNotInStore(f"{digest} is not in the store {store.path}", hint="hpcctr images")
    else:
        named = ImageRef.parse(text).name_in_store()
        doomed = [line for line in names if line[0] == str(named) and platform in (None, line[1])]
        if not doomed:
            raise ImageNotInStore(f"image {named.familiar} is not in the store {store.path}", hint="hpcctr images")
        kept = {record.history[0].digest for line in names if line not in doomed for record in (line[2],)}
        digests = {line[2].history[0].digest for line in doomed} - kept
    for name, its_platform, _ in doomed:
        _unlink_name(store, store.name_file(ImageRef.parse(name), its_platform))
    departed = {digest: gone for digest in sorted(digests) if (gone := remove_image(store, digest)) is not None}
    return Removed(
        names=tuple(f"{name} ({its_platform})" for name, its_platform, _ in doomed),
        digests=tuple(departed),
        freed=sum(gone.freed for gone in departed.values()),
        used_on=tuple(sorted({node for gone in departed.values() for node in gone.used_on})),
    )


def drop_names(store: Store, digest: str) -> None:
    """Take every name of an image away. Raises :class:`StoreUnusable`."""
    for name, platform, record in list(store.names()):
        if record.history[0].digest == digest:
            _unlink_name(store, store.name_file(ImageRef.parse(name), platform))


def now() -> str:
    """RFC 3339, UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _unlink_name(store: Store, path: str) -> None:
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        directory = os.path.dirname(path)
        while directory != f"{store.path}/names":
            os.rmdir(directory)
            directory = os.path.dirname(directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise store_unusable(path, error) from None


class Departed(msgspec.Struct, frozen=True, kw_only=True):
    """An image that was removed: bytes that were freed, and the nodes because of which its file stays for now."""

    freed: int
    used_on: tuple[str, ...] = ()


def remove_image(store: Store, digest: str) -> Departed | None:
    """Remove an image; None when there was none. One that a node uses is set aside for gc: no launch finds it any
    more, and who runs it keeps it. Raises :class:`StoreUnusable`.
    """
    directory = store.image_directory(digest)
    try:
        if close_gate(directory):
            freed = remove_closed_image(store, directory)
            return None if freed is None else Departed(freed=freed)
        nodes = tuple(sorted({mark.node for mark in marks(directory)}))
        _set_aside(store, directory, digest)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise store_unusable(directory, error) from None
    return Departed(freed=0, used_on=nodes)


def remove_closed_image(store: Store, directory: str) -> int | None:
    """The bytes freed by removing an image, or one that was set aside, whose gate the caller has closed; None when it
    was not there. It leaves by one rename, so nobody finds half of it. Raises :class:`StoreUnusable`.
    """
    going = temporary_path(store, "gone")
    try:
        os.rename(directory, going)
        flush(os.path.dirname(directory))
        if has_gate(going):
            # Another one of the digest, published since the gate was closed.
            _put_back(store, going, directory)
            return None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise store_unusable(directory, error) from None
    try:
        size = os.stat(f"{going}/{IMAGE_FILE}").st_size
    except OSError:
        size = 0
    shutil.rmtree(going, ignore_errors=True)
    return size


def _put_back(store: Store, going: str, directory: str) -> None:
    try:
        os.rename(going, directory)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        # And one more, which is as good; nodes may use this one already.
        _set_aside(store, going, os.path.basename(directory))


def _set_aside(store: Store, directory: str, name: str) -> None:
    aside = f"{store.path}/{LEAVING}"
    with contextlib.suppress(FileExistsError):
        os.mkdir(aside, 0o700)
    os.rename(directory, f"{aside}/{name.replace(':', '-')}-{secrets.token_hex(8)}")
    flush(os.path.dirname(directory))
    flush(aside)


def temporary_path(store: Store, what: str) -> str:
    """A new path below tmp/ that nobody else uses."""
    return os.path.join(store.path, "tmp", f"{what}-{os.getpid()}-{secrets.token_hex(8)}")


def _make_directories(top: str, directory: str, mode: int = 0o755) -> None:
    """Every missing directory from below ``top``: the last one with ``mode``, those above 0755, whatever the umask."""
    missing = []
    above = directory
    while above != top and not os.path.isdir(above):
        missing.append(above)
        above = os.path.dirname(above)
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, mode)
            os.chmod(path, mode if path == directory else 0o755)
        flush(os.path.dirname(path))


def write_flushed(path: str, content: bytes, mode: int = 0o644) -> None:
    """A new file, whatever the umask. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fchmod(descriptor, mode)
        os.fsync(descriptor)


def flush(path: str) -> None:
    """What is in a file or directory, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
