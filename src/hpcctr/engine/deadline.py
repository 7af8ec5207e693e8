"""Work that may hang in the kernel, where no signal and no timeout reaches it: a mount on a file server that is silent.

Each piece gets a thread of its own, which is left behind when time is over.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence


def all_within(seconds: float, pieces: Sequence[Callable[[], None]]) -> list[bool]:
    """Do all of them at once; for each, whether it was done after ``seconds``. A piece may not raise."""
    threads = [threading.Thread(target=piece, name="hpcctr-piece", daemon=True) for piece in pieces]
    for thread in threads:
        thread.start()
    late = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, late - time.monotonic()))
    return [not thread.is_alive() for thread in threads]
