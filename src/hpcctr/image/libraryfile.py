"""One file of an image that ld.so may load: what is held of its content while it passes, and what it says of itself.

The content is a hostile image's. Reading it raises what it likes; whoever reads it takes that for nothing."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Literal

from hpcctr.host.elf import ElfFile
from hpcctr.image import mpilib
from hpcctr.image.mpilib import MpiWords, Pmi
from hpcctr.image.tree import Leaf

#: Symbol versions noted of one library.
DEFINES_MAX = 200
#: Characters of a SONAME or symbol version, and of a path; whatever has more is not noted.
NAME_MAX = 128
PATH_MAX = 512

_LIBRARY = re.compile(rb"lib.{1,200}\.so(?:\.[\w.+-]{1,100})?|ld-musl-\w{1,40}\.so\.1")


#: Program headers that are gone through; elf(5).
_HEADERS_MAX = 64
_PT_LOAD, _PF_X = 1, 1


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A library's own words, kept when its content has passed."""

    soname: str
    machine: str
    bits: int
    defines: tuple[str, ...]
    #: Of a libc; ``musl`` is None for every other library.
    glibc: str = ""
    musl: str | None = None
    mpi: MpiWords | None = None
    #: Of a plugin of Open MPI; None for every other library.
    plugin: frozenset[Pmi] | None = None
    pmix: str = ""
    is_pmix: bool = False


class Held(io.RawIOBase):
    """The beginning and the end of a file, read as if the rest were missing."""

    def __init__(self, head: bytes, tail: bytes, size: int) -> None:
        super().__init__()
        self.head = head
        self._tail = tail
        self._tail_at = size - len(tail)
        self._at = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """From the beginning, whatever ``whence``."""
        self._at = offset
        return offset

    def read(self, size: int = -1) -> bytes:
        """Fewer bytes at the end of what is held, and none between."""
        at, end = self._at, self._at + max(size, 0)
        tail_at = self._tail_at
        piece = self._tail[at - tail_at : end - tail_at] if at >= tail_at else self.head[at:end]
        self._at += len(piece)
        return piece


def is_library_name(name: bytes) -> bool:
    """Whether ldconfig would look at a file of that name."""
    return _LIBRARY.fullmatch(name) is not None


def data_of(content: bytes) -> bytes:
    """Of a library that was parsed before: what is loaded to be read and not to be executed, and so the texts in it.

    All of it where its linker put both together, as older ones do."""
    is_64 = content[4] == 2
    order: Literal["little", "big"] = "little" if content[5] == 1 else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(content[at : at + size], order)

    word = 8 if is_64 else 4
    table, size, count = number(24 + word, word), number(54 if is_64 else 42, 2), number(56 if is_64 else 44, 2)
    pieces: list[tuple[int, int]] = []
    for at in range(table, table + size * min(count, _HEADERS_MAX), max(size, 32)):
        if number(at, 4) != _PT_LOAD:
            continue
        if not number(at + (4 if is_64 else 24), 4) & _PF_X:
            offset = number(at + word, word)
            pieces.append((offset, offset + number(at + 4 * word, word)))
        elif not pieces:
            # The names come first, and nobody executes those.
            return content
    # What is copied is less than what is held, whatever the headers say.
    if sum(max(min(end, len(content)) - begin, 0) for begin, end in pieces) > len(content) // 2:
        return content
    return b"".join(content[begin:end] for begin, end in pieces)


def seen_in(leaf: Leaf, further: list[bytes], content: bytes, elf: ElfFile) -> Seen:
    """Everything in it that may matter. The content is not kept."""
    names = [leaf.name, *(path.rpartition(b"/")[2] for path in further)]
    is_pmix = any(map(mpilib.is_pmix_name, names))
    is_plugin = any(map(mpilib.is_plugin_name, names))
    mpi_name = next(filter(mpilib.is_mpi_name, names), None)
    if is_pmix or is_plugin or mpi_name is not None:
        content = data_of(content)
    if mpi_name is not None and elf.soname.startswith("libmpi_abi"):
        mpi_name = b"libmpi_abi.so"
    is_musl = any(name.startswith((b"libc.", b"ld-musl-")) for name in names)
    return Seen(
        soname=elf.soname if is_word(elf.soname) and "/" not in elf.soname else "",
        machine=elf.machine,
        bits=elf.bits,
        defines=tuple(name for name in elf.defines[:DEFINES_MAX] if is_word(name)),
        glibc=mpilib.glibc_version(content, elf) if elf.soname == "libc.so.6" else "",
        musl=mpilib.musl_version(content) if is_musl else None,
        mpi=None if mpi_name is None else mpilib.mpi_words(mpi_name, content, elf),
        plugin=mpilib.plugin_pmi(content, elf) if is_plugin else None,
        pmix=mpilib.pmix_version(content) if is_pmix or is_plugin else "",
        is_pmix=is_pmix,
    )


def is_word(text: str) -> bool:
    """Whether a name, a symbol version or a version may be noted as it is."""
    return 0 < len(text) <= NAME_MAX and text.isprintable()


def is_path(text: str) -> bool:
    """Whether that is a path that may be noted: absolute, plain and printable."""
    parts = text.split("/")
    return (
        1 < len(text) <= PATH_MAX
        and not parts[0]
        and not any(part in ("", ".", "..") for part in parts[1:])
        and text.isprintable()
    )


def path_of(leaf: Leaf) -> bytes:
    """The first of its names, without a slash before it."""
    assert leaf.parent is not None  # noqa: S101 - given to every leaf that is written
    return leaf.parent.path + b"/" + leaf.name if leaf.parent.path else leaf.name


def noted_path(path: bytes) -> str:
    """The path as it is noted; empty when it cannot be."""
    try:
        text = f"/{path.decode()}"
    except UnicodeDecodeError:
        return ""
    return text if is_path(text) else ""
