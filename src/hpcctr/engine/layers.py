"""Upper layers that outlive their containers: how many a user may hold, and how the engine learns that one has gone.

A program in the background, a descriptor, or a mount namespace of a user's making keeps the overlay it came from, and
that keeps the tmpfs of its upper layer, after the engine has removed the container. No mount table shows such a tmpfs
any more. The kernel tells of its end: a watch of inotify(7) keeps no filesystem, and hears IN_UNMOUNT when it goes.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
import threading
import time
import weakref
from dataclasses import dataclass

from hpcctr.errors import EngineBusy

#: Layers of removed containers that one uid may hold, beside those of its containers.
HELD_MAX = 32
#: Seconds a build waits for a layer that is just going.
_PATIENCE = 2.0
#: Seconds between looks: another thread may have read the event this one waits for.
_PAUSE = 0.1
#: linux/inotify.h.
_IN_UNMOUNT = 0x2000
_IN_IGNORED = 0x8000
_IN_ONLYDIR = 0x01000000
_EVENT = struct.Struct("iIII")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.inotify_add_watch.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32]


@dataclass(kw_only=True)
class _Layer:
    uid: int
    watch: int
    #: Its container has been removed.
    is_left: bool = False


class Layers:
    """The upper layers that exist since this engine began, by user; every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._layers: dict[str, _Layer] = {}
        #: Made with the first layer: a uid has few of them (inotify(7), max_user_instances).
        self._inotify: int | None = None

    def watch(self, container_id: str, *, uid: int, directory: str) -> None:
        """Count the filesystem mounted on ``directory`` as a layer of ``uid``'s until it is gone. Raises OSError.

        Root's are not counted: every engine of root's own has one.
        """
        if uid == 0:
            return
        with self._lock:
            if self._inotify is None:
                made: int = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
                if made < 0:
                    _raise("inotify")
                self._inotify = made
                weakref.finalize(self, os.close, made)
            number = _libc.inotify_add_watch(self._inotify, os.fsencode(directory), _IN_UNMOUNT | _IN_ONLYDIR)
            if number < 0:
                _raise(directory)
            self._layers[container_id] = _Layer(uid=uid, watch=number)

    def leave(self, container_id: str) -> None:
        """The container has been removed: its layer is held by nobody but its user. Unknown ones are fine."""
        with self._lock:
            layer = self._layers.get(container_id)
            if layer is not None:
                layer.is_left = True

    def held(self, uid: int) -> int:
        """Layers of removed containers that something of ``uid``'s keeps."""
        with self._lock:
            self._hear()
            return sum(layer.uid == uid and layer.is_left for layer in self._layers.values())

    def require_room(self, uid: int) -> None:
        """Raise :class:`EngineBusy` while ``uid`` holds :data:`HELD_MAX` layers of removed containers."""
        late = time.monotonic() + _PATIENCE
        while self.held(uid) >= HELD_MAX:
            if time.monotonic() >= late:
                raise EngineBusy(
                    f"programs of uid {uid} hold {HELD_MAX} node containers that have been removed",
                    hint="end programs left in the background (hpcctr ps), or use the same image and -v targets in all",
                )
            self._wait()

    def _wait(self) -> None:
        poll = select.poll()
        if self._inotify is not None:
            poll.register(self._inotify, select.POLLIN)
        poll.poll(_PAUSE * 1000)

    def _hear(self) -> None:
        """Under the lock: forget the layers that are gone."""
        gone: set[int] = set()
        if self._inotify is None:
            return
        while True:
            try:
                events = os.read(self._inotify, 4096)
            except BlockingIOError:
                break
            at = 0
            while at < len(events):
                number, mask, _, length = _EVENT.unpack_from(events, at)
                at += _EVENT.size + length
                if mask & (_IN_UNMOUNT | _IN_IGNORED):
                    gone.add(number)
        if gone:
            self._layers = {name: layer for name, layer in self._layers.items() if layer.watch not in gone}


def _raise(path: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), path)
