"""Whom a user lets run images of their own: what is written of it, in the user's part of the store.

    STORE/users/<uid>/shares/<registry>/<repository>/@<tag>/uid-<uid>.json      a name, shared with a user
    STORE/users/<uid>/shares/@sha256-<64 hex>/gid-<gid>.json                    an image by its digest, with a group
    STORE/shared/uid-<uid>/<owner's uid>                                        who shares something with a user

One file for each image and whom it is shared with, so that nobody rewrites what another is just writing; users and
groups by number. ``STORE/shared`` (0700) is for listings alone, so that they look at nobody who shares nothing with who
asks; a launch is decided by the owner's own files.

A shared name is shared with what it means when that happens and what it means later: never with what it meant before.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import msgspec

from hpcctr.errors import ImageNotInStore, ReferenceWrong, StoreUnusable, UsageWrong
from hpcctr.image.history import known_since
from hpcctr.image.imagefile import store_unusable
from hpcctr.image.record import Platform, StoredImage
from hpcctr.image.reference import ImageRef, is_digest, is_digest_or_prefix
from hpcctr.image.stale import looked_up_again
from hpcctr.image.store import Store, StoredName

DIRECTORY = "shares"
INDEX = "shared"
_UID_MAX = 2**31 - 1
#: Bytes of a share's file.
_SIZE_MAX = 4096


@dataclass(frozen=True, kw_only=True, order=True)
class Grantee:
    """A user or a group, by number."""

    kind: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.number}"

    @classmethod
    def parse(cls, text: str) -> Grantee:
        """``uid-1000`` or ``gid-100``. Raises :class:`UsageWrong`."""
        kind, _, digits = text.partition("-")
        is_number = digits.isascii() and digits.isdigit() and len(digits) <= 10 and str(int(digits)) == digits
        if kind not in ("uid", "gid") or not is_number or int(digits) > _UID_MAX:
            raise UsageWrong(f"{text[:40]!r} is neither a user nor a group", hint="hpcctr share IMAGE --user NAME")
        return cls(kind=kind, number=int(digits))


def grantees_of(uid: int, gids: Collection[int]) -> frozenset[Grantee]:
    """What a process of that user and of these groups is known by."""
    return frozenset({Grantee(kind="uid", number=uid), *(Grantee(kind="gid", number=gid) for gid in gids)})


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """The content of a share's file: what is shared (a name, or a digest), and since when (RFC 3339, UTC)."""

    schema: int
    image: str
    since: str


def directory_of(part: Store, image: str) -> str:
    """Where the shares of a name or a whole digest are, or would be."""
    if is_digest(image):
        return f"{part.path}/{DIRECTORY}/@{image.replace(':', '-')}"
    ref = ImageRef.parse(image)
    return f"{part.path}/{DIRECTORY}/{ref.registry}/{ref.repository}/@{ref.tag}"


def shares_of(part: Store, image: str) -> dict[Grantee, Share]:
    """Whom an image is shared with, by the name or digest it is shared by. Raises :class:`StoreUnusable`."""
    return dict(_read_directory(directory_of(part, image)))


def every(part: Store, grantees: Collection[Grantee] | None = None) -> Iterator[tuple[Grantee, Share]]:
    """Every share of a user's, or those with some. Raises :class:`StoreUnusable`."""
    pending = [f"{part.path}/{DIRECTORY}"]
    while pending:
        directory = pending.pop()
        if os.path.basename(directory).startswith("@"):
            yield from _read_directory(directory, grantees)
        else:
            pending += [f"{directory}/{name}" for name in sorted(_listed(directory), reverse=True)]


def find(
    part: Store, grantees: Collection[Grantee], text: str, platform: Platform | None = None, as_of: int | None = None
) -> StoredImage:
    """The image of a user's part that a name or digest means for somebody it is shared with.

    Raises :class:`ImageNotInStore` whether it is not there or not shared, and what :meth:`Store.find` raises once it is
    sure that it is shared.
    """
    nothing = ImageNotInStore("not shared, or not there")
    if text.startswith("sha256:") and is_digest_or_prefix(text):
        found = {digest for digest in _visible(part, grantees) if digest.startswith(text)}
        if len(found) != 1:
            raise nothing
        return part.find(found.pop(), platform)
    ref = ImageRef.parse(text)
    if ref.is_file:
        raise nothing
    if ref.digest:
        if not _is_visible(part, grantees, ref):
            raise nothing
        return part.find(text, platform)
    since = _since(part, str(ref), grantees)
    if since is None:
        raise nothing
    return part.find(text, platform, as_of=as_of, known_since=since)


