"""That this node uses an image, told to the store: a mark for each image this engine has mounted.

A mark is made before the image is mounted, with the rights of the store's owner and nobody else's; it goes with the
last mount. Where the node cannot write the store, nothing but the mark is missing. An image whose gate is closed is
being removed (:mod:`hpcctr.image.uses`): it is not mounted.

A launch whose image is mounted already asks nothing of the store here, and nothing here wakes up by itself.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Collection, Mapping

from hpcctr.engine.log import log
from hpcctr.errors import HpcctrError, ImageNotInStore
from hpcctr.image.shelves import as_owner
from hpcctr.image.stale import looked_up_again
from hpcctr.image.store import IMAGE_FILE
from hpcctr.image.uses import (
    GATE,
    Mark,
    image_directories,
    is_node_name,
    make_mark,
    marks,
    parts_of,
    remove_mark,
)

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Uses:
    """The marks of one engine. Every method may be called from any thread."""

    def __init__(self, store: str, *, engine: str) -> None:
        self._store = store
        self._engine = engine
        self._node = os.uname().nodename
        self._lock = threading.Lock()
        #: Mounts and the directory of their image, -1 where there is no mark, or it is not known yet.
        self._held: dict[str, int] = {}
        self._is_told = False

    def begin(self, mount: str, *, image: int, path: str) -> None:
        """Mark the image of the open file ``image``, which the store has in ``path``, before it is mounted.

        Raises :class:`ImageNotInStore` when the image is being removed.
        """
        if not path.startswith(f"{self._store}/") or not is_node_name(self._node):
            return
        # First, so that make_true lets it alone.
        self._hold(mount, -1)
        try:
            with as_owner(self._store):
                directory = looked_up_again(lambda: os.open(os.path.dirname(path), _DIRECTORY))
                try:
                    self._mark(mount, directory, image)
                except BaseException:
                    os.close(directory)
                    raise
        except FileNotFoundError:
            self._hold(mount, None)
            raise ImageNotInStore(f"{path} is being removed from the store", hint="hpcctr pull IMAGE") from None
        except (OSError, HpcctrError) as error:
            self._tell(error)
        else:
            self._hold(mount, directory)

    def end(self, mount: str) -> None:
        """The last mount has gone: so does its mark, as far as the store can be written."""
        with self._lock:
            directory = self._held.pop(mount, -1)
        if directory < 0:
            return
        try:
            with as_owner(self._store):
                remove_mark(directory, self._file(mount))
        except (OSError, HpcctrError) as error:
            self._tell(error)
        finally:
            os.close(directory)

    def adopt(self, mounts: Collection[str]) -> None:
        """Count mounts of an earlier engine as this one's."""
        with self._lock:
            for mount in mounts:
                self._held.setdefault(mount, -1)

    def make_true(
        self, mounts: Mapping[str, str], *, name: Callable[[int, str], str], is_gone: Callable[[str], bool]
    ) -> None:
        """Remove this node's marks of what is not mounted any more, by this engine or by engines of which ``is_gone``
        is true, and mark again what is: ``mounts`` are the adopted ones with the digest of their image, ``name`` is
        what a mount of an open file is called.

        For a thread of its own, as long as the file server takes.
        """
        if not is_node_name(self._node):
            return
        by_word: dict[str, list[str]] = {}
        for mount, digest in mounts.items():
            by_word.setdefault(digest.replace(":", "-"), []).append(mount)
        try:
            with as_owner(self._store):
                for part in parts_of(self._store):
                    for path in image_directories(part):
                        self._clear(path, is_gone)
                        word = os.path.basename(path)[: len("sha256-") + 64]
                        for mount in by_word.get(word, ()):
                            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                                self._mark_again(mount, path, word.replace("-", ":"), name)
        except (OSError, HpcctrError) as error:
            self._tell(error)

    # as the store's owner

    def _mark(self, mount: str, directory: int, image: int) -> None:
        # The directory may have got another image since the file was opened.
        if not os.path.samestat(os.fstat(image), os.stat(IMAGE_FILE, dir_fd=directory, follow_symlinks=False)):
            raise FileNotFoundError
        make_mark(directory, self._file(mount))

    def _clear(self, directory: str, is_gone: Callable[[str], bool]) -> None:
        for mark in marks(directory):
            if mark.node != self._node or (mark.engine != self._engine and not is_gone(mark.engine)):
                continue
            # Under the lock: who begins to use it now marks it afterwards.
            with self._lock, contextlib.suppress(FileNotFoundError):
                if mark.engine != self._engine or mark.mount not in self._held:
                    os.unlink(f"{directory}/{GATE}/{mark.file}")

    def _mark_again(self, mount: str, path: str, digest: str, name: Callable[[int, str], str]) -> None:
        directory = os.open(path, _DIRECTORY)
        try:
            image = os.open(IMAGE_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
            try:
                if name(image, digest) != mount:
                    return
            finally:
                os.close(image)
            # Under the lock: its last mount may go meanwhile.
            with self._lock:
                if self._held.get(mount) == -1:
                    make_mark(directory, self._file(mount))
                    self._held[mount], directory = directory, -1
        finally:
            if directory >= 0:
                os.close(directory)

    # inside

    def _file(self, mount: str) -> str:
        return Mark.file_of(self._node, self._engine, mount)

    def _hold(self, mount: str, directory: int | None) -> None:
        with self._lock:
            earlier = self._held.pop(mount, -1)
            if directory is not None:
                self._held[mount] = directory
        if earlier >= 0:
            os.close(earlier)

    def _tell(self, error: OSError | HpcctrError) -> None:
        """Once in an engine's life: a store that cannot be written from here will stay so."""
        if self._is_told:
            return
        self._is_told = True
        reason = error.message if isinstance(error, HpcctrError) else error.strerror or str(error)
        log(f"uses of images are not marked in the store: {reason}; hpcctr doctor")
