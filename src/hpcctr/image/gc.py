"""Putting the store in order: what nobody can want any more is taken away.

- Unfinished work in tmp/, blobs/ and claims/ that nothing has been written to for a while: of pulls that were killed,
  or whose node vanished. Living pulls write all the time.
- Images that no name has meant for so many days.

An image may be in use on any node, and no node writes to the store to say so: a file server may squash root, and the
store may be read-only there. A node that runs an image keeps its file by the mount; but a file that another node
removed over NFS is gone for it (ESTALE). So the days are the protection: set more of them than the longest job has.
What this node has mounted is never taken.

The times that are compared come from one clock each: files' from the file server, as a file written now shows; names'
from the nodes that pulled, where minutes do not matter."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from hpcctr.errors import StoreUnusable
from hpcctr.image.imagefile import store_unusable
from hpcctr.image.publish import remove_image, temporary_path
from hpcctr.image.store import Store

DAY = 24 * 3600
#: Days an image stays without a name: longer than most sites let a job run.
IMAGE_DAYS = 7.0
#: Seconds after which unfinished work that nobody writes to has been given up, and the least a caller may set: a living
#: worker beats every two seconds, and clocks of file servers and clients are at most minutes apart.
UNFINISHED_AFTER = DAY
_UNFINISHED_AFTER_LEAST = 3600

Kind = Literal["image", "damaged image", "unfinished pull", "blobs", "claim"]
_WORK: tuple[tuple[str, Kind], ...] = (("tmp", "unfinished pull"), ("blobs", "blobs"), ("claims", "claim"))


class Garbage(msgspec.Struct, frozen=True, kw_only=True):
    """Something to take away: what it is, its digest or path in the store, bytes, seconds since it was wanted."""

    kind: Kind
    what: str
    size: int
    age: float


def parts(path: str) -> Iterator[tuple[str, Store]]:
    """The store, and the part of it of every user; each with what its paths begin with.

    Raises :class:`StoreUnusable`."""
    yield "", Store.open(path)
    try:
        users = sorted(os.listdir(f"{path}/users"))
    except FileNotFoundError:
        return
    except OSError as error:
        raise store_unusable(f"{path}/users", error) from None
    for user in users:
        if user.isascii() and user.isdigit():
            yield f"users/{user}/", Store.open(f"{path}/users/{user}")


def find_garbage(store: Store, *, image_days: float = IMAGE_DAYS) -> list[Garbage]:
    """What would be taken away. Raises :class:`StoreUnusable`."""
    return [*_unfinished(store, image_days), *_images(store, image_days)]


def collect(store: Store, *, image_days: float = IMAGE_DAYS) -> list[Garbage]:
    """Take it away, and return what went. Raises :class:`StoreUnusable`.

    Every image and piece of work leaves by one rename, so nobody finds half of it."""
    gone = []
    for garbage in find_garbage(store, image_days=image_days):
        if garbage.kind in ("image", "damaged image"):
            # Once more, just before: a pull may have given it a name meanwhile.
            if garbage.what in _named(store):
                continue
            remove_image(store, garbage.what)
        else:
            _remove_work(store, garbage.what)
        gone.append(garbage)
    return gone


def drop_unfinished(store: Store, *, after: float = 7 * DAY) -> None:
    """Take abandoned work away, as far as that is possible."""
    with contextlib.suppress(OSError, StoreUnusable):
        for garbage in _unfinished(store, after / DAY, longest=after):
            _remove_work(store, garbage.what)


def _unfinished(store: Store, days: float, *, longest: float = UNFINISHED_AFTER) -> Iterator[Garbage]:
    limit = max(_UNFINISHED_AFTER_LEAST, min(days * DAY, longest))
    now = _file_servers_now(store)
    for name, kind in _WORK:
        top = f"{store.path}/{name}"
        try:
            entries = sorted(os.listdir(top))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise store_unusable(top, error) from None
        for entry in entries:
            size, newest = _measure(f"{top}/{entry}")
            if now - newest > limit:
                yield Garbage(kind=kind, what=f"{name}/{entry}", size=size, age=now - newest)


def _images(store: Store, days: float) -> Iterator[Garbage]:
    named = _named(store)
    unnamed_since = _unnamed_since(store)
    mounted = _mounted_here()
    now = datetime.now(UTC).timestamp()
    for digest in store.digests():
        directory = store.image_directory(digest)
        if digest in named or any(path.startswith(f"{directory}/") for path in mounted):
            continue
        size, newest = _measure(directory)
        kind: Kind = "image"
        try:
            since = unnamed_since.get(digest) or _seconds(store.image(digest).record.created)
        except Exception as error:  # noqa: BLE001 - a record may be missing or be anything
            if isinstance(error, OSError):
                raise store_unusable(directory, error) from None
            kind, since = "damaged image", newest
        # A directory that was renamed into its place a moment ago is about to get its name.
        since = max(since, newest)
        if now - since > max(days * DAY, _UNFINISHED_AFTER_LEAST):
            yield Garbage(kind=kind, what=digest, size=size, age=now - since)


def _named(store: Store) -> set[str]:
    return {record.history[0].digest for _, _, record in store.names()}


def _unnamed_since(store: Store) -> dict[str, float]:
    """When the last name that meant an image began to mean another one."""
    since: dict[str, float] = {}
    for _, _, record in store.names():
        for newer, older in zip(record.history, record.history[1:], strict=False):
            since[older.digest] = max(since.get(older.digest, 0.0), _seconds(newer.since))
    return since


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def _mounted_here() -> list[str]:
    """Files behind this node's loop devices (Documentation/ABI/testing/sysfs-block-loop). EROFS images need none; they
    are protected by the days alone."""
    found = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            found.append(path.read_text(errors="surrogateescape").rstrip("\n"))
    return found


def _file_servers_now(store: Store) -> float:
    """The present by the clock that stamps the store's files."""
    path = temporary_path(store, "now")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            return os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
            os.unlink(path)
    except OSError as error:
        raise store_unusable(path, error) from None


def _measure(path: str) -> tuple[int, float]:
    """Bytes of a file or of all below a directory, and when any of it was written last."""
    size, newest = 0, 0.0
    pending = [path]
    while pending:
        current = pending.pop()
        with contextlib.suppress(OSError):
            status = os.lstat(current)
            newest = max(newest, status.st_mtime)
            if stat.S_ISDIR(status.st_mode):
                pending += [f"{current}/{name}" for name in os.listdir(current)]
            elif stat.S_ISREG(status.st_mode):
                size += status.st_size
    return size, newest


def _remove_work(store: Store, what: str) -> None:
    path = f"{store.path}/{what}"
    going = temporary_path(store, "gone")
    try:
        os.rename(path, going)
    except FileNotFoundError:
        return
    except OSError as error:
        raise store_unusable(path, error) from None
    if os.path.isdir(going) and not os.path.islink(going):
        shutil.rmtree(going, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(going)
