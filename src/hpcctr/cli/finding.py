"""What ``hpcctr doctor`` says of one thing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The state of one thing on this node."""

    thing: str
    is_good: bool
    what: str
    remedy: str = ""
