"""What the dynamic loader reads of an ELF file: what it is called, what it needs, which symbol versions it has.

Only program headers and the dynamic segment are looked at, as ld.so itself does: section headers may be stripped or
lie. The bytes may be anybody's (an image's, read while it is converted): every count and length has a bound, and
whatever is not well-formed is :class:`NotElf`. It is part of launches: pyelftools takes three times as long for a file.

Formats: elf(5); the System V gABI, chapters 4 and 5; symbol versions by the Linux Standard Base, "Symbol Versioning".
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO

#: Program headers, bytes of dynamic entries and of symbol versions: libraries have some dozen of each, and the most
#: versions, libc's, are 3 KiB.
_HEADERS_MAX = 512
_DYNAMIC_MAX = 64 * 1024
_VERSIONS_BYTES_MAX = 64 * 1024
_VERSIONS_MAX = 4096
_NEEDED_MAX = 1024
#: Bytes of a name; and of a search path, which some package managers fill with hundreds of directories.
_NAME_MAX = 1024
_PATH_MAX = 64 * 1024
#: Bytes of all strings of one file.
_STRINGS_MAX = 1024 * 1024
_READ = 512
_FILE_MAX = 1 << 40

_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_ET_EXEC, _ET_DYN = 2, 3
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_STRSZ, _DT_SONAME, _DT_RPATH, _DT_RUNPATH = 0, 1, 5, 10, 14, 15, 29
_DT_FLAGS_1, _DT_VERDEF, _DT_VERDEFNUM, _DT_VERNEED, _DT_VERNEEDNUM = (
    0x6FFFFFFB, 0x6FFFFFFC, 0x6FFFFFFD, 0x6FFFFFFE, 0x6FFFFFFF,
)  # fmt: skip
_DF_1_PIE = 0x08000000
_VER_FLG_BASE, _VER_FLG_WEAK = 1, 2

#: e_machine, in uname(2)'s words where it has one.
_MACHINES = {
    3: "i386", 8: "mips", 20: "ppc", 21: "ppc64", 22: "s390x", 40: "arm", 43: "sparc64", 62: "x86_64", 183: "aarch64",
    243: "riscv", 258: "loongarch",
}  # fmt: skip


class NotElf(ValueError):
    """Not an ELF file, or not one that a loader would take."""


@dataclass(frozen=True, kw_only=True)
class ElfFile:
    """One program or library, in the loader's words."""

    #: DT_SONAME; empty where it has none.
    soname: str
    #: DT_NEEDED, in order: SONAMEs, or paths.
    needed: tuple[str, ...]
    #: Directories of DT_RUNPATH, or of DT_RPATH where there is no other; ``$ORIGIN`` and the like as they are written.
    runpath: tuple[str, ...]
    #: They are DT_RPATH's: they also count for what this file's libraries need (ld.so(8)).
    is_rpath: bool
    #: DT_VERNEED: the library, and the versions it must define. Weak ones, which may be missing, are left out.
    needs: tuple[tuple[str, tuple[str, ...]], ...]
    #: DT_VERDEF: the versions this file defines, without the base, which is its own name.
    defines: tuple[str, ...]
    #: ``x86_64``, ``aarch64``, …; ``em-NUMBER`` for one that is not known here.
    machine: str
    #: 32 or 64.
    bits: int
    #: PT_INTERP; empty for most libraries and for static programs.
    interpreter: str
    #: A library, as far as it says: no program, position-independent or not.
    is_shared: bool


def parse(file: BinaryIO) -> ElfFile:
    """What a seekable file is. Raises :class:`NotElf`; :class:`OSError` only where the file cannot be read."""
    try:
        return _Reading(file).whole()
    except struct.error as error:
        raise NotElf(str(error)) from None


