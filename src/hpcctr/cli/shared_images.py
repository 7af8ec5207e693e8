"""Images that users share with each other, as commands see them: through the storekeeper, and as the store's owner."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator

import msgspec

from hpcctr.cli import bringing, errands, own_images
from hpcctr.errand import Errand, Listed
from hpcctr.errors import CallerRefused, ImageNotInStore, ImageNotYours
from hpcctr.image import platform as platforms
from hpcctr.image import shelves
from hpcctr.image.record import StoredImage
from hpcctr.image.reference import ImageRef
from hpcctr.image.shares import INDEX
from hpcctr.image.sharing import dangling, drop_dangling, drop_index
from hpcctr.image.shelves import SharedName, private_path
from hpcctr.image.store import Store
from hpcctr.policy import account
from hpcctr.site import Site


def is_administrator(site: Site) -> bool:
    """Whether this process may read and write every user's part: as root, or as the store's owner."""
    return os.geteuid() == 0 or bringing.is_writer(site.store)


def require_administrator(site: Site, command: str) -> None:
    """Raise :class:`CallerRefused` unless this process may do what ``command`` does."""
    if not is_administrator(site):
        raise CallerRefused(f"hpcctr {command} is for root and the store's owner", hint=f"sudo hpcctr {command}")


def listed(site: Site) -> Iterator[Listed]:
    """What others share with this user and their groups. Raises any :class:`HpcctrError` of the engine's."""
    # Anybody may see that there is such a directory, nobody what is in it.
    if is_administrator(site) or not os.path.isdir(f"{site.store}/{INDEX}"):
        return
    for said in errands.run(Errand(task="shared"), site):
        if isinstance(said, Listed):
            yield said


def facts(site: Site, text: str, platform: str) -> dict[str, object]:
    """What is known of an image another user shares. Raises :class:`ImageNotInStore`."""
    if is_administrator(site):
        image = found(site, text, platform)
        return {"name": image.name, **msgspec.to_builtins(image.record), "path": image.path}
    for said in errands.run(Errand(task="inspect", image=text, platform=platform), site):
        if isinstance(said, Listed):
            return {"name": said.name, **msgspec.to_builtins(said.record)}
    raise ImageNotInStore(f"image {text} does not exist, or is not shared with you", hint="hpcctr images")


def found(site: Site, text: str, platform: str) -> StoredImage:
    """The image of a user's that an administrator names.

    Raises :class:`ImageNotYours` for others, and what :func:`hpcctr.image.shelves.find` raises.
    """
    if not is_administrator(site):
        raise ImageNotYours(
            f"{text}: its file is its owner's to read", hint="without --verify; or ask an administrator"
        )
    return shelves.find(site.store, 0, text, platforms.parse(platform) if platform else None)


def part_of(site: Site, text: str) -> tuple[Store, str]:
    """(the part of the store an image of a user's is in, its name there), for who administers the store.

    Root is the store's owner afterwards. Raises :class:`ImageNotYours`, :class:`ImageNotInStore`.
    """
    shared = SharedName.parse(text)
    if not is_administrator(site):
        raise ImageNotYours(f"{text}: its owner's to change, share and remove", hint="hpcctr images --mine")
    uid = account.uid_of(shared.owner, asked_by=os.geteuid())
    own_images.become_owner(site)
    if uid is None or not os.path.isdir(private_path(site.store, uid)):
        raise ImageNotInStore(f"user {shared.owner} has no images of their own", hint="hpcctr images")
    return Store.open(private_path(site.store, uid), writable=True), shared.name


def own_name(text: str) -> str:
    """``@OWNER/NAME`` of this very user is NAME. Raises :class:`ImageNotYours` for another's."""
    if not shelves.is_shared_name(text):
        return text
    shared = SharedName.parse(text)
    if account.uid_of(shared.owner, asked_by=os.geteuid()) != os.geteuid():
        raise ImageNotYours(f"{text}: its owner's to change, share and remove", hint="hpcctr images --mine")
    return shared.name


def owner_name(uid: int) -> str:
    """A login name; the number where nobody knows one."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def familiar(owner: str, name: str) -> str:
    """The shortest name that another user types for an image."""
    return f"@{owner}/{name if name.startswith('sha256:') else ImageRef.parse(name).familiar}"


def familiar_name(name: str) -> str:
    """The shortest text for a name of the store's, another user's included."""
    if shelves.is_shared_name(name):
        shared = SharedName.parse(name)
        return familiar(shared.owner, shared.name)
    return ImageRef.parse(name).familiar


def put_in_order(site: Site, part: str, store: Store, *, dry_run: bool) -> Iterator[dict[str, object]]:
    """Take shares of removed images away; a row of ``hpcctr gc`` for each."""
    gone = [f"{share.image} {who}" for who, share in dangling(store)] if dry_run else drop_dangling(store)
    for what in gone:
        yield {"kind": "share", "what": f"{part}{what}", "bytes": 0, "size": "", "seconds": 0, "unwanted_for": ""}
    if not part and not dry_run:
        drop_index(site.store)
