"""An image of a user's own becomes one of the site's.

Its file is linked into the site's part where the filesystem can do that, else copied: files of images are never written
again, belong to the store's owner in both places, and what a user's images may take is counted by their records, so
a link is all it needs. Either way it is read and compared with its digest first, and published as every image is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil

import msgspec

from hpcctr.errors import ImageBroken, NameTaken, UsageWrong
from hpcctr.image.facts import facts_of
from hpcctr.image.imagefile import open_image_file, store_unusable
from hpcctr.image.platform import of_this_node
from hpcctr.image.publish import is_intact, is_kept, publish, set_name, workspace
from hpcctr.image.record import Platform, StoredImage
from hpcctr.image.reference import LOCAL_REGISTRY, ImageRef
from hpcctr.image.store import IMAGE_FILE, Store

#: What link(2) says where a filesystem has no links, or not between these two directories.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)


def promote(
    store_path: str,
    part: Store,
    text: str,
    *,
    owner: int,
    as_name: str | None = None,
    may_replace: bool = False,
    platform: Platform | None = None,
) -> StoredImage:
    """Make the image ``text`` of the user ``owner``'s part one of the site's; as what it is known there.

    A name that means another image stays as it is, unless it came to that by an earlier promotion of the same
    image name, or ``may_replace``: then the new meaning goes before the others in its history.

    Raises :class:`NameTaken`, :class:`UsageWrong`, :class:`ImageBroken`, and what :meth:`Store.find` raises.
    """
    image = part.find(text, platform or of_this_node())
    named = _named(image, as_name)
    store = Store.open(store_path, writable=True)
    record = msgspec.structs.replace(image.record, source=f"@{owner}/{image.name}")
    earlier = store.name_record(named, record.platform)
    means = earlier.history[0] if earlier is not None else None
    if means is not None and means.digest != record.digest and means.source != record.source and not may_replace:
        raise NameTaken(
            f"{named.familiar} means {means.digest[:19]} of {means.source or 'the site'} already",
            hint="another name: --as NAME; or --replace, which keeps the older meaning in its history",
        )
    if not (store.is_whole(record.digest) and is_kept(store, record.digest)):
        with workspace(store) as directory:
            file = f"{directory}/{IMAGE_FILE}"
            _bring(part, image, file)
            publish(store, record, file, facts_of(image))
    set_name(store, named, record.platform, record.digest, record.source)
    return store.image(record.digest, name=str(named))


def _named(image: StoredImage, as_name: str | None) -> ImageRef:
    if as_name is None:
        if image.name.startswith("sha256:"):
            raise UsageWrong("an image of a digest has no name yet", hint="--as NAME")
        named = ImageRef.parse(image.name)
        if named.registry != LOCAL_REGISTRY:
            raise UsageWrong(
                f"{named.familiar} is what its owner calls it, and the name of a registry's image",
                hint=f"--as NAME; for just that name: --as {named.familiar}",
            )
    else:
        named = ImageRef.parse(as_name)
    if named.is_file or named.digest:
        raise UsageWrong(f"{named}: an image is named by repository and tag", hint="for instance --as site/solver:1.2")
    return named


def _bring(part: Store, image: StoredImage, file: str) -> None:
    """A link to the image's file, or a copy, that has the digest that was published."""
    # Looked at as a launch looks at it: nobody but the store's owner can have written what is behind the path.
    os.close(open_image_file(part.path, image))
    try:
        try:
            os.link(image.path, file, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file)
            shutil.copyfile(image.path, file, follow_symlinks=False)
    except OSError as error:
        raise store_unusable(error.filename or file, error) from None
    if not is_intact(msgspec.structs.replace(image, path=file)):
        raise ImageBroken(
            f"{image.path} is not what was published: its size or digest differs",
            hint="its owner removes it and imports it again",
        )
