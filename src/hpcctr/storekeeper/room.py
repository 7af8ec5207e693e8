"""What a user's own images may still take in the store.

Counted by what lies in the user's part, so that any number of storekeepers on any number of nodes keep to one limit
without asking each other: the image files, those that are leaving as well, with the archives that are coming in while
one is received, and with the image files that are being written before one of them is published. A client of a shared
filesystem may know a file's size as it was a minute ago (nfs(5), acregmax): that much more than the limit it can be.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Literal

from hpcctr.errors import StoreUnusable
from hpcctr.image.imagefile import store_unusable
from hpcctr.image.quota import bytes_of
from hpcctr.image.store import IMAGE_FILE

ARCHIVE = "archive"
#: Bytes received between two looks at what others have received.
LOOK_EVERY = 16 << 20

Growing = Literal["archives", "images"]
_NAMES: dict[Growing, tuple[str, ...]] = {
    "archives": (ARCHIVE,),
    "images": (IMAGE_FILE, f"publish/{IMAGE_FILE}"),
}


@dataclass(frozen=True, kw_only=True)
class Room:
    """The room of one user; ``part`` is their part of the store, ``limit`` is in bytes."""

    part: str
    limit: int

    def left(self, growing: Growing) -> int:
        """Bytes that are left, may be negative. Raises :class:`StoreUnusable`."""
        # First what grows: an image published meanwhile is counted twice rather than never.
        return self.limit - self._growing(growing) - bytes_of(self.part)

    def require(self, growing: Growing) -> None:
        """Raise :class:`StoreUnusable` when there is more than there may be."""
        if self.left(growing) < 0:
            raise StoreUnusable(
                f"{growing} of yours would take more than the {self.limit} bytes they may take in the store",
                hint="hpcctr images --mine; hpcctr rm IMAGE; the limit is [limits] bytes-per-uid of site.toml",
            )

    def _growing(self, growing: Growing) -> int:
        total = 0
        top = os.path.join(self.part, "tmp")
        try:
            workspaces = [name for name in os.listdir(top) if name.startswith("pull-")]
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise store_unusable(top, error) from None
        for workspace in workspaces:
            for name in _NAMES[growing]:
                with contextlib.suppress(OSError):
                    total += os.lstat(f"{top}/{workspace}/{name}").st_size
        return total
