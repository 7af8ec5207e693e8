"""Where a caller finds images: the caller's own part of the store, then what the site offers to everyone; and what
another user shares, by the name ``@OWNER/NAME``.

``STORE/users/<uid>`` has the structure of a store and is closed to everybody but the store's owner (0700). Names there
mean something to that user only, and an image there is found by nobody else, not even by its digest, unless it is
shared with them or with a group of theirs (:mod:`hpcctr.image.shares`).

Root reads it as the store's owner: a file server that squashes root lets nobody else in.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import msgspec

from hpcctr.errors import HpcctrError, ImageGone, ImageNotInStore, PlatformMissing, ReferenceWrong, StoreUnusable
from hpcctr.image import shares
from hpcctr.image.imagefile import store_unusable
from hpcctr.image.record import Platform, StoredImage
from hpcctr.image.reference import ImageRef, is_digest_or_prefix
from hpcctr.image.shares import grantees_of
from hpcctr.image.store import Store
from hpcctr.policy import account

#: Login names as sites have them: those of useradd(8), and ``DOMAIN\\user`` and ``user@domain`` of directories.
_OWNER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@\\+-]{0,63}\$?", re.ASCII)
_libc = ctypes.CDLL(None, use_errno=True)


def private_path(store: str, uid: int) -> str:
    """Where the images of a user lie."""
    return f"{store}/users/{uid}"


@dataclass(frozen=True, kw_only=True)
class SharedName:
    """``@OWNER/NAME[:TAG]`` or ``@OWNER/sha256:…``: an image of another user's. No other name begins so, and no shell
    reads anything into it.
    """

    #: A login name or a uid, as written.
    owner: str
    #: What the owner calls it.
    name: str

    @classmethod
    def parse(cls, text: str) -> SharedName:
        """Raises :class:`ReferenceWrong`."""
        owner, slash, name = text[1:].partition("/")
        if not text.startswith("@") or not slash or not _OWNER.fullmatch(owner):
            raise ReferenceWrong(
                f"image name {text[:200]!r}: not @OWNER/NAME",
                hint="OWNER is a user's name or number: @alice/solver:1.2",
            )
        if not (name.startswith("sha256:") and is_digest_or_prefix(name)) and ImageRef.parse(name).is_file:
            raise ReferenceWrong(f"image name {text[:200]!r}: a file is nobody's image", hint="@OWNER/NAME[:TAG]")
        return cls(owner=owner, name=name)

    def __str__(self) -> str:
        return f"@{self.owner}/{self.name}"


def is_shared_name(text: str) -> bool:
    """Whether a text is meant as a name of another user's image."""
    return text.startswith("@")


def find(
    store: str,
    uid: int,
    text: str,
    platform: Platform | None = None,
    *,
    gids: Collection[int] = (),
    as_of: int | None = None,
) -> StoredImage:
    """The image that a name or digest means for ``uid``: their own, else the site's; and for ``@OWNER/NAME`` the
    owner's, if it is shared with them or with one of ``gids``. ``as_of``: as for
    :meth:`hpcctr.image.store.Store.find`.

    Raises what that raises, and :class:`DeadlinePassed`.
    """
    if is_shared_name(text):
        return _find_shared(store, uid, SharedName.parse(text), platform, gids, as_of)
    with as_owner(store):
        own, site = _own(store, uid), Store(path=store)
        # A name of one's own that is younger than the job does not change what the name meant when the job started.
        is_too_young = (
            own is not None
            and as_of is not None
            and not own.was_there(text, platform, as_of)
            and site.was_there(text, platform, as_of)
        )
        if own is not None and not is_too_young:
            try:
                return _private(own.find(text, platform, as_of=as_of))
            except ImageGone:
                raise
            except (ImageNotInStore, PlatformMissing):
                pass
        return Store.open(store).find(text, platform, as_of=as_of)


