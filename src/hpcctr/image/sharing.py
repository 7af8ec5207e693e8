"""Writing whom a user lets run their images: :mod:`hpcctr.image.shares` says where and reads it.

As everything in the store a share is written under another name, flushed and renamed. Its work directory is the part's
own ``tmp/``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import msgspec

from hpcctr.errors import ImageNotInStore, StoreUnusable
from hpcctr.image.imagefile import store_unusable
from hpcctr.image.publish import flush, now, temporary_path, write_flushed
from hpcctr.image.reference import ImageRef, is_digest, is_digest_or_prefix
from hpcctr.image.shares import DIRECTORY, INDEX, Grantee, Share, directory_of, every
from hpcctr.image.store import SCHEMA, Store

#: Attempts at a file whose directory somebody else removes, because it was empty a moment ago.
_ATTEMPTS = 200
#: Seconds between two of them at most; each waits another time, or they would go on meeting.
_PAUSE = 0.02
#: Seconds a line of the index stays at least: one that is just being written is not taken away.
_INDEX_AGE = 3600


def shareable(part: Store, text: str) -> str:
    """What is shared when somebody says this: a name of theirs, or a whole digest. Raises :class:`ImageNotInStore`."""
    if text.startswith("sha256:") and is_digest_or_prefix(text):
        return part.image(part.whole_digest(text)).record.digest
    ref = ImageRef.parse(text)
    named = ref.name_in_store()
    if named.digest:
        for entry in part.history_of(named):
            return entry.digest
        return part.image(named.digest).record.digest
    if not part.platforms_of(named):
        raise ImageNotInStore(f"{ref.familiar} is none of your own images", hint="hpcctr images --mine")
    return str(named)


def share(store: str, part: Store, owner: int, image: str, grantees: Sequence[Grantee], *, most: int) -> None:
    """Share a name or digest of a user's part, as :func:`shareable` gives it, with users and groups.

    One that is shared already stays as it is: since when it is shared decides what is. ``most`` is how many shares a
    user may have. Raises :class:`StoreUnusable`.
    """
    there = {(share.image, grantee) for grantee, share in every(part)}
    wanted = [grantee for grantee in grantees if (image, grantee) not in there]
    if len(there) + len(wanted) > most:
        raise StoreUnusable(
            f"{len(there)} shares are yours, {most} are possible",
            hint="a group is one; hpcctr share IMAGE --remove; the limit is [limits] shares-per-uid of site.toml",
        )
    content = msgspec.json.encode(Share(schema=SCHEMA, image=image, since=_since(part, image)))
    for grantee in wanted:
        _put(part, f"{directory_of(part, image)}/{grantee}.json", content)
    for grantee in grantees:
        # After the share, and anew each time: what was written lately is not taken away (drop_index).
        _mention(store, grantee, owner)


def unshare(part: Store, image: str, grantees: Sequence[Grantee]) -> None:
    """Take shares back; what is not shared is no error. Raises :class:`StoreUnusable`."""
    for grantee in grantees:
        _remove(part, f"{directory_of(part, image)}/{grantee}.json")


def named_by(text: str) -> str:
    """What may be shared by that text, whether it is there or not."""
    if is_digest(text):
        return text
    ref = ImageRef.parse(text).name_in_store()
    return ref.digest or str(replace(ref, digest=""))


def dangling(part: Store) -> Iterator[tuple[Grantee, Share]]:
    """Shares of names and digests that are not there any more. Raises :class:`StoreUnusable`."""
    for grantee, found in every(part):
        if is_digest(found.image):
            is_there = os.path.isdir(part.image_directory(found.image))
        else:
            is_there = bool(part.platforms_of(ImageRef.parse(found.image)))
        if not is_there:
            yield grantee, found


def drop_dangling(part: Store) -> list[str]:
    """Take those away, each told as ``IMAGE uid-NUMBER``: a name that comes again is shared with nobody."""
    gone = []
    for grantee, found in list(dangling(part)):
        _remove(part, f"{directory_of(part, found.image)}/{grantee}.json")
        gone.append(f"{found.image} {grantee}")
    return gone


def drop_index(store: str, *, age: float = _INDEX_AGE) -> None:
    """Take lines of the index away whose user shares nothing with those they are about.

    Raises :class:`StoreUnusable`.
    """
    top = f"{store}/{INDEX}"
    shared: dict[str, set[str]] = {}
    try:
        for directory in os.listdir(top) if os.path.isdir(top) else ():
            for owner in os.listdir(f"{top}/{directory}"):
                if owner not in shared:
                    part = Store(path=f"{store}/users/{owner}")
                    shared[owner] = {str(grantee) for grantee, _ in every(part)}
                path = f"{top}/{directory}/{owner}"
                if directory not in shared[owner] and time.time() - os.lstat(path).st_mtime > age:
                    os.unlink(path)
            with contextlib.suppress(OSError):
                os.rmdir(f"{top}/{directory}")
    except FileNotFoundError:
        return
    except OSError as error:
        raise store_unusable(error.filename or top, error) from None


# inside


def _since(part: Store, image: str) -> str:
    """Now; or, where the clock of the node that gave the name its meaning was ahead of this one's, then: what the name
    meant earlier is not shared.
    """
    if is_digest(image):
        return now()
    named = ImageRef.parse(image)
    records = (part.name_record(named, platform) for platform in part.platforms_of(named))
    return max([now(), *(record.history[0].since for record in records if record is not None)])


def _put(part: Store, path: str, content: bytes) -> None:
    temporary = temporary_path(part, "share")
    try:
        write_flushed(temporary, content, 0o600)
        try:
            _in_directory(os.path.dirname(path), lambda: os.rename(temporary, path))
        except BaseException:
            os.unlink(temporary)
            raise
        flush(os.path.dirname(path))
    except OSError as error:
        raise store_unusable(error.filename or path, error) from None


def _mention(store: str, grantee: Grantee, owner: int) -> None:
    path = f"{store}/{INDEX}/{grantee}/{owner}"

    def touch() -> None:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        os.utime(path)

    try:
        _in_directory(os.path.dirname(path), touch)
        flush(os.path.dirname(path))
    except OSError as error:
        raise store_unusable(error.filename or path, error) from None


def _in_directory(directory: str, act: Callable[[], None]) -> None:
    """Do something in a directory, which is made, with those above it, as often as somebody takes it away."""
    for _ in range(_ATTEMPTS):
        try:
            _make(directory)
            act()
            return
        except FileNotFoundError:
            time.sleep(secrets.randbelow(1000) / 1000 * _PAUSE)
    act()


def _make(directory: str) -> None:
    """A directory and those above it, for nobody but the store's owner."""
    missing = []
    while not os.path.isdir(directory):
        missing.append(directory)
        directory = os.path.dirname(directory)
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        flush(os.path.dirname(path))


def _remove(part: Store, path: str) -> None:
    top = f"{part.path}/{DIRECTORY}"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        directory = os.path.dirname(path)
        with contextlib.suppress(FileNotFoundError):
            flush(directory)
        while directory != top:
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(directory)
            directory = os.path.dirname(directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise store_unusable(path, error) from None
