"""Which of an image's files ld.so would find, and what that makes of the image (:class:`ImageFacts`).

ld.so(8), ldconfig(8) for glibc: directories of /etc/ld.so.conf and what it includes, then the default ones, each with
those of glibc-hwcaps in it. musl: /etc/ld-musl-ARCH.path, else /lib, /usr/local/lib, /usr/lib. Libraries of another
processor than libc's are left out, and those a program finds by its own RUNPATH, as plug-ins are. MPI is looked for
everywhere. Names, links and directories are a hostile image's: every walk has a bound."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import islice

from hpcctr.errors import ImageBroken
from hpcctr.image import mpilib
from hpcctr.image.libraryfile import PATH_MAX, Seen, is_library_name, is_word, noted_path, path_of
from hpcctr.image.mpilib import MpiWords, Pmi
from hpcctr.image.record import ImageFacts, Library, MpiLibrary
from hpcctr.image.tarstream import REGULAR, SYMLINK
from hpcctr.image.tree import Directory, Leaf, Tree

#: Libraries and MPI libraries noted, and characters of all that is.
LIBRARIES_MAX = 4096
MPI_MAX = 32
TEXT_MAX = 1 << 21
#: How deep files that tell directories include each other, directories they tell, and directories gone through.
_INCLUDES_MAX = 8
_TOLD_MAX = 256
_DIRECTORIES_MAX = 1024
_LINKS_MAX = 40
#: Names gone through for all include lines, and components of paths that are followed for all of this.
_NAMES_MAX = 1 << 20
_STEPS_MAX = 1 << 23
#: MPI libraries and plugins of theirs that are told apart by where they are.
_PARTS_MAX = 1024

#: glibc's loader, by e_machine and bits (glibc, sysdeps/…/shlib-versions): what PT_INTERP of its programs says.
_LOADERS = {
    ("x86_64", 64): "/lib64/ld-linux-x86-64.so.2",
    ("aarch64", 64): "/lib/ld-linux-aarch64.so.1",
    ("ppc64", 64): "/lib64/ld64.so.2",
    ("s390x", 64): "/lib/ld64.so.1",
    ("riscv", 64): "/lib/ld-linux-riscv64-lp64d.so.1",
    ("loongarch", 64): "/lib64/ld-linux-loongarch-lp64d.so.1",
    ("i386", 32): "/lib/ld-linux.so.2",
    ("arm", 32): "/lib/ld-linux-armhf.so.3",
}
_GLIBC_DIRECTORIES = (b"lib64", b"usr/lib64", b"lib", b"usr/lib")
_MUSL_DIRECTORIES = (b"lib", b"usr/local/lib", b"usr/lib")


@dataclass(frozen=True, kw_only=True)
class Passed:
    """What was kept of the contents that have passed, by the id of their leaf, which the tree keeps alive."""

    #: What was seen in a library; None for one that could not be held whole.
    seen: dict[int, Seen | None] = field(default_factory=dict)
    #: Files that tell directories.
    search: dict[int, bytes] = field(default_factory=dict)
    #: Further names, hard links, of a file that make it a library.
    linked: dict[int, list[bytes]] = field(default_factory=dict)
    #: Every library, in the order in which they passed.
    leaves: list[Leaf] = field(default_factory=list)


class Search:
    """One image's."""

    def __init__(self, passed: Passed, tree: Tree) -> None:
        self._seen, self._search, self._linked, self._leaves = (
            passed.seen,
            dict(passed.search),
            passed.linked,
            passed.leaves,
        )
        self._tree = tree
        self._text_left, self._names_left, self._steps_left = TEXT_MAX, _NAMES_MAX, _STEPS_MAX

    def facts(self) -> ImageFacts:
        """What it comes to."""
        mpi, pmix = self._mpi()
        glibc = self._glibc()
        if glibc is not None:
            version, loader, libraries = glibc
            return ImageFacts(
                libc="glibc", libc_version=version, loader=loader, libraries=libraries, mpi=mpi, pmix=pmix
            )
        musl = self._musl()
        if musl is not None:
            version, loader, libraries = musl
            return ImageFacts(libc="musl", libc_version=version, loader=loader, libraries=libraries, mpi=mpi, pmix=pmix)
        return ImageFacts(mpi=mpi, pmix=pmix)

    def _glibc(self) -> tuple[str, str, tuple[Library, ...]] | None:
        directories = self._glibc_directories()
        found: list[tuple[int, bool, Seen, str]] = []
        for directory in directories:
            node = directory.children.get(b"libc.so.6")
            seen = self._seen_of(directory, node)
            if seen is not None and seen.glibc:
                loader = _LOADERS.get((seen.machine, seen.bits), "")
                is_there = bool(loader) and self._leaf(self._tree.root, loader.encode()) is not None
                found.append((seen.bits, is_there, seen, loader if is_there else ""))
        if not found:
            return None
        # Where there are several, that of 64 bits, and one with a loader; the first of those.
        _, _, libc, loader = max(found, key=lambda one: one[:2])
        return libc.glibc, loader, tuple(self._libraries(directories, libc.machine, libc.bits))

    def _musl(self) -> tuple[str, str, tuple[Library, ...]] | None:
        directory = self._directory(self._tree.root, b"lib")
        for name in sorted(directory.children) if directory is not None else ():
            if not name.startswith(b"ld-musl-") or not name.endswith(b".so.1") or directory is None:
                continue
            seen, loader = self._seen_of(directory, directory.children[name]), noted_path(b"lib/" + name)
            if seen is not None and seen.musl is not None and loader:
                directories = self._musl_directories(name.removesuffix(b".so.1"))
                return seen.musl, loader, tuple(self._libraries(directories, seen.machine, seen.bits))
        return None

    # where ld.so looks

    def _glibc_directories(self) -> list[Directory]:
        paths = list(islice(self._configured(b"etc/ld.so.conf", 0), _TOLD_MAX))
        triplets = [
            b"%s/%s" % (top, name)
            for top in (b"lib", b"usr/lib")
            if (directory := self._directory(self._tree.root, top)) is not None
            for name in sorted(directory.children)
            if b"-linux-gnu" in name
        ]
        with_hwcaps: list[Directory] = []
        for directory in self._directories([*paths, *triplets, *_GLIBC_DIRECTORIES]):
            with_hwcaps.append(directory)
            hwcaps = self._directory(directory, b"glibc-hwcaps")
            if hwcaps is not None:
                # The most demanding first: x86-64-v4 before x86-64-v3.
                names = sorted(hwcaps.children, reverse=True)[:_TOLD_MAX]
                with_hwcaps += [one for name in names if (one := self._directory(hwcaps, name)) is not None]
        return with_hwcaps[:_DIRECTORIES_MAX]

    def _musl_directories(self, loader: bytes) -> list[Directory]:
        said = self._searched(self._leaf(self._tree.root, b"etc/" + loader + b".path"))
        paths = re.split(rb"[:\n]", said) if said is not None else list(_MUSL_DIRECTORIES)
        return self._directories([path for path in paths if path][:_TOLD_MAX])

    def _directories(self, paths: list[bytes]) -> list[Directory]:
        """Those that are there, each once."""
        found: dict[int, Directory] = {}
        for path in paths[:_DIRECTORIES_MAX]:
            directory = self._directory(self._tree.root, path)
            if directory is not None:
                found[id(directory)] = directory
        return list(found.values())

    def _configured(self, path: bytes, depth: int) -> Iterator[bytes]:
        """Directories of a file like /etc/ld.so.conf and of those it includes (ldconfig(8))."""
        said = self._searched(self._leaf(self._tree.root, path))
        if said is None or depth > _INCLUDES_MAX:
            return
        for line in said.splitlines():
            words = line.partition(b"#")[0].replace(b",", b" ").replace(b":", b" ").split()
            if words[:1] == [b"include"]:
                for pattern in words[1:]:
                    for included in self._matching(pattern if pattern[:1] == b"/" else b"etc/" + pattern):
                        yield from self._configured(included, depth + 1)
            elif words[:1] != [b"hwcap"]:
                # libc4 and libc5 are told apart by DIRECTORY=TYPE.
                yield from (word.partition(b"=")[0] for word in words)

    def _matching(self, pattern: bytes) -> list[bytes]:
        """Files a pattern stands for: in one directory, as all include lines have it."""
        top, _, name = pattern.strip(b"/").rpartition(b"/")
        directory = self._directory(self._tree.root, top)
        self._names_left -= 0 if directory is None else len(directory.children)
        if directory is None or len(pattern) > PATH_MAX or name.count(b"*") > 8 or self._names_left < 0:
            return []
        # Only of what was kept: a directory has as many names as its image likes.
        kept = [one for one, node in directory.children.items() if id(self._target(directory, node)) in self._search]
        return [top + b"/" + one for one in sorted(kept) if fnmatchcase(one, name)]

    def _searched(self, leaf: Leaf | None) -> bytes | None:
        return None if leaf is None else self._search.pop(id(leaf), None)

    # what is there

    def _libraries(self, directories: list[Directory], machine: str, bits: int) -> Iterator[Library]:
        noted: set[tuple[str, str]] = set()
        for directory in directories:
            for name in sorted(name for name in directory.children if is_library_name(name)):
                leaf = self._target(directory, directory.children[name])
                if leaf is None or id(leaf) not in self._seen:
                    continue
                seen, path = self._seen[id(leaf)], noted_path(self._path_in(directory, name, leaf))
                if seen is not None and (seen.machine, seen.bits) != (machine, bits):
                    continue
                soname = (seen.soname if seen is not None else "") or name.decode("utf-8", "replace")
                defines = seen.defines if seen is not None else ()
                # Written as JSON in UTF-8.
                self._text_left -= 64 + 2 * len(path.encode()) + sum(2 * len(word.encode()) + 4 for word in defines)
                if not path or not is_word(soname) or (soname, path) in noted:
                    continue
                if self._text_left < 0 or len(noted) == LIBRARIES_MAX:
                    return
                noted.add((soname, path))
                yield Library(soname=soname, path=path, defines=defines)

    def _mpi(self) -> tuple[tuple[MpiLibrary, ...], str]:
        """MPI libraries, and the version of PMIx."""
        plugins: list[tuple[bytes, frozenset[Pmi], str]] = []
        libraries: list[tuple[bytes, Seen, MpiWords]] = []
        versions: list[str] = []
        has_pmix = False
        for leaf in self._leaves:
            seen = self._seen.get(id(leaf))
            if seen is None:
                continue
            if seen.is_pmix:
                has_pmix = True
                versions.append(seen.pmix)
            if seen.plugin is not None:
                plugins.append((path_of(leaf), seen.plugin, seen.pmix))
            if seen.mpi is not None:
                libraries += [
                    (path, seen, seen.mpi)
                    for path in (path_of(leaf), *self._linked.get(id(leaf), []))
                    if mpilib.is_mpi_name(path.rpartition(b"/")[2])
                ]
        del libraries[_PARTS_MAX:]
        homes = [path.rpartition(b"/")[0] for path, _, words in libraries if words.product == "Open MPI"]
        given: dict[bytes, frozenset[Pmi]] = {}
        for path, pmi, version in plugins[:_PARTS_MAX]:
            home = max((home for home in homes if path.startswith(home + b"/")), key=len, default=b"")
            given[home] = given.get(home, frozenset()) | pmi
            versions.append(version)
        noted: dict[tuple[bytes, str], MpiLibrary] = {}
        for path, seen, words in libraries:
            home, _, name = path.rpartition(b"/")
            pmi = words.pmi | ({"pmix"} if words.may_load_pmix and has_pmix else set())
            if words.product == "Open MPI":
                pmi |= given.get(home, frozenset()) | given.get(b"", frozenset())
            soname, text = seen.soname or name.decode("utf-8", "replace"), noted_path(path)
            if not text or not is_word(soname):
                continue
            # Wheels have a copy for each name that elsewhere is a link: the one that is loaded counts.
            if (home, soname) not in noted or name == soname.encode():
                noted[home, soname] = MpiLibrary(
                    soname=soname,
                    path=text,
                    family=words.family,
                    version=words.version,
                    pmi=mpilib.in_order(frozenset(pmi)),
                    product=words.product,
                )
        in_order = sorted(noted.values(), key=lambda library: library.path)
        return tuple(in_order[:MPI_MAX]), next(filter(None, versions), "")

    # the tree

    def _seen_of(self, directory: Directory, node: Directory | Leaf | None) -> Seen | None:
        leaf = self._target(directory, node)
        return None if leaf is None else self._seen.get(id(leaf))

    def _directory(self, start: Directory, path: bytes) -> Directory | None:
        if not path:
            return start
        whole = start.path + b"/" + path
        self._steps_left -= whole.count(b"/") + 1
        if self._steps_left < 0:
            return None
        try:
            return self._tree.find_directory(whole.split(b"/"), whole)
        except ImageBroken:
            return None

    def _leaf(self, start: Directory, path: bytes) -> Leaf | None:
        """The regular file that path leads to, its last component followed as well."""
        top, _, name = path.rpartition(b"/")
        directory = self._directory(start, top) if path[:1] != b"/" else self._directory(self._tree.root, top)
        return None if directory is None else self._target(directory, directory.children.get(name))

    def _target(self, directory: Directory, node: Directory | Leaf | None) -> Leaf | None:
        """The regular file a name in that directory means."""
        for _ in range(_LINKS_MAX):
            if not isinstance(node, Leaf) or node.kind == REGULAR:
                return node if isinstance(node, Leaf) else None
            if node.kind != SYMLINK:
                return None
            top, _, name = node.link.rpartition(b"/")
            start = self._tree.root if node.link[:1] == b"/" else directory
            where = self._directory(start, top)
            if where is None:
                return None
            directory, node = where, where.children.get(name)
        return None

    def _path_in(self, directory: Directory, name: bytes, leaf: Leaf) -> bytes:
        """The file's path: the name itself where it is a hard link, else where the symbolic link leads."""
        if directory.children[name] is not leaf:
            return path_of(leaf)
        return directory.path + b"/" + name if directory.path else name
