"""Putting the store in order: what nobody can want any more is taken away.

- Unfinished work in tmp/, blobs/ and claims/ that nothing has been written to for a while: of pulls that were killed,
  or whose node vanished. Living pulls write all the time.
- Images that no name has meant, and no node has used, for so many days.
- Images that were removed while a node used them, as soon as none does.
- Kept blobs (:mod:`hpcctr.image.layout`) that no stored image needs.

Never what a node uses: whoever mounts an image marks it (:mod:`hpcctr.image.uses`), and what goes, goes through its
gate. A node that cannot write the store makes no mark: for its programs the days are the protection, and for what this
node has mounted, a look at its loop devices.

The times that are compared come from one clock each: files' and marks' from the file server, as a file written now
shows; names' from the nodes that pulled, where minutes do not matter."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from hpcctr.errors import StoreUnusable
from hpcctr.image import layout
from hpcctr.image.imagefile import store_unusable
from hpcctr.image.publish import remove_closed_image, temporary_path
from hpcctr.image.store import Store
from hpcctr.image.uses import (
    LEAVING,
    close_gate,
    drop_old_marks,
    has_gate,
    last_used,
    last_used_by_server,
    marks,
    open_gate_again,
)

DAY = 24 * 3600
#: Days an image stays without a name: longer than most sites let a job run.
IMAGE_DAYS = 7.0
#: Days a mark counts that its node does not take away: longer than sites let a job run.
MARK_DAYS = 60.0
#: Seconds after which unfinished work that nobody writes to has been given up, and the least that anything has to be
#: unwanted, whatever a caller says: a living worker beats every two seconds, and clocks of file servers and clients are
#: at most minutes apart.
UNFINISHED_AFTER = DAY
LEAST_SECONDS = 3600

Kind = Literal[
    "image", "damaged image", "removed image", "named image", "kept blob", "unfinished pull", "blobs", "claim"
]
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


def find_garbage(store: Store, *, image_days: float = IMAGE_DAYS, mark_days: float = MARK_DAYS) -> list[Garbage]:
    """What would be taken away. Raises :class:`StoreUnusable`."""
    return _found(store, file_servers_now(store), image_days, mark_days)


def _found(store: Store, now: float, image_days: float, mark_days: float) -> list[Garbage]:
    marked_after = now - mark_days * DAY
    return [
        *_unfinished(store, now, image_days),
        *_leaving(store, now, marked_after),
        *_images(store, image_days, marked_after),
        *_kept_blobs(store, now),
    ]


def collect(store: Store, *, image_days: float = IMAGE_DAYS, mark_days: float = MARK_DAYS) -> list[Garbage]:
    """Take it away, and return what went. Raises :class:`StoreUnusable`.

    Every image and piece of work leaves by one rename, so nobody finds half of it."""
    now = file_servers_now(store)
    _heal(store, now)
    gone = []
    for garbage in _found(store, now, image_days, mark_days):
        if garbage.kind in ("image", "damaged image"):
            is_gone = take_image(store, garbage.what, mark_days=mark_days)
        elif garbage.kind == "kept blob":
            continue  # as they are when the images have gone
        elif garbage.kind == "removed image":
            is_gone = _take_closed(store, f"{store.path}/{garbage.what}", now - mark_days * DAY)
        else:
            is_gone = _remove_work(store, garbage.what)
        if is_gone:
            gone.append(garbage)
    return gone + _drop_kept_blobs(store, now)


def take_image(
    store: Store, digest: str, *, mark_days: float = MARK_DAYS, may_go_named: Callable[[], bool] = lambda: False
) -> bool:
    """Whether an image went: not when a node uses it, nor when it was used or named within the hour. One that has a
    name goes when ``may_go_named``, asked when its gate is closed, has dropped the name. Raises :class:`StoreUnusable`.
    """
    directory = store.image_directory(digest)
    now = file_servers_now(store)
    if not _is_closed(directory, now - mark_days * DAY):
        return False
    try:
        recent = now - last_used_by_server(directory) < LEAST_SECONDS
        if recent or (digest in _named(store) and not may_go_named()):
            open_gate_again(directory)
            return False
    except OSError as error:
        raise store_unusable(directory, error) from None
    return remove_closed_image(store, directory) is not None


def _take_closed(store: Store, directory: str, marked_after: float) -> bool:
    return _is_closed(directory, marked_after) and remove_closed_image(store, directory) is not None


def _is_closed(directory: str, marked_after: float) -> bool:
    """Whether the gate is closed now, after marks of vanished nodes were removed."""
    try:
        drop_old_marks(directory, before=marked_after)
        return close_gate(directory)
    except OSError as error:
        raise store_unusable(directory, error) from None


def _is_marked(directory: str, marked_after: float) -> bool:
    try:
        return any(mark.since >= marked_after for mark in marks(directory))
    except OSError as error:
        raise store_unusable(directory, error) from None


def _kept_blobs(store: Store, now: float) -> Iterator[Garbage]:
    """Blobs in the layout that no stored image needs."""
    kept = layout.directory_of(store.path)
    if not os.path.isdir(kept):
        return
    try:
        for path, status in layout.unreferenced(kept, set(store.digests())):
            # By when it came to its place: one of a pull that is just keeping it stays.
            if now - status.st_ctime > LEAST_SECONDS:
                yield Garbage(kind="kept blob", what=f"layout/{path}", size=status.st_size, age=now - status.st_ctime)
    except OSError as error:
        raise store_unusable(kept, error) from None


def _drop_kept_blobs(store: Store, now: float) -> list[Garbage]:
    kept = layout.directory_of(store.path)
    gone = []
    try:
        if os.path.isdir(kept):
            layout.drop_entries(kept, set(store.digests()))
        for garbage in _kept_blobs(store, now):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{store.path}/{garbage.what}")
                gone.append(garbage)
    except OSError as error:
        raise store_unusable(kept, error) from None
    return gone


def _heal(store: Store, now: float) -> None:
    """Open the gates that a gc closed and did not open again when it was killed, of images with a name."""
    for digest in _named(store):
        directory = store.image_directory(digest)
        with contextlib.suppress(OSError):
            if not has_gate(directory) and now - os.lstat(directory).st_mtime > LEAST_SECONDS:
                open_gate_again(directory)


def _leaving(store: Store, now: float, marked_after: float) -> Iterator[Garbage]:
    """What was removed while a node used it, once none does."""
    top = f"{store.path}/{LEAVING}"
    try:
        entries = sorted(os.listdir(top))
    except FileNotFoundError:
        return
    except OSError as error:
        raise store_unusable(top, error) from None
    for entry in entries:
        if not _is_marked(f"{top}/{entry}", marked_after):
            size, _ = _measure(f"{top}/{entry}")
            yield Garbage(
                kind="removed image", what=f"{LEAVING}/{entry}", size=size, age=now - last_used(f"{top}/{entry}")
            )


def drop_unfinished(store: Store, *, after: float = 7 * DAY) -> None:
    """Take abandoned work away, and images that were removed and that no node uses any more, as far as possible."""
    with contextlib.suppress(OSError, StoreUnusable):
        now = file_servers_now(store)
        for garbage in _unfinished(store, now, after / DAY, longest=after):
            _remove_work(store, garbage.what)
        marked_after = now - MARK_DAYS * DAY
        for garbage in _leaving(store, now, marked_after):
            _take_closed(store, f"{store.path}/{garbage.what}", marked_after)


def _unfinished(store: Store, now: float, days: float, *, longest: float = UNFINISHED_AFTER) -> Iterator[Garbage]:
    limit = max(LEAST_SECONDS, min(days * DAY, longest))
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


def _images(store: Store, days: float, marked_after: float) -> Iterator[Garbage]:
    named = _named(store)
    unnamed_since = _unnamed_since(store)
    mounted = _mounted_here()
    now = datetime.now(UTC).timestamp()
    for digest in store.digests():
        directory = store.image_directory(digest)
        is_mounted_here = any(path.startswith(f"{directory}/") for path in mounted)
        if digest in named or is_mounted_here or _is_marked(directory, marked_after):
            continue
        size, newest = _measure(directory)
        kind: Kind = "image"
        try:
            since = unnamed_since.get(digest) or _seconds(store.image(digest).record.created)
        except Exception as error:  # noqa: BLE001 - a record may be missing or be anything
            if isinstance(error, OSError):
                raise store_unusable(directory, error) from None
            kind, since = "damaged image", newest
        # Not named, and not used: the stamp is as new as the last node's coming or going. And a directory that was
        # renamed into its place a moment ago is about to get its name.
        since = max(since, newest)
        if now - since > max(days * DAY, LEAST_SECONDS):
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
    """Files behind this node's loop devices (Documentation/ABI/testing/sysfs-block-loop)."""
    found = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            found.append(path.read_text(errors="surrogateescape").rstrip("\n"))
    return found


def file_servers_now(store: Store) -> float:
    """The present by the clock that stamps the store's files."""
    path = temporary_path(store, "now")
    try:
        # No pull has made it yet where a store has only users' parts.
        with contextlib.suppress(FileExistsError):
            os.mkdir(os.path.dirname(path), 0o700)
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


def _remove_work(store: Store, what: str) -> bool:
    path = f"{store.path}/{what}"
    going = temporary_path(store, "gone")
    try:
        os.rename(path, going)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise store_unusable(path, error) from None
    if os.path.isdir(going) and not os.path.islink(going):
        shutil.rmtree(going, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(going)
    return True
