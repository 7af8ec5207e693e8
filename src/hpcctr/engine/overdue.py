"""Answers for sessions that are stuck: in a call that has no time limit, as on a file server that is silent.

The session's thread stays where it is and counts as its user's. Its caller is told what the engine waits for, and hung
up on, by a thread that sleeps while nothing is watched.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable

from hpcctr.engine.log import log
from hpcctr.errors import HpcctrError
from hpcctr.wire import Frame

#: Seconds between two looks.
_LOOK_SECONDS = 2.0


class Watched:
    """One caller who waits. ``peer`` must be in non-blocking mode, which a socket with a timeout is."""

    def __init__(self, peer: socket.socket, seconds: float, error: Callable[[], HpcctrError]) -> None:
        self.peer = peer
        self.at = time.monotonic() + seconds
        self.error = error
        self.is_answered = False


class Overdue:
    """Everybody who waits. Methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: set[Watched] = set()
        self._something = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, peer: socket.socket, seconds: float, error: Callable[[], HpcctrError]) -> Watched:
        """From now on: once ``seconds`` have passed the caller gets ``error``. Ends with :meth:`end`."""
        watched = Watched(peer, seconds, error)
        with self._lock:
            self._watched.add(watched)
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, name="overdue", daemon=True)
                self._thread.start()
        self._something.set()
        return watched

    def end(self, watched: Watched) -> bool:
        """The session goes on, or is over; False when its caller has been answered and hung up on."""
        with self._lock:
            self._watched.discard(watched)
            return not watched.is_answered

    def _look(self) -> None:
        while True:
            self._something.wait()
            # In steps, not at the moment: a session that begins then wakes nobody.
            time.sleep(_LOOK_SECONDS)
            now = time.monotonic()
            with self._lock:
                # Under the lock: the session closes its socket only after end().
                for watched in [one for one in self._watched if one.at <= now]:
                    self._watched.discard(watched)
                    _answer(watched)
                if not self._watched:
                    self._something.clear()


def _answer(watched: Watched) -> None:
    watched.is_answered = True
    error = watched.error()
    log(f"overdue slug={error.slug} reason={error.message!r}")
    # Gone, or does not read: then there is nobody to tell.
    with contextlib.suppress(OSError):
        os.write(watched.peer.fileno(), Frame.of_error(error).pack())
    with contextlib.suppress(OSError):
        watched.peer.shutdown(socket.SHUT_RDWR)
