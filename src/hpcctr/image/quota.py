"""How much the images of a store take, and which go first when that is too much.

Counted are all image files of the store and of its users' parts, those that are leaving as well. First go images
without a name, those that nobody has wanted for longest before others; then, only when that is asked for, named ones
that no node has used for longest. Never what a node uses, and nothing that was brought, named or used within the hour.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection
from dataclasses import dataclass

from hpcctr.errors import HpcctrError, UsageWrong
from hpcctr.image.gc import DAY, LEAST_SECONDS, MARK_DAYS, Garbage, file_servers_now, find_garbage, parts, take_image
from hpcctr.image.imagefile import store_unusable
from hpcctr.image.publish import drop_names
from hpcctr.image.store import Store
from hpcctr.image.uses import image_directories, last_used, marks

_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([kKMGTP]?)(i?)B?")
_POWERS = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}


@dataclass(frozen=True, kw_only=True)
class Surplus:
    """One image that goes because the store is too full; ``part`` is what its path begins with."""

    part: str
    store: Store
    garbage: Garbage
    is_named: bool


def parse_size(text: str) -> int:
    """Bytes: ``500000``, ``200G`` and ``200 GB`` (powers of 1000, as they are printed), ``1.5TiB``.

    Raises :class:`UsageWrong`.
    """
    matched = _SIZE.fullmatch(text.strip())
    if matched is None or (matched[3] and not matched[2]):
        raise UsageWrong(f"{text!r} is not a size", hint="for instance 500G or 2TB; 1TiB is 1024 GiB")
    return int(float(matched[1]) * (1024 if matched[3] else 1000) ** _POWERS[matched[2]])


def bytes_of(part: str) -> int:
    """What the images of a store, or of a user's part of it, take; those that are leaving as well.

    Raises :class:`StoreUnusable`.
    """
    total = 0
    try:
        for directory in image_directories(part):
            with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
                total += sum(entry.stat(follow_symlinks=False).st_size for entry in entries if entry.is_file())
    except OSError as error:
        raise store_unusable(part, error) from None
    return total


def find_surplus(
    store: str,
    *,
    keep_bytes: int,
    may_be_named: bool,
    freed: int = 0,
    mark_days: float = MARK_DAYS,
    but: Collection[str] = (),
) -> tuple[list[Surplus], int]:
    """What has to go so that all images take at most ``keep_bytes``, when those in ``but``, of ``freed`` bytes, go
    anyway; and the bytes that are too many even then. Raises :class:`StoreUnusable`.
    """
    candidates: list[Surplus] = []
    total = -freed
    for part, its in parts(store):
        total += bytes_of(its.path)
        named = {record.history[0].digest for _, _, record in its.names()}
        unnamed = find_garbage(its, image_days=0, mark_days=mark_days)
        candidates += [
            Surplus(part=part, store=its, garbage=garbage, is_named=False)
            for garbage in unnamed
            if garbage.kind in ("image", "damaged image") and f"{part}{garbage.what}" not in but
        ]
        if may_be_named:
            candidates += [
                Surplus(part=part, store=its, garbage=garbage, is_named=True)
                for garbage in _unused(its, named, mark_days)
            ]
    # False before True: those without a name first.
    candidates.sort(key=lambda one: (one.is_named, -one.garbage.age))
    chosen = []
    for one in candidates:
        if total <= keep_bytes:
            break
        chosen.append(one)
        total -= one.garbage.size
    return chosen, max(0, total - keep_bytes)


def take(surplus: Surplus, *, mark_days: float = MARK_DAYS) -> bool:
    """Whether it went. Raises :class:`StoreUnusable`."""

    def may_go() -> bool:
        if not surplus.is_named:
            return False
        drop_names(surplus.store, surplus.garbage.what)
        return True

    return take_image(surplus.store, surplus.garbage.what, mark_days=mark_days, may_go_named=may_go)


def _unused(store: Store, digests: set[str], mark_days: float) -> list[Garbage]:
    now = file_servers_now(store)
    found = []
    for digest in sorted(digests):
        directory = store.image_directory(digest)
        age = now - last_used(directory)
        try:
            size = store.image(digest).record.file_size
            is_marked = any(now - mark.since <= mark_days * DAY for mark in marks(directory))
        except (HpcctrError, OSError):
            continue  # its name means nothing, or nobody can tell
        if age > LEAST_SECONDS and not is_marked:
            found.append(Garbage(kind="named image", what=digest, size=size, age=age))
    return found
