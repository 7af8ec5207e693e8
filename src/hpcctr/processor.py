"""The processor of this node, in OCI's word for it. Imports next to nothing: part of launches."""

from __future__ import annotations

import os
import sys


def machine() -> str:
    """GOARCH: ``amd64``, ``arm64``, …

    Python's own where it says: uname(2) tells a caller with the personality linux32 (setarch) another.
    """
    name = getattr(sys.implementation, "_multiarch", "").partition("-")[0] or os.uname().machine
    return {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}.get(name, name)
