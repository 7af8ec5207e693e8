"""What NFS and GlusterFS say when another node changes a name that is being used here: ESTALE.

A file that is replaced by rename while it is opened or read, a directory that several nodes make at once: looked up
again the name leads to what is there now, once what the kernel remembers of it has expired (a second over FUSE)."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

#: Seconds between the attempts; together more than what fuse.glusterfs(8) and nfs(5) remember a name by default.
_PAUSES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)


def looked_up_again(call: Callable[[], T]) -> T:
    """What ``call`` returns, which looks its names up itself and may be done again. Raises OSError as it does."""
    for pause in _PAUSES:
        try:
            return call()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        time.sleep(pause)
    return call()
