"""Small files of the store, read once for all ranks of a node that start together.

Opening a file makes a network filesystem ask its server (close-to-open, nfs(5)); looking at one is answered from the
node's attributes. So what was read a moment ago is taken again while the file looks the same: what this node has
changed is seen at once, and what another has changed after :data:`FRESH_SECONDS` at the latest. What cannot come to
mean anything else, as the record of an image, is taken again for :data:`SETTLED_SECONDS`.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections import OrderedDict

#: The ranks of a node start within this of each other; nobody pulls a name anew and runs it elsewhere faster.
FRESH_SECONDS = 1.0
#: As long as clients of a file server trust a file's attributes at most (nfs(5), acregmax), and the ranks of a large
#: job take to start.
SETTLED_SECONDS = 60.0
#: Records kept, and the bytes of the largest that is.
_FILES = 256
_SIZE_MAX = 1 << 20

_Identity = tuple[int, int, int, int]


class Recall:
    """What was read of some files, with when. Several threads may use one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[_Identity, float, bytes]] = OrderedDict()

    def read(self, path: str, limit: int, *, is_settled: bool = False) -> bytes:
        """The first ``limit`` bytes of a regular file; ``is_settled`` when what it says is never changed. Raises
        OSError as open does, and IsADirectoryError for anything that is no regular file.
        """
        fresh = SETTLED_SECONDS if is_settled else FRESH_SECONDS
        now = time.monotonic()
        with self._lock:
            kept = self._kept.get(path)
        if kept is not None and now - kept[1] < fresh and _identity(os.lstat(path)) == kept[0]:
            return kept[2]
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise IsADirectoryError(path)
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


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