def _find_shared(
    store: str, uid: int, shared: SharedName, platform: Platform | None, gids: Collection[int], as_of: int | None
) -> StoredImage:
    """Root and the owner need no share. Whether it is not there or not shared, nobody can tell."""
    owner = account.uid_of(shared.owner, asked_by=uid)
    nothing = ImageNotInStore(
        f"image {shared} does not exist, or is not shared with you",
        hint=f"ask its owner for: hpcctr share {shared.name} --user YOU; hpcctr images lists what is shared with you",
    )
    with as_owner(store):
        part = _own(store, owner) if owner is not None else None
        if part is None:
            raise nothing
        try:
            if uid in (0, owner):
                image = part.find(shared.name, platform, as_of=as_of)
            else:
                image = shares.find(part, grantees_of(uid, gids), shared.name, platform, as_of)
        except (ImageGone, PlatformMissing) as error:
            raise type(error)(f"{shared}: {error.message}", hint="ask its owner") from None
        except ImageNotInStore:
            raise nothing from None
    return msgspec.structs.replace(image, name=f"@{shared.owner}/{image.name}", is_private=True)


def image_known_as(
    store: str, uid: int, digest: str, untrusted_name: str, *, gids: Collection[int] = ()
) -> StoredImage:
    """The image of a whole digest that ``uid`` may have, by the name somebody says it has, if it has or had it.

    Raises :class:`ImageNotInStore`, :class:`StoreUnusable`, :class:`DeadlinePassed`.
    """
    if is_shared_name(untrusted_name):
        with contextlib.suppress(ImageNotInStore, PlatformMissing, ReferenceWrong):
            claimed = SharedName.parse(untrusted_name)
            tagged = claimed.name.partition("@")[0]
            exact = digest if tagged.startswith("sha256:") else f"{tagged}@{digest}"
            return _find_shared(store, uid, SharedName(owner=claimed.owner, name=exact), None, gids, None)
    with as_owner(store):
        own = _own(store, uid)
        if own is not None:
            with contextlib.suppress(ImageNotInStore):
                return _private(own.image_known_as(digest, untrusted_name))
        return Store.open(store).image_known_as(digest, untrusted_name)


def open_image_file(store: str, image: StoredImage) -> int:
    """:func:`hpcctr.image.imagefile.open_image_file` as the store's owner: the caller closes the descriptor."""
    with as_owner(store):
        return Store.open(store).open_image_file(image)


def owner_of(store: str) -> tuple[int, int]:
    """(uid, gid) of the store. Raises :class:`StoreUnusable`."""
    try:
        status = os.stat(store)
    except FileNotFoundError:
        Store.open(store)  # says what to do about it
        raise StoreUnusable(f"store {store} does not exist", hint="set store in /etc/hpcctr/site.toml") from None
    except OSError as error:
        raise store_unusable(store, error) from None
    return status.st_uid, status.st_gid


@contextlib.contextmanager
def as_owner(store: str) -> Iterator[None]:
    """Root's file accesses of this thread are the store owner's meanwhile (setfsuid(2): one thread's, and with the
    capabilities over files gone for as long). For others, and for a store that is not there, nothing changes.
    """
    uid = gid = 0
    if os.geteuid() == 0:
        with contextlib.suppress(HpcctrError):
            uid, gid = owner_of(store)
    if uid == 0:
        yield
        return
    _set_filesystem_ids(uid, gid)
    try:
        yield
    finally:
        _set_filesystem_ids(0, 0)


def _set_filesystem_ids(uid: int, gid: int) -> None:
    """The group first, while the capability for it is still effective; both read back, for the calls report nothing."""
    _libc.setfsgid(gid)
    _libc.setfsuid(uid)
    if (_libc.setfsuid(-1), _libc.setfsgid(-1)) != (uid, gid):
        raise StoreUnusable(f"the engine cannot act as the store's owner, uid {uid}", hint="start it as root")


def _own(store: str, uid: int) -> Store | None:
    path = private_path(store, uid)
    try:
        is_there = uid != 0 and stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return None
    return Store(path=path) if is_there else None


def _private(image: StoredImage) -> StoredImage:
    return msgspec.structs.replace(image, is_private=True)