def shared_images(part: Store, grantees: Collection[Grantee]) -> Iterator[StoredName]:
    """What a user shares with somebody, as lines of a listing; without what is not there any more."""
    seen = set()
    for _, share in every(part, grantees):
        if share.image in seen:
            continue
        seen.add(share.image)
        if is_digest(share.image):
            with contextlib.suppress(ImageNotInStore):
                image = part.image(share.image)
                record = image.record
                yield StoredName(
                    name=share.image, platform=record.platform, digest=record.digest, since=record.created, image=image
                )
            continue
        named = ImageRef.parse(share.image)
        for platform in part.platforms_of(named):
            name_record = part.name_record(named, platform)
            if name_record is not None:
                newest = name_record.history[0]
                with contextlib.suppress(ImageNotInStore):
                    image = part.image(newest.digest, name=share.image)
                    yield StoredName(
                        name=share.image, platform=platform, digest=newest.digest, since=newest.since, image=image
                    )


def owners_sharing_with(store: str, grantees: Collection[Grantee]) -> list[int]:
    """Uids of users who have shared something with one of these. Raises :class:`StoreUnusable`."""
    found: set[str] = set()
    for grantee in grantees:
        found.update(name for name in _listed(f"{store}/{INDEX}/{grantee}") if name.isascii() and name.isdigit())
    return sorted(map(int, found))


# inside


def _since(part: Store, image: str, grantees: Collection[Grantee]) -> str | None:
    """Since when an image is shared with one of these; None when it is not."""
    shares = _read_directory(directory_of(part, image), grantees)
    return min((share.since for _, share in shares), default=None)


def _is_visible(part: Store, grantees: Collection[Grantee], ref: ImageRef) -> bool:
    """Whether the digest of a name is shared: by itself, by the tag that is said, or by any other name."""
    if _since(part, ref.digest, grantees) is not None:
        return True
    tagged = replace(ref, digest="")
    return (bool(ref.tag) and ref.digest in _meanings(part, tagged, _since(part, str(tagged), grantees))) or (
        ref.digest in _visible(part, grantees)
    )


def _visible(part: Store, grantees: Collection[Grantee]) -> set[str]:
    """Every digest that is shared with one of these."""
    since: dict[str, str] = {}
    for _, share in every(part, grantees):
        since[share.image] = min(since.get(share.image, share.since), share.since)
    found = set()
    for image, moment in since.items():
        found.update({image} if is_digest(image) else _meanings(part, ImageRef.parse(image), moment))
    return found


def _meanings(part: Store, named: ImageRef, since: str | None) -> set[str]:
    """What a name means, or has meant since then; nothing when it is not shared."""
    found: set[str] = set()
    for platform in part.platforms_of(named) if since is not None else ():
        record = part.name_record(named, platform)
        if record is not None and since is not None:
            found.update(entry.digest for entry in known_since(record.history, since))
    return found


def _read_directory(directory: str, grantees: Collection[Grantee] | None = None) -> Iterator[tuple[Grantee, Share]]:
    """Only what is about ``grantees`` is opened: what is wrong with others is not for them to know."""
    for name in sorted(_listed(directory)):
        with contextlib.suppress(UsageWrong, FileNotFoundError):
            if not name.endswith(".json"):
                continue
            grantee = Grantee.parse(name.removesuffix(".json"))
            if grantees is None or grantee in grantees:
                yield grantee, _read(f"{directory}/{name}")


def _read(path: str) -> Share:
    """Raises :class:`StoreUnusable`, and FileNotFoundError for one that has just gone."""
    try:
        share = msgspec.json.decode(looked_up_again(lambda: _content(path)), type=Share)
        if not is_digest(share.image):
            ImageRef.parse(share.image)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise store_unusable(path, error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, ReferenceWrong) as error:
        raise StoreUnusable(f"{path} is damaged: {error}", hint=f"remove {path} and share the image again") from None
    return share


def _content(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        return file.read(_SIZE_MAX)


def _listed(directory: str) -> Sequence[str]:
    try:
        return looked_up_again(lambda: os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError as error:
        raise store_unusable(directory, error) from None
