"""What is known of a stored image's libraries, for launches that ask for features of the host.

It is in a file of its own: ``image.json``, which every launch reads, has only the summary (``record.facts``). How it is
come by: :mod:`hpcctr.image.linkage`. All of it is the image's claim (:class:`ImageFacts`)."""

from __future__ import annotations

import os

from hpcctr.image.record import ImageFacts, StoredImage
from hpcctr.image.store import Store


def facts_of(image: StoredImage) -> ImageFacts | None:
    """None for an image that was stored before libraries were noted, and where noting them failed.

    Raises :class:`StoreUnusable` when the file is missing or damaged.
    """
    # STORE/images/<digest>/root.squashfs
    store = os.path.dirname(os.path.dirname(os.path.dirname(image.path)))
    return Store(path=store).facts(image)
