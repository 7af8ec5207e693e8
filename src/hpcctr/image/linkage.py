"""What a program of an image meets when it is loaded, gathered while the image's contents pass.

They pass once, while the image file is written. The files that matter are known by their names before they pass, and
what is needed of each is kept as it passes; the tree then tells which of them ld.so would find
(:mod:`hpcctr.image.ldsearch`). Everything here is a hostile image's: files and numbers have bounds, and nothing an
image holds makes this fail, only know less."""

from __future__ import annotations

import io
import re
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import BinaryIO, cast

from hpcctr.host.elf import ElfFile, NotElf, parse
from hpcctr.image import mpilib
from hpcctr.image.ldsearch import Passed, Search
from hpcctr.image.libraryfile import Held, is_library_name, path_of, seen_in
from hpcctr.image.record import ImageFacts
from hpcctr.image.tarstream import ByteStream
from hpcctr.image.tree import Leaf, Tree

#: Bytes that are held of a file while it is looked at, of its beginning and of its end: names are at the one, the
#: dynamic segment at the other. What is between passes by. One file is held at a time. In an MPI library more is looked
#: for than names.
HEAD_MAX = 16 << 20
MPI_HEAD_MAX = 64 << 20
TAIL_MAX = 8 << 20
#: Files looked at, symbol versions kept of all, and files that begin as ELF files do and are none: an image has a few.
_FILES_MAX = 16384
_DEFINES_OF_ALL_MAX = 1 << 16
_BROKEN_MAX = 256
#: Bytes of a file that tells directories, and of all of them.
_SEARCH_SIZE_MAX = 1 << 14
_SEARCH_SIZE_OF_ALL_MAX = 1 << 20
#: Names of one file that matter.
_NAMES_MAX = 40
#: A file of as many bytes is taken at once.
_SMALL = 1 << 20

_SEARCH = re.compile(rb"etc/(?:.{0,200}/)?[^/]{1,200}\.conf|etc/ld-musl-\w{1,40}\.path", re.DOTALL)


@dataclass(kw_only=True)
class _Left:
    """What may still be taken in."""

    files: int = _FILES_MAX
    defines: int = _DEFINES_OF_ALL_MAX
    broken: int = _BROKEN_MAX
    search: int = _SEARCH_SIZE_OF_ALL_MAX


@dataclass(kw_only=True)
class Linkage:
    """Of one image, gathered while its contents pass."""

    _passed: Passed = field(default_factory=Passed)
    _left: _Left = field(default_factory=_Left)

    def add_name(self, path: bytes, leaf: Leaf) -> None:
        """A further name of a file."""
        if is_library_name(path.rpartition(b"/")[2]) and len(self._passed.linked) < _FILES_MAX:
            names = self._passed.linked.setdefault(id(leaf), [])
            if len(names) < _NAMES_MAX:
                names.append(path)

    def wants(self, leaf: Leaf) -> bool:
        """Whether its content is to be looked at."""
        name = leaf.name
        if b".so" in name and name[:1] == b"l" and is_library_name(name):
            return self._left.files > 0
        if name.startswith(b"mca_") and mpilib.is_plugin_name(name):
            return self._left.files > 0
        if name.endswith((b".conf", b".path")):
            return (
                leaf.size <= min(_SEARCH_SIZE_MAX, self._left.search) and _SEARCH.fullmatch(path_of(leaf)) is not None
            )
        return bool(self._passed.linked) and id(leaf) in self._passed.linked and self._left.files > 0

    def copy(self, leaf: Leaf, stream: ByteStream, write: Callable[[bytes], object]) -> bool:
        """Hand a file's content on, and look at it. Whether there was as much as there should be."""
        if leaf.size <= _SMALL:
            content = stream.take(leaf.size)
            write(content)
            is_whole, held = len(content) == leaf.size, Held(content, b"", leaf.size)
        else:
            names = (leaf.name, *self._passed.linked.get(id(leaf), ()))
            is_mpi = any(name.rpartition(b"/")[2].startswith((b"libmp", b"libpm", b"libop")) for name in names)
            is_whole, held = _copy(stream, leaf.size, MPI_HEAD_MAX if is_mpi else HEAD_MAX, write)
        if is_whole:
            # Of a hostile file nothing is known, whatever it does to those that read it.
            with suppress(Exception):
                self._look(leaf, held)
        return is_whole

    def facts(self, tree: Tree) -> ImageFacts | None:
        """All of it, once everything has passed; None where the tree cannot be followed."""
        try:
            return Search(self._passed, tree).facts()
        except Exception:  # noqa: BLE001 - what an image holds never ends its conversion
            return None

    def _look(self, leaf: Leaf, held: Held) -> None:
        content = held.head
        if leaf.name.endswith((b".conf", b".path")):
            self._left.search -= len(content)
            self._passed.search[id(leaf)] = content
            return
        self._left.files -= 1
        self._passed.leaves.append(leaf)
        if content[:4] != b"\x7fELF" or self._left.broken <= 0 or self._left.defines <= 0:
            return
        elf: ElfFile | None = None
        try:
            elf = parse(cast(BinaryIO, held))
        except NotElf:
            self._left.broken -= 1
        # Its libc is a program as well, and has neither a name nor versions where it is Debian's.
        is_musl = leaf.name.startswith((b"libc.", b"ld-musl-")) and mpilib.musl_version(content) is not None
        if elf is not None and (elf.soname or elf.needed or elf.defines or is_musl):
            if elf.is_shared or is_musl:
                self._left.defines -= len(elf.defines)
                self._passed.seen[id(leaf)] = seen_in(leaf, self._passed.linked.get(id(leaf), []), content, elf)
        elif leaf.size > len(content):
            # What it is called lies where nothing was held.
            self._passed.seen[id(leaf)] = None


def _copy(stream: ByteStream, size: int, most: int, write: Callable[[bytes], object]) -> tuple[bool, Held]:
    """Hand a large file's content on and hold what is to be looked at."""
    head = io.BytesIO()
    tail: deque[bytes] = deque()
    in_tail = 0

    def take(piece: bytes) -> None:
        head.write(piece)
        write(piece)

    def pass_by(piece: bytes) -> None:
        nonlocal in_tail
        tail.append(piece)
        in_tail += len(piece)
        while in_tail - len(tail[0]) >= TAIL_MAX:
            in_tail -= len(tail.popleft())
        write(piece)

    first = min(size, most)
    is_whole = stream.copy(first, take) and stream.copy(size - first, pass_by)
    return is_whole, Held(head.getvalue(), b"".join(tail), size)
