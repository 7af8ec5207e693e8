"""What was worked out about files of the node, kept while those files are what they were.

All ranks of a node ask for the same within a moment, and some features read a hundred files. A look at each (stat)
says whether anything has changed: device, inode, size, owner, mode, and both times. What no look at known files can
tell, as a device that appears, is seen within :data:`SECONDS`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

Value = TypeVar("Value")

#: A value is worked out anew after so long, whatever its files are.
SECONDS = 5.0
#: Values kept, and so many callers that wait for one another at most.
_VALUES_MAX = 256

Look = tuple[tuple[int, ...], ...]


class Kept(Generic[Value]):
    """Values by key. Of those who ask for one at once, one works it out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[Hashable, tuple[float, tuple[str, ...], Look, Value]] = {}
        self._making: dict[Hashable, threading.Lock] = {}

    def get(self, key: Hashable, make: Callable[[], tuple[Value, Iterable[str]]]) -> Value:
        """The value of ``key``: as it was, or made; ``make`` gives it with the paths it was made of.

        Whatever ``make`` raises is raised, and nothing is kept.
        """
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        try:
            with making:
                return self._get(key, make)
        finally:
            with self._lock:
                # Who waits has it already; who comes later makes another, and finds the value.
                self._making.pop(key, None)

    def _get(self, key: Hashable, make: Callable[[], tuple[Value, Iterable[str]]]) -> Value:
        with self._lock:
            known = self._values.get(key)
        now = time.monotonic()
        if known is not None and now < known[0] and looked_at(known[1]) == known[2]:
            return known[3]
        value, made_of = make()
        paths = tuple(dict.fromkeys(made_of))
        with self._lock:
            self._values.pop(key, None)
            self._values[key] = (now + SECONDS, paths, looked_at(paths), value)
            while len(self._values) > _VALUES_MAX:
                del self._values[next(iter(self._values))]
        return value


def looked_at(paths: Iterable[str]) -> Look:
    """What each path is now; nothing for one that is not there."""
    return tuple(map(_status, paths))


def with_entries(directories: Iterable[str]) -> list[str]:
    """Directories and the files in them."""
    paths = []
    for directory in directories:
        paths.append(directory)
        try:
            paths += sorted(os.path.join(directory, name) for name in os.listdir(directory))
        except OSError:
            continue
    return paths


def _status(path: str) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return (
        status.st_dev,
        status.st_ino,
        status.st_mode,
        status.st_uid,
        status.st_rdev,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
