"""A user's own images, which only the store's owner can read: the storekeeper lists and removes them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import msgspec

from hpcctr.cli import errands
from hpcctr.errand import Errand, Listed, Quota, Removed
from hpcctr.errors import EngineUnreachable, ImageNotInStore
from hpcctr.image.reference import ImageRef, is_digest_or_prefix
from hpcctr.image.shelves import owner_of
from hpcctr.image.store import Store
from hpcctr.site import Site


def become_owner(site: Site) -> None:
    """Root works on the store as its owner, who may be the only one the file server lets do so; for good."""
    if os.geteuid() != 0 or not os.path.isdir(site.store):
        return
    uid, gid = owner_of(site.store)
    if uid:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)


def has_own_images(site: Site) -> bool:
    """Whether this user has a part of the store, and an engine to ask about it. Anybody may see that, nobody what."""
    if os.geteuid() == 0:
        return False
    with contextlib.suppress(OSError):
        return os.path.isdir(f"{site.store}/users/{os.geteuid()}")
    return False


def listed(site: Site) -> Iterator[Listed]:
    """The user's own images. Raises any :class:`HpcctrError` of the engine's."""
    for said in listed_with_quota(site):
        if isinstance(said, Listed):
            yield said


def listed_with_quota(site: Site) -> Iterator[Listed | Quota]:
    """The user's own images, and what they take. Raises any :class:`HpcctrError` of the engine's."""
    if has_own_images(site):
        for said in errands.run(Errand(task="images"), site):
            if isinstance(said, Listed | Quota):
                yield said


def find(site: Site, text: str) -> Listed | None:
    """The user's own image of a name or digest, as a launch would find it; None when it is none of theirs."""
    wanted = (
        "" if text.startswith("sha256:") and is_digest_or_prefix(text) else str(ImageRef.parse(text).name_in_store())
    )
    with contextlib.suppress(EngineUnreachable):
        for one in listed(site):
            if one.name == wanted or (not wanted and one.digest.startswith(text)):
                return one
    return None


def require_intact(site: Site, one: Listed) -> None:
    """Raise :class:`ImageDamaged` unless the file of an image of the user's own is what was published."""
    for _ in errands.run(Errand(task="verify", image=one.digest), site):
        pass


def remove(site: Site, text: str, platform: str) -> Removed:
    """Take a name or image of the user's own away. Raises :class:`ImageNotInStore`."""
    if not has_own_images(site):
        raise ImageNotInStore(
            f"{text} is none of your own images", hint="hpcctr images --mine; others are removed by root"
        )
    for said in errands.run(Errand(task="remove", image=text, platform=platform), site):
        if isinstance(said, Removed):
            return said
    return Removed(names=(), digests=(), freed=0)


def facts(one: Listed) -> dict[str, object]:
    """The record of an image of the user's own."""
    record: dict[str, object] = msgspec.to_builtins(one.record) if one.record is not None else {}
    return {"name": one.name, **record}


def writable_store(site: Site) -> Store:
    """The site's store, for its owner, and for root as its owner."""
    become_owner(site)
    return Store.open(site.store, writable=True)
