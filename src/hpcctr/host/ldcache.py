"""``/etc/ld.so.cache``, where ld.so looks up libraries by name: read of the host's, and written for a container.

The format is glibc's own affair, and every loader since 2.2 reads the one written here ("glibc-ld.so.cache1.1"; with
its extension for glibc-hwcaps, which loaders before 2.33 pass over). Sources: glibc's sysdeps/generic/dl-cache.h
(layout), sysdeps/generic/ldconfig.h (flags), elf/dl-cache.c (search: the order of entries is the loader's binary
search), elf/cache.c (what ldconfig writes).

The image's cache is an image's word: whatever is wrong with an entry drops the entry, whatever is wrong with the file
leaves it empty.
"""

from __future__ import annotations

import os
import re
import struct
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache
from typing import Any

from hpcctr import processor
from hpcctr.host.edits import CacheEntry
from hpcctr.host.elf import ElfFile

PATH = "/etc/ld.so.cache"

_OLD_MAGIC = b"ld.so-1.7.0"
_NEW_MAGIC = b"glibc-ld.so.cache1.1"
#: Of a cache file; a full workstation's has 5,000 entries in 400 KiB.
BYTES_MAX = 16 * 1024 * 1024
_ENTRIES_MAX = 65_536
_TEXT_MAX = 4096

_HEADER = struct.Struct("=20sIIB3xI12x")
_ENTRY = struct.Struct("=iIIIQ")
_OLD_HEADER = struct.Struct("=11sxI")
_OLD_ENTRY = struct.Struct("=iII")
_SECTION = struct.Struct("=IIII")
_EXTENSION_MAGIC = 0xEAA42174
_TAG_GENERATOR, _TAG_HWCAPS = 0, 1
_SECTIONS_MAX = 64
_HWCAPS_MAX = 256
#: In the word of hardware capabilities: its lower half is the number of a name in the extension, its upper half has ten
#: bits for levels of the instruction set.
_IS_NAMED = 1 << 62
_NAMED_MASK = ~((0x3FF << 32) | 0xFFFFFFFF) & (2**64 - 1)
#: The loader subtracts numbers of two names in 32 bits: further apart, there is no order that its search could rely on.
_FAR = 2**30
_ENDIAN = 2 if sys.byteorder == "little" else 3

#: Kind (an ELF library for glibc) and processor.
_LIBC6 = 0x0003
_FLAGS = {
    ("i386", 32): _LIBC6,
    ("x86_64", 64): _LIBC6 | 0x0300,
    ("x86_64", 32): _LIBC6 | 0x0800,
    ("aarch64", 64): _LIBC6 | 0x0A00,
    ("arm", 32): _LIBC6 | 0x0900,
    ("ppc64", 64): _LIBC6 | 0x0500,
    ("s390x", 64): _LIBC6 | 0x0400,
    ("sparc64", 64): _LIBC6 | 0x0100,
    ("riscv", 64): _LIBC6 | 0x1000,
    ("loongarch", 64): _LIBC6 | 0x1200,
}
#: ELF's word for a processor by OCI's, or by Debian's.
_MACHINES = {
    "amd64": "x86_64", "arm64": "aarch64", "386": "i386", "ppc64le": "ppc64", "powerpc64le": "ppc64",
    "riscv64": "riscv", "loongarch64": "loongarch",
}  # fmt: skip


def node_machine() -> str:
    """The processor of this node as :attr:`hpcctr.host.elf.ElfFile.machine` says it."""
    name = processor.machine()
    return _MACHINES.get(name, name)


def flags_of(file: ElfFile) -> int | None:
    """What a cache says of a library's kind and processor; None for one that no loader here knows."""
    return _FLAGS.get((file.machine, file.bits))


@dataclass(frozen=True)
class _Line:
    """An entry as it is in a file."""

    soname: bytes
    path: bytes
    flags: int
    osversion: int
    hwcap: int


