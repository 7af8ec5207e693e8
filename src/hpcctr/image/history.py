"""What a name means at a moment: pure, over the history in a name's record.

A job takes the digest its names had when it started, so that all its ranks and steps run the same, whoever pulls the
name anew meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from hpcctr.image.record import NameEntry


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """One entry of a history, and why it is this one."""

    entry: NameEntry
    because: str
    #: The name means another digest now.
    is_past: bool


def meaning(history: Sequence[NameEntry], as_of: int | None = None) -> Meaning:
    """The newest entry that was there ``as_of`` (seconds since 1970; None: now); the oldest when all are younger.

    ``history`` is newest first, and not empty.
    """
    if as_of is None:
        return Meaning(entry=history[0], because=f"its meaning since {history[0].since}", is_past=False)
    moment = rfc3339(as_of)
    for entry in history:
        if entry.since <= moment:
            because = f"its meaning as of {moment}, since {entry.since}"
            break
    else:
        entry = history[-1]
        because = f"its first meaning, of {entry.since}: nothing as old as {moment}"
    is_past = entry.digest != history[0].digest
    if is_past:
        because += f"; now {history[0].digest[:19]}, since {history[0].since}"
    return Meaning(entry=entry, because=because, is_past=is_past)


def was_there(history: Sequence[NameEntry], as_of: int) -> bool:
    """Whether the name meant something then."""
    return history[-1].since <= rfc3339(as_of)


def known_since(history: Sequence[NameEntry], since: str) -> Sequence[NameEntry]:
    """The part of a history that whoever has known the name since then may know of: what it meant then, and later."""
    for number, entry in enumerate(history, 1):
        if entry.since <= since:
            return history[:number]
    return history


def rfc3339(seconds: int) -> str:
    """As names' records write a moment; texts of one length, whose order is that of time."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
