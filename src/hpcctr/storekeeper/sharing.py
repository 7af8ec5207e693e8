"""Errands about sharing, as the store's owner: whom a user shares an image with, and what others share with them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec

from hpcctr.errand import Granted, Listed
from hpcctr.errors import ImageNotInStore, ImageNotYours, UsageWrong
from hpcctr.image import platform as platforms
from hpcctr.image.record import ImageRecord
from hpcctr.image.shares import Grantee, grantees_of, owners_sharing_with, shared_images, shares_of
from hpcctr.image.sharing import named_by, share, shareable, unshare
from hpcctr.image.shelves import find, private_path
from hpcctr.image.store import Store
from hpcctr.storekeeper.job import Job

#: Lines of a listing of what others share.
_LINES_MAX = 2000
#: Users and groups in one errand.
_GRANTEES_MAX = 64


def change(job: Job) -> Iterator[Granted]:
    """``share``, ``unshare`` and ``shares``: whom the image is shared with afterwards."""
    if job.uid == 0:
        raise ImageNotYours("the site's images are everybody's already", hint="hpcctr promote makes one of a user's so")
    errand = job.errand
    grantees = _grantees(errand.grantees)
    path = private_path(job.site.store, job.uid)
    if not os.path.isdir(path):
        raise ImageNotInStore(f"{errand.image} is none of your own images", hint="hpcctr images --mine")
    part = Store.open(path, writable=True)
    if errand.task == "unshare":
        image = _there_or_not(part, errand.image)
        unshare(part, image, grantees)
    else:
        image = shareable(part, errand.image)
        if errand.task == "share":
            share(job.site.store, part, job.uid, image, grantees, most=job.site.limits.shares_per_uid)
    for grantee, found in sorted(shares_of(part, image).items()):
        yield Granted(image=image, grantee=str(grantee), since=found.since)


def listed(job: Job) -> Iterator[Listed]:
    """``shared``: what others share with the user and their groups."""
    grantees = grantees_of(job.uid, job.gids)
    lines = 0
    for owner in owners_sharing_with(job.site.store, grantees):
        if owner == job.uid:
            continue
        for line in shared_images(Store(path=private_path(job.site.store, owner)), grantees):
            record = line.image.record if line.image is not None else None
            yield Listed(
                name=line.name,
                platform=str(line.platform),
                digest=line.digest,
                since=line.since,
                record=None if record is None else bounded(record),
                owner=owner,
            )
            lines += 1
            if lines == _LINES_MAX:
                return


def inspected(job: Job) -> Listed:
    """``inspect``: one image of another user's, found as a launch would find it."""
    wanted = platforms.parse(job.errand.platform) if job.errand.platform else None
    image = find(job.site.store, job.uid, job.errand.image, wanted, gids=job.gids)
    record = image.record
    return Listed(
        name=image.name,
        platform=str(record.platform),
        digest=record.digest,
        since=record.created,
        record=bounded(record),
    )


def bounded(record: ImageRecord) -> ImageRecord:
    """A record without what may be long: passwd and group of the image."""
    return msgspec.structs.replace(record, passwd=b"", group=b"")


def _there_or_not(part: Store, text: str) -> str:
    try:
        return shareable(part, text)
    except ImageNotInStore:
        return named_by(text)


def _grantees(text: str) -> list[Grantee]:
    words = [word for word in text.split(",") if word]
    if len(words) > _GRANTEES_MAX:
        raise UsageWrong(f"{len(words)} users and groups at once, {_GRANTEES_MAX} are possible", hint="in two commands")
    return [Grantee.parse(word) for word in words]