def read(path: str) -> ElfFile:
    """The file at ``path``, as it was parsed last if it has not changed since. Raises :class:`OSError`,
    :class:`NotElf`.
    """
    # Looked at first: opening a device can do something. Looked at again once it is open: that file is read.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise NotElf("not a regular file")
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise NotElf("not a regular file")
        identity = (path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        with _known_lock:
            known = _known.get(identity)
        if known is None:
            try:
                known = parse(file)
            except NotElf as error:
                known = str(error)
            with _known_lock:
                while len(_known) >= _KNOWN_MAX:
                    _known.pop(next(iter(_known)))
                _known[identity] = known
    if isinstance(known, str):
        raise NotElf(known)
    return known


#: Of a node: libraries of its features, and what they need.
_KNOWN_MAX = 4096
#: By path, device, inode, size, and both times in nanoseconds; a text says why it is no ELF file.
_known: dict[tuple[str, int, int, int, int, int], ElfFile | str] = {}
_known_lock = threading.Lock()


class _Reading:
    """One file, and how its addresses lie in it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._string_bytes = 0
        self._strings_at = self._strings_size = 0
        #: Address, offset in the file and bytes there, of every PT_LOAD.
        self._loads: list[tuple[int, int, int]] = []

    def whole(self) -> ElfFile:
        begin = self._bytes(0, 64)
        if begin[:4] != b"\x7fELF" or len(begin) < 52:
            raise NotElf("no ELF header")
        if begin[4] not in (1, 2) or begin[5] not in (1, 2) or begin[6] != 1:
            raise NotElf("an ELF class, byte order or version that does not exist")
        self._is_64, self._order = begin[4] == 2, "<" if begin[5] == 1 else ">"
        kind, machine, version = struct.unpack_from(self._order + "HHI", begin, 16)
        if kind not in (_ET_EXEC, _ET_DYN) or version != 1:
            raise NotElf("neither a program nor a shared library")
        dynamic, interpreter = self._segments(begin)
        values: dict[int, int] = {}
        needed: list[int] = []
        for tag, value in dynamic:
            if tag == _DT_NEEDED:
                needed.append(value)
            else:
                values[tag] = value
        if len(needed) > _NEEDED_MAX:
            raise NotElf(f"{len(needed)} needed libraries")
        if dynamic:
            self._strings_at = self._offset(values.get(_DT_STRTAB, 0))
            self._strings_size = values.get(_DT_STRSZ, 0)
        search = values.get(_DT_RUNPATH, values.get(_DT_RPATH))
        return ElfFile(
            soname=self._string(values[_DT_SONAME]) if _DT_SONAME in values else "",
            needed=tuple(self._string(at) for at in needed),
            runpath=() if search is None else tuple(self._string(search, _PATH_MAX).split(":")),
            is_rpath=_DT_RUNPATH not in values and _DT_RPATH in values,
            needs=self._version_needs(values),
            defines=self._version_definitions(values),
            machine=_MACHINES.get(machine, f"em-{machine}"),
            bits=64 if self._is_64 else 32,
            interpreter=interpreter,
            is_shared=kind == _ET_DYN and not values.get(_DT_FLAGS_1, 0) & _DF_1_PIE,
        )

    def _segments(self, begin: bytes) -> tuple[list[tuple[int, int]], str]:
        """Entries of the dynamic segment up to its end, and the interpreter."""
        if self._is_64:
            headers_at, _, _, _, size, count = struct.unpack_from(self._order + "QQIHHH", begin, 32)
            layout, wanted = self._order + "IIQQQQQQ", 56
        else:
            headers_at, _, _, _, size, count = struct.unpack_from(self._order + "IIIHHH", begin, 28)
            layout, wanted = self._order + "IIIIIIII", 32
        if count and size != wanted:
            raise NotElf(f"program headers of {size} bytes")
        if count > _HEADERS_MAX:
            raise NotElf(f"{count} program headers")
        table = self._bytes(headers_at, count * wanted)
        if len(table) != count * wanted:
            raise NotElf("the file ends in its program headers")
        dynamic: tuple[int, int] | None = None
        interpreter: tuple[int, int] | None = None
        for header in struct.iter_unpack(layout, table):
            kind = header[0]
            offset, address, size = (
                (header[2], header[3], header[5]) if self._is_64 else (header[1], header[2], header[4])
            )
            if kind == _PT_LOAD:
                self._loads.append((address, offset, size))
            elif kind == _PT_DYNAMIC:
                dynamic = (offset, size)
            elif kind == _PT_INTERP:
                interpreter = (offset, size)
        entries: list[tuple[int, int]] = []
        if dynamic is not None:
            entry = self._order + ("QQ" if self._is_64 else "II")
            raw = self._bytes(dynamic[0], min(dynamic[1], _DYNAMIC_MAX))
            raw = raw[: len(raw) - len(raw) % struct.calcsize(entry)]
            for tag, value in struct.iter_unpack(entry, raw):
                if tag == _DT_NULL:
                    break
                entries.append((tag, value))
        name = b""
        if interpreter is not None:
            name = self._bytes(interpreter[0], min(interpreter[1], _NAME_MAX)).partition(b"\0")[0]
        return entries, _word(name)

    def _version_needs(self, values: dict[int, int]) -> tuple[tuple[str, tuple[str, ...]], ...]:
        found: dict[str, dict[str, None]] = {}
        if _DT_VERNEED not in values:
            return ()
        raw = self._versions(values[_DT_VERNEED])
        left, at = _VERSIONS_MAX, 0
        for _ in range(min(values.get(_DT_VERNEEDNUM, 0), _NEEDED_MAX)):
            _, count, file, first, following = struct.unpack_from(self._order + "HHIII", raw, at)
            versions = found.setdefault(self._string(file), {})
            here = at + first
            for _ in range(count):
                left -= 1
                if left < 0:
                    raise NotElf("too many symbol versions")
                _, flags, _, name, step = struct.unpack_from(self._order + "IHHII", raw, here)
                if not flags & _VER_FLG_WEAK:
                    versions[self._string(name)] = None
                if not step:
                    break
                here += step
            if not following:
                break
            at += following
        return tuple((file, tuple(versions)) for file, versions in found.items())

    def _version_definitions(self, values: dict[int, int]) -> tuple[str, ...]:
        found: dict[str, None] = {}
        if _DT_VERDEF not in values:
            return ()
        raw = self._versions(values[_DT_VERDEF])
        at = 0
        for _ in range(min(values.get(_DT_VERDEFNUM, 0), _VERSIONS_MAX)):
            _, flags, _, count, _, first, following = struct.unpack_from(self._order + "HHHHIII", raw, at)
            if count and not flags & _VER_FLG_BASE:
                # The first name is the version; others are those it inherits from, defined by themselves.
                (name,) = struct.unpack_from(self._order + "I", raw, at + first)
                found[self._string(name)] = None
            if not following:
                break
            at += following
        return tuple(found)

    def _versions(self, address: int) -> bytes:
        return self._bytes(self._offset(address), _VERSIONS_BYTES_MAX)

    def _offset(self, address: int) -> int:
        """Where in the file an address of the loaded image is."""
        for start, offset, size in self._loads:
            if start <= address < start + size:
                return offset + address - start
        raise NotElf(f"address {address:#x} is not in the file")

    def _string(self, at: int, longest: int = _NAME_MAX) -> str:
        """A string of the dynamic string table."""
        if at >= self._strings_size:
            raise NotElf("a name outside the string table")
        text = b""
        while True:
            piece = self._bytes(self._strings_at + at + len(text), _READ)
            end = piece.find(b"\0")
            text += piece if end < 0 else piece[:end]
            self._string_bytes += len(piece)
            if len(text) > longest or self._string_bytes > _STRINGS_MAX:
                raise NotElf("names longer than any loader's")
            if end >= 0:
                return _word(text)
            if len(piece) < _READ:
                raise NotElf("the file ends in a name")

    def _bytes(self, at: int, size: int) -> bytes:
        """Up to ``size`` bytes; fewer only at the end of the file."""
        if at >= _FILE_MAX:
            raise NotElf("a place outside any file")
        try:
            self._file.seek(at)
        except OSError as error:
            if error.errno == errno.EINVAL:  # further than the file system can have files (lseek(2))
                raise NotElf("a place outside any file") from None
            raise
        return self._file.read(size)


@lru_cache(maxsize=4096)
def _word(raw: bytes) -> str:
    """Text of a name: UTF-8 or not, it prints and is the same bytes again for the file system (os.fsencode)."""
    return raw.decode("utf-8", "surrogateescape")
