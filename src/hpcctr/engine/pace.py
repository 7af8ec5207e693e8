"""How fast one user may have things done: so many a second, and so many at once before that counts.

Nobody is refused for being fast. Who is faster than the site wants is made to wait, and only they wait.
"""

from __future__ import annotations

import threading

#: Users remembered before those are forgotten who have not been fast of late.
_REMEMBERED = 1024


class Pace:
    """One kind of work, of all users. Methods may be called from any thread."""

    def __init__(self, *, burst: int) -> None:
        self._burst = burst
        self._lock = threading.Lock()
        #: When all that a user has had would have been due, one after the other: time.monotonic() seconds.
        self._due: dict[int, float] = {}

    def delay(self, uid: int, *, per_second: float, now: float) -> float:
        """Seconds until ``uid`` may have another one, which is counted; 0.0 at once.

        The arithmetic of the virtual scheduling algorithm (ITU-T I.371, annex A), with one number for each user.
        """
        interval = 1.0 / per_second
        with self._lock:
            due = max(self._due.get(uid, now), now)
            if uid not in self._due and len(self._due) >= _REMEMBERED:
                self._due = {other: then for other, then in self._due.items() if then > now}
            self._due[uid] = due + interval
        return max(0.0, due - now - interval * (self._burst - 1))
