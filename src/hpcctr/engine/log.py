"""What the engine writes down: lines on stderr, which under systemd are the journal's."""

from __future__ import annotations

import sys


def log(text: str) -> None:
    """Write a line at once. Words in it that somebody else chose are quoted by whoever calls this."""
    print(f"hpcctr-engine: {text}", file=sys.stderr, flush=True)