class HostCache:
    """The libraries of the node by name, as ld.so of the node would find them."""

    def __init__(self, lines: Iterable[tuple[str, str, int]]) -> None:
        """Of (soname, path, flags), those that ld.so prefers first."""
        self._paths: dict[tuple[str, int], str] = {}
        for soname, path, flags in lines:
            self._paths.setdefault((soname, flags), path)

    @classmethod
    def load(cls, path: str = PATH) -> HostCache:
        """The cache file at ``path``, as it was read last if it has not changed. One that is missing or broken is
        empty: libraries are then only found by their paths. Variants for a processor's level (glibc-hwcaps) are left
        out.
        """
        global _last  # noqa: PLW0603
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                identity = (path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
                with _last_lock:
                    if _last is not None and _last[0] == identity:
                        return _last[1]
                content = file.read(BYTES_MAX + 1)
        except OSError:
            return cls(())
        lines, _ = _read(content)
        cache = cls((os.fsdecode(line.soname), os.fsdecode(line.path), line.flags) for line in lines if not line.hwcap)
        with _last_lock:
            _last = (identity, cache)
        return cache

    def find(self, soname: str, machine: str | None = None) -> str | None:
        """The path of a library of the node's processor, or of another one's (``i386``)."""
        return self._paths.get((soname, _flags(machine)))

    def matching(self, pattern: str, machine: str | None = None) -> tuple[tuple[str, str], ...]:
        """(soname, path) of every library whose name a glob matches, in order of name."""
        wanted = _flags(machine)
        is_match = re.compile(translate(pattern)).match
        found = ((name, path) for (name, flags), path in self._paths.items() if flags == wanted and is_match(name))
        return tuple(sorted(found))


_last: tuple[tuple[str, int, int, int, int, int], HostCache] | None = None
_last_lock = threading.Lock()


def _flags(machine: str | None) -> int:
    machine = machine or node_machine()
    return _FLAGS.get((machine, 32 if machine in ("i386", "arm") else 64), _LIBC6)


def listed(content: bytes) -> tuple[CacheEntry, ...]:
    """What a cache file has, in its order, without the variants for a processor's level."""
    lines, _ = _read(content)
    return tuple(
        CacheEntry(soname=os.fsdecode(line.soname), path=os.fsdecode(line.path), flags=line.flags, origin="ld.so.cache")
        for line in lines
        if not line.hwcap
    )


def merged(image_cache: bytes, entries: Sequence[CacheEntry]) -> bytes:
    """A cache file with ``entries`` before what the image's has of the same name, and all else of the image's."""
    theirs, hwcaps = _read(image_cache)
    ours = [
        _Line(os.fsencode(entry.soname), os.fsencode(entry.path), entry.flags, 0, 0)
        for entry in entries
        if _is_name(os.fsencode(entry.soname)) and _is_path(os.fsencode(entry.path))
    ]
    # The loader takes the first usable one of a name, and stops at one without hardware capabilities: ours come before
    # the image's variants for a processor's level as well. Sorting keeps the order of equal names, reversed as well.
    keyed = [(_order(line.soname), line) for line in (*ours, *theirs)]
    numbers = [number for order, _ in keyed for number in order[1::2]]
    if numbers and max(numbers) - min(numbers) >= 2**31:
        keyed = [(order, line) for order, line in keyed if all(-_FAR <= number < _FAR for number in order[1::2])]
    keyed.sort(key=lambda pair: pair[0], reverse=True)
    return _written([line for _, line in keyed], hwcaps)


@lru_cache(maxsize=4096)
def _order(soname: bytes) -> tuple[Any, ...]:
    """A key by which names are ordered as _dl_cache_libcmp() has them: runs of digits by their value, and above any
    other character; the end of a name below. DEL stands for "a number follows": no name has it.
    """
    parts: list[Any] = list(_NUMBER.split(soname.decode("ascii")))
    for index in range(1, len(parts), 2):
        parts[index - 1] = f"{parts[index - 1]}\x7f"
        # The loader counts in 32 bits with a sign.
        parts[index] = (int(parts[index]) + 2**31) % 2**32 - 2**31
    return tuple(parts)


_NUMBER = re.compile(r"([0-9]+)")


#: Names every loader compares in the same way: characters above 127 have a sign on some processors.
_is_name = re.compile(rb"[!-.0-~]{1,255}").fullmatch


def _is_path(path: bytes) -> bool:
    return path.startswith(b"/") and len(path) < _TEXT_MAX and b"\0" not in path


def _read(content: bytes) -> tuple[list[_Line], list[bytes]]:
    """The entries of a file of any of the three formats, and the names that its hardware capabilities have."""
    if len(content) > BYTES_MAX:
        return [], []
    if content.startswith(_NEW_MAGIC):
        return _read_new(content, 0)
    if not content.startswith(_OLD_MAGIC) or len(content) < _OLD_HEADER.size:
        return [], []
    _, count = _OLD_HEADER.unpack_from(content)
    if count > _ENTRIES_MAX:
        return [], []
    strings = _OLD_HEADER.size + count * _OLD_ENTRY.size
    # The new format lies in the old one's strings, at the next multiple of eight (ALIGN_CACHE).
    begin = strings + -strings % 8
    if content.startswith(_NEW_MAGIC, begin):
        return _read_new(content, begin)
    if len(content) < strings:
        return [], []
    texts = _Texts(content, strings)
    lines = []
    for flags, key, value in _OLD_ENTRY.iter_unpack(content[_OLD_HEADER.size : strings]):
        soname, path = texts.at(key), texts.at(value)
        if _is_name(soname) and _is_path(path):
            lines.append(_Line(soname, path, flags, 0, 0))
    return lines, []


def _read_new(content: bytes, begin: int) -> tuple[list[_Line], list[bytes]]:
    if len(content) < begin + _HEADER.size:
        return [], []
    _, count, _, endian, extension = _HEADER.unpack_from(content, begin)
    entries = begin + _HEADER.size
    end = entries + count * _ENTRY.size
    if count > _ENTRIES_MAX or end > len(content) or endian & 3 not in (0, _ENDIAN):
        return [], []
    hwcaps = _hwcaps(content, extension)
    texts = _Texts(content, begin)
    lines = []
    for flags, key, value, osversion, hwcap in _ENTRY.iter_unpack(content[entries:end]):
        soname, path = texts.at(key), texts.at(value)
        is_named = hwcap & _NAMED_MASK == _IS_NAMED
        if _is_name(soname) and _is_path(path) and not (is_named and hwcap & 0xFFFFFFFF >= len(hwcaps)):
            lines.append(_Line(soname, path, flags, osversion, hwcap))
    return lines, hwcaps


def _hwcaps(content: bytes, extension: int) -> list[bytes]:
    """Names of the extension, by number. Its offsets, and those of its names, are from the beginning of the file."""
    if not extension or extension % 4 or extension + 8 > len(content):
        return []
    magic, count = struct.unpack_from("=II", content, extension)
    if magic != _EXTENSION_MAGIC or count > _SECTIONS_MAX or extension + 8 + count * _SECTION.size > len(content):
        return []
    texts = _Texts(content, 0)
    for index in range(count):
        tag, _, offset, size = _SECTION.unpack_from(content, extension + 8 + index * _SECTION.size)
        if tag == _TAG_HWCAPS and offset + size <= len(content) and size // 4 <= _HWCAPS_MAX:
            return [
                texts.at(number) for (number,) in struct.iter_unpack("=I", content[offset : offset + size - size % 4])
            ]
    return []


class _Texts:
    """The strings of a file, by offset."""

    def __init__(self, content: bytes, base: int) -> None:
        self._content, self._base = content, base

    def at(self, offset: int) -> bytes:
        """Empty for one that is too long, or has no end."""
        start = self._base + offset
        end = self._content.find(b"\0", start, start + _TEXT_MAX)
        return self._content[start:end] if end >= 0 else b""


def _written(lines: Sequence[_Line], hwcaps: Sequence[bytes]) -> bytes:
    strings_at = _HEADER.size + len(lines) * _ENTRY.size
    strings = bytearray()
    offsets: dict[bytes, int] = {}

    def offset(text: bytes) -> int:
        if text not in offsets:
            offsets[text] = strings_at + len(strings)
            strings.extend(text + b"\0")
        return offsets[text]

    entries = b"".join(
        _ENTRY.pack(line.flags, offset(line.soname), offset(line.path), line.osversion, line.hwcap) for line in lines
    )
    names = b"".join(struct.pack("=I", offset(name)) for name in hwcaps)
    generator = b"hpcctr"
    size = len(strings)
    strings.extend(b"\0" * (-(strings_at + size) % 4))
    extension = strings_at + len(strings)
    sections = [(_TAG_GENERATOR, generator), *([(_TAG_HWCAPS, names)] if hwcaps else [])]
    # Numbers first: they have to be at a multiple of four.
    at = extension + 8 + len(sections) * _SECTION.size
    head = struct.pack("=II", _EXTENSION_MAGIC, len(sections))
    head += _SECTION.pack(_TAG_GENERATOR, 0, at + len(names), len(generator))
    if hwcaps:
        head += _SECTION.pack(_TAG_HWCAPS, 0, at, len(names))
    return _HEADER.pack(_NEW_MAGIC, len(lines), size, _ENDIAN, extension) + entries + strings + head + names + generator
