"""Whether an image file is what was published, asked when a node is about to mount it.

By what the kernel says where it checks the file itself (:mod:`hpcctr.image.verity`): at once. And, where the site wants
that, by reading all of it, through the very descriptor that is mounted. The digests are those of the image's record:
this finds what a disk, a network or a hand has done to the file, not whoever may write the store.
"""

from __future__ import annotations

import hashlib
import os
import time

from hpcctr.errors import DeadlinePassed, ImageDamaged
from hpcctr.image import verity
from hpcctr.image.record import ImageRecord

#: Seconds to read a file: a client waits 120 for its answer. What was read stays in the page cache for the next try.
READ_SECONDS = 100.0
_PIECE = 4 << 20


def require_intact(image: int, record: ImageRecord, *, is_read: bool) -> None:
    """Raise :class:`ImageDamaged` unless the open file is the record's; with ``is_read`` all of it is read.

    Raises :class:`DeadlinePassed` when that takes too long.
    """
    try:
        measured = verity.measure(image) if record.verity else ""
        # A file without one is a copy, from a backup or of another filesystem: as good, but nobody checks it.
        if measured and measured != record.verity:
            raise _damaged(record, f"the kernel's digest of it is {measured}, {record.verity} was published")
        if is_read and not measured:
            _require_digest(image, record)
    except OSError as error:
        raise _damaged(record, f"it cannot be read: {(error.strerror or str(error)).lower()}") from None


def _require_digest(image: int, record: ImageRecord) -> None:
    digest = hashlib.sha256()
    late = time.monotonic() + READ_SECONDS
    at = 0
    while piece := os.pread(image, _PIECE, at):
        digest.update(piece)
        at += len(piece)
        if at > record.file_size:
            break
        if time.monotonic() > late:
            raise DeadlinePassed(
                f"the file of image {record.digest} was not read within {READ_SECONDS:.0f} s: {at} of "
                f"{record.file_size} bytes",
                hint="try again; or verify-at-mount = false in site.toml",
            )
    found = f"sha256:{digest.hexdigest()}"
    if (at, found) != (record.file_size, record.file_digest):
        raise _damaged(record, f"its digest is {found}, {record.file_digest} was published")


def _damaged(record: ImageRecord, reason: str) -> ImageDamaged:
    return ImageDamaged(
        f"the file of image {record.digest} is damaged: {reason}", hint=f"hpcctr pull --verify {record.source}"
    )
