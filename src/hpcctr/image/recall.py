"""Small files of the store, read once for all ranks of a node that start together.

Opening a file makes a network filesystem ask its server (close-to-open, nfs(5)); looking at one is answered from the
node's attributes. So what was read a moment ago is taken again while the file looks the same: what this node has
changed is seen at once, and what another has changed after :data:`FRESH_SECONDS` at the latest. What cannot come to
mean anything else, as the record of an image, is taken again for :data:`SETTLED_SECONDS`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

#: The ranks of a node start within this of each other; nobody pulls a name anew and runs it elsewhere faster.
FRESH_SECONDS = 1.0
#: As long as clients of a file server trust a file's attributes at most (nfs(5), acregmax), and the ranks of a large
#: job take to start.
SETTLED_SECONDS = 60.0
#: Records kept, and the bytes of the largest that is.
_FILES = 256
_SIZE_MAX = 1 << 20

_Identity = tuple[int, ...]


class Recall:
    """What was read of some files, with when. Several threads may use one: of those that want a file at once, one reads
    it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[_Identity, float, bytes]] = OrderedDict()
        #: Files that are being read, and how many threads want each.
        self._turns: dict[str, tuple[threading.Lock, int]] = {}

    def read(self, path: str, limit: int, *, owner: Callable[[], int] | None = None, is_settled: bool = False) -> bytes:
        """The first ``limit`` bytes of a regular file; ``is_settled`` when what it says is never changed. Raises
        OSError as open does, IsADirectoryError for anything that is no regular file, and PermissionError with errno
        EPERM for one that others than root and ``owner`` (None: whoever) could have written.
        """
        fresh = SETTLED_SECONDS if is_settled else FRESH_SECONDS
        content = self._kept_of(path, fresh)
        if content is None:
            with self._turn(path):
                content = self._kept_of(path, fresh)
                if content is None:
                    content = self._read(path, limit, owner)
        return content

    def _kept_of(self, path: str, fresh: float) -> bytes | None:
        with self._lock:
            kept = self._kept.get(path)
        if kept is None or time.monotonic() - kept[1] >= fresh or _identity(os.lstat(path)) != kept[0]:
            return None
        return kept[2]

    def _read(self, path: str, limit: int, owner: Callable[[], int] | None) -> bytes:
        now = time.monotonic()
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise IsADirectoryError(path)
            if owner is not None and (
                status.st_uid not in (0, owner()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            ):
                raise PermissionError(errno.EPERM, "others than the store's owner can write it", path)
            content = b""
            while len(content) < limit and (more := file.read(limit - len(content))):
                content += more
        with self._lock:
            self._kept.pop(path, None)
            if len(content) <= _SIZE_MAX:
                self._kept[path] = (_identity(status), now, content)
            while len(self._kept) > _FILES:
                self._kept.popitem(last=False)
        return content

    @contextlib.contextmanager
    def _turn(self, path: str) -> Iterator[None]:
        with self._lock:
            turn, wanted = self._turns.get(path) or (threading.Lock(), 0)
            self._turns[path] = (turn, wanted + 1)
        try:
            with turn:
                yield
        finally:
            with self._lock:
                turn, wanted = self._turns.pop(path)
                if wanted > 1:
                    self._turns[path] = (turn, wanted - 1)


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size, status.st_uid, status.st_mode
