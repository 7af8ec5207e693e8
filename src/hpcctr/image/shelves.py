"""Where a caller finds images: the caller's own part of the store, then what the site offers to everyone.

``STORE/users/<uid>`` has the structure of a store and is closed to everybody but the store's owner (0700). Names there
mean something to that user only, and an image there is found by nobody else, not even by its digest.

Root reads it as the store's owner: a file server that squashes root lets nobody else in.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
from collections.abc import Iterator

import msgspec

from hpcctr.errors import HpcctrError, ImageNotInStore, PlatformMissing, StoreUnusable
from hpcctr.image.imagefile import store_unusable
from hpcctr.image.record import Platform, StoredImage
from hpcctr.image.store import Store

_libc = ctypes.CDLL(None, use_errno=True)


def private_path(store: str, uid: int) -> str:
    """Where the images of a user lie."""
    return f"{store}/users/{uid}"


def find(store: str, uid: int, text: str, platform: Platform | None = None) -> StoredImage:
    """The image that a name or digest means for ``uid``: their own, else the site's.

    Raises what :meth:`hpcctr.image.store.Store.find` raises.
    """
    with as_owner(store):
        own = _own(store, uid)
        if own is not None:
            with contextlib.suppress(ImageNotInStore, PlatformMissing):
                return _private(own.find(text, platform))
        return Store.open(store).find(text, platform)


def image_known_as(store: str, uid: int, digest: str, untrusted_name: str) -> StoredImage:
    """The image of a whole digest that ``uid`` may have, by the name somebody says it has, if it has it.

    Raises :class:`ImageNotInStore`, :class:`StoreUnusable`.
    """
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
