"""Names in a container before there is one: the image below its upper layer, and what a path there leads to.

The image is hostile. A symbolic link of its own is only ever text here, and is followed below the root of both layers
by what their entries are; the kernel follows none (:func:`hpcctr.engine.mounts.open_beneath`). Nobody but the engine
changes either layer meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Literal

from hpcctr.engine.mounts import open_beneath

#: Symbolic links on one path, as the kernel has it (path_resolution(7)).
LINKS_MAX = 40
#: A tree of mount points deeper than this is no directory of anybody's, but work for the engine.
DEPTH_MAX = 64
#: What makes a name invisible when it is in a layer (Documentation/filesystems/overlayfs.rst, "whiteouts").
_WHITEOUT = 0
#: Nothing is there: no such name, a file or a link on the way, which a directory of the upper layer hides.
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)

Names = tuple[bytes, ...]


class PathLost(Exception):
    """A path leads nowhere; the text says why, for a sentence that begins with the path."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a name is in a container."""

    #: Directory, symbolic link, anything else.
    kind: Literal["d", "l", "f"]
    #: Of a link.
    text: bytes
    #: Permission bits.
    mode: int


@dataclass(kw_only=True)
class Union:
    """Image and upper layer as one tree; both are descriptors of directories."""

    image: int
    upper: int
    #: Directories whose names have been followed already, by the names they were asked by.
    _known: dict[Names, Names] = field(default_factory=dict)

    def look(self, names: Names) -> Found | None:
        """What ``names`` is, whose parents are directories. Raises OSError for a layer that cannot be read."""
        if not names:
            return Found(kind="d", text=b"", mode=0o755)
        return self._look_in(self.upper, names) or self._look_in(self.image, names)

    def follow(self, path: bytes, *, mounted: Collection[Names] = ()) -> tuple[Names, Names]:
        """Where the last name of ``path`` is: its place, and what of it lies in one of the ``mounted`` directories.

        Links on the way are followed, a link at the end is not. Without such a directory the second is empty. Raises
        :class:`PathLost`, and OSError as :meth:`look`.
        """
        *parents, last = (name for name in path.split(b"/") if name)
        asked = tuple(parents)
        if asked in self._known:
            return (*self._known[asked], last), ()
        here: list[bytes] = []
        waiting, links = list(parents), 0
        while True:
            if tuple(here) in mounted:
                return tuple(here), (*waiting, last)
            if not waiting:
                break
            name = waiting.pop(0)
            if name == b"..":
                del here[-1:]
                continue
            found = self.look((*here, name))
            if found is not None and found.kind == "l":
                links += 1
                if links > LINKS_MAX:
                    raise PathLost(f"{shown(name)} is the last of more than {LINKS_MAX} symbolic links in the image")
                if found.text.startswith(b"/"):
                    here = []
                waiting[:0] = [part for part in found.text.split(b"/") if part not in (b"", b".")]
                continue
            here.append(name)
            if found is not None and found.kind == "f":
                raise PathLost(f"{shown(b'/' + b'/'.join(here))} is a file in the image")
            if len(here) >= DEPTH_MAX:
                raise PathLost(f"it leads more than {DEPTH_MAX} directories deep")
        self._known[asked] = tuple(here)
        return (*here, last), ()

    def forget(self) -> None:
        """The upper layer has got links, or directories have been mounted, since paths were followed."""
        self._known.clear()

    def make_parents(self, names: Names) -> None:
        """Make the directories above ``names`` in the upper layer, with the image's modes. Raises OSError."""
        missing = len(names) - 1
        while missing > 0 and self._look_in(self.upper, names[:missing]) is None:
            missing -= 1
        for depth in range(missing + 1, len(names)):
            found = self._look_in(self.image, names[:depth])
            self.make_directory(names[:depth], found.mode if found is not None and found.kind == "d" else 0o755)

    def make_directory(self, names: Names, mode: int) -> None:
        """One directory in the upper layer. Raises OSError."""
        with self._parent(names) as parent:
            os.mkdir(names[-1], 0o700, dir_fd=parent)
            # Sticky stays; set-user-ID and set-group-ID have no place on a directory of root's.
            os.chmod(names[-1], mode & 0o1777, dir_fd=parent)

    def write(self, names: Names, content: bytes) -> None:
        """A file in the upper layer, readable by everybody, in place of a file or link there. Raises OSError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with (
            self._cleared(names) as parent,
            open(os.open(names[-1], flags, 0o600, dir_fd=parent), "wb") as file,
        ):
            file.write(content)
            os.fchmod(file.fileno(), 0o644)

    def link(self, names: Names, text: bytes) -> None:
        """A symbolic link in the upper layer, in place of a file or link there. Raises OSError."""
        with self._cleared(names) as parent:
            os.symlink(text, names[-1], dir_fd=parent)

    def clear(self, names: Names) -> None:
        """Remove a file or link of the upper layer's; what is not there is fine. Raises OSError."""
        with self._cleared(names):
            pass

    @contextlib.contextmanager
    def _cleared(self, names: Names) -> Iterator[int]:
        with self._parent(names) as parent:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(names[-1], dir_fd=parent)
            yield parent

    @contextlib.contextmanager
    def _parent(self, names: Names) -> Iterator[int]:
        way = open_beneath(self.upper, b"/".join(names[:-1]) or b".")
        try:
            yield way
        finally:
            os.close(way)

    @staticmethod
    def _look_in(layer: int, names: Names) -> Found | None:
        try:
            descriptor = open_beneath(layer, b"/".join(names), is_link_opened=True)
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise
        try:
            status = os.fstat(descriptor)
            if stat.S_ISCHR(status.st_mode) and status.st_rdev == _WHITEOUT:
                return None
            if stat.S_ISLNK(status.st_mode):
                text = os.readlink(b"", dir_fd=descriptor)
                return Found(kind="l", text=text, mode=0o777)
            return Found(kind="d" if stat.S_ISDIR(status.st_mode) else "f", text=b"", mode=stat.S_IMODE(status.st_mode))
        finally:
            os.close(descriptor)


def shown(untrusted_name: bytes) -> str:
    """A name of an image in an error message."""
    return ascii(os.fsdecode(untrusted_name[:200]))[1:-1]
