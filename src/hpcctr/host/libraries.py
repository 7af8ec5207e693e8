"""Libraries of the node, shown inside with what they need: found by name or path, each in one folder by its SONAME.

What a library needs is looked for as ld.so would on the node (ld.so(8)): RPATH, RUNPATH with ``$ORIGIN``, the cache,
the default directories. Of glibc nothing is ever taken: its parts fit only each other, and the loader is the image's.
Any other dependency is the image's own where that has every symbol version which the node's libraries need, else the
node's.

Only files that root alone can change are taken: what one user could write would run in every other user's container.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from fnmatch import fnmatchcase
from glob import glob, has_magic

from hpcctr.errors import FeatureUnusable
from hpcctr.host import elf
from hpcctr.host.edits import HostEdits, MountEdit
from hpcctr.host.elf import ElfFile, NotElf
from hpcctr.host.ldcache import HostCache, node_machine
from hpcctr.host.profile_written import is_never
from hpcctr.host.trusted import Look, identity_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hpcctr.image.record import ImageFacts

#: Inside, where libraries of the node are: no directory of any image's.
FOLDER = "/.hpcctr-host/lib"
#: What glibc 2.36 and 2.41 install by a SONAME, and the loaders' names (glibc's shlib-versions).
_GLIBC = re.compile(
    r"(?:ld-linux.*|ld64|ld|libc|libm|libmvec|libdl|libpthread|librt|libresolv|libutil|libanl|libthread_db|libBrokenLocale"
    r"|libnss_[a-z0-9_]+|libmemusage|libpcprofile|libc_malloc_debug)\.so(?:\.[0-9]+)?|libnsl\.so\.1"
)
_DEFAULT_DIRECTORIES = ("/lib64", "/usr/lib64", "/lib", "/usr/lib")
#: Of one feature, with all that its libraries need; a full Cray MPICH has 60.
_LIBRARIES_MAX = 256
#: Files of an image with one SONAME that are replaced.
_PLACES_MAX = 16
#: Files of one directory that are looked at.
_FILES_MAX = 1024
_IS_LIBRARY_NAME = re.compile(r".*\.so(?:\.[0-9.]*[0-9])?").fullmatch
_NUMBER = re.compile(r"([0-9]+)")
_DYNAMIC_TOKEN = re.compile(r"\$(?:\{(ORIGIN|LIB|PLATFORM)\}|(ORIGIN|LIB|PLATFORM))")


@dataclass(frozen=True, kw_only=True)
class HostLibrary:
    """A library file of the node."""

    #: What programs ask for.
    soname: str
    #: As it was found, and as it is once no link is left.
    path: str
    real: str
    identity: str
    file: ElfFile
    #: DT_RPATH directories of those that need it: they count for what it needs as well.
    inherited: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ShownFile:
    """A program or library of the node that edits show inside."""

    #: Inside.
    target: str
    source: str
    file: ElfFile
    origin: str
    #: Whether ld.so finds it by name: it lies in a library folder.
    is_findable: bool
    #: It came with its directory, with others.
    is_in_directory: bool

    @property
    def soname(self) -> str:
        return self.file.soname or os.path.basename(self.target)


def is_of_glibc(soname: str) -> bool:
    """Whether a library is a part of glibc, which is never taken from the node."""
    return _GLIBC.fullmatch(soname) is not None


def found(wanted: str, host: HostCache) -> tuple[str, ...]:
    """Paths of the files a word of a profile is about: a path or a glob of paths, a SONAME or a glob of SONAMEs.

    Of a glob the higher version comes first: of two with the same SONAME the first is taken.
    """
    if wanted.startswith("/"):
        paths = glob(wanted) if has_magic(wanted) else [wanted] if os.path.exists(wanted) else []
    elif has_magic(wanted):
        paths = [path for _, path in host.matching(wanted)]
    else:
        path = host.find(wanted)
        paths = [] if path is None else [path]
    return tuple(sorted(paths, key=_by_version, reverse=True))


def inject(
    wanted: Sequence[str],
    *,
    facts: ImageFacts | None,
    origin: str,
    host: HostCache,
    replace: Collection[str] = (),
    beside: Sequence[str] = (),
    root_owned: bool = True,
) -> HostEdits:
    """The edits that show libraries of the node inside, with what they need.

    ``wanted`` has names and paths as :func:`found` takes them; each must find something. A library whose SONAME is one
    of ``replace`` (or matches a glob of it) is also put over every file of the image with that SONAME, so that search
    paths in the image's programs lead to it. ``beside`` are programs and plug-ins of the node that are shown elsewhere:
    what they need counts. Raises :class:`FeatureUnusable`.
    """
    files = _Files(root_owned=root_owned)
    chosen: dict[str, HostLibrary] = {}
    for word in wanted:
        for library in _libraries(word, host, origin, files):
            chosen.setdefault(library.soname, library)
    others = [one for path in beside if os.path.exists(path) and (one := files.library(path, origin)) is not None]
    notes = _with_dependencies(chosen, others, facts, host, origin, files)
    mounts = [_mount(library, f"{FOLDER}/{soname}", origin) for soname, library in chosen.items()]
    for soname, library in chosen.items():
        if any(fnmatchcase(soname, name) for name in replace):
            mounts += [_mount(library, path, origin) for path in _of_image(soname, facts)]
    folders = (FOLDER,) if chosen else ()
    return HostEdits(mounts=tuple(mounts), library_folders=folders, notes=tuple(notes))


def shown(edits: HostEdits) -> tuple[ShownFile, ...]:
    """The programs and libraries among the files that edits show inside. A file that is none, or gone, is left out."""
    folders = {os.path.normpath(folder) for folder in edits.library_folders}
    files: list[ShownFile] = []
    for mount in edits.mounts:
        if mount.kind == "f":
            pairs = [(mount.target, mount.source)]
        else:
            pairs = [
                (os.path.join(mount.target, name), os.path.join(mount.source, name)) for name in names_in(mount.source)
            ]
        for target, source in pairs:
            try:
                file = elf.read(source)
            except (OSError, NotElf):
                continue
            files.append(
                ShownFile(
                    target=target,
                    source=source,
                    file=file,
                    origin=mount.origin,
                    is_findable=os.path.dirname(os.path.normpath(target)) in folders,
                    is_in_directory=mount.kind == "d",
                )
            )
    return tuple(files)


def names_in(directory: str) -> list[str]:
    """File names of libraries directly in a directory, in order."""
    try:
        names = sorted(name for name in os.listdir(directory) if _IS_LIBRARY_NAME(name))
    except OSError:
        return []
    return names[:_FILES_MAX]


class _Files:
    """Files of the node, each looked at before it is opened: what a user could write, or serves, is not."""

    def __init__(self, *, root_owned: bool) -> None:
        self._look = Look() if root_owned else None
        self._known: dict[str, HostLibrary | None] = {}

    def library(self, path: str, origin: str) -> HostLibrary | None:
        """The program or library at a path; None for what is none, or is for another processor. Raises
        :class:`FeatureUnusable` for one that is not root's alone, or not there.
        """
        if path not in self._known:
            self._known[path] = self._library(path, origin)
        return self._known[path]

    def _library(self, path: str, origin: str) -> HostLibrary | None:
        if self._look is not None:
            trusted = self._look.require(path, origin=origin)
            real, identity = trusted.path, trusted.identity
        else:
            real = os.path.realpath(path)
            try:
                identity = identity_of(os.stat(real))
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                raise FeatureUnusable(f"{origin}: {path}: {reason}", hint=f"ls -l {path}") from None
        try:
            file = elf.read(real)
        except (OSError, NotElf):
            return None
        if file.machine != node_machine() or file.bits != _bits(file.machine):
            return None
        soname = file.soname or os.path.basename(path)
        return HostLibrary(soname=soname, path=path, real=real, identity=identity, file=file)


def _libraries(word: str, host: HostCache, origin: str, files: _Files) -> Iterator[HostLibrary]:
    """Of the node's processor, what a word is about. A glob passes over whatever is no such library."""
    is_glob = has_magic(word)
    paths = found(word, host)
    count = 0
    for path in paths:
        if is_glob and not os.path.exists(path):
            continue
        library = files.library(path, origin)
        if library is not None and not is_of_glibc(library.soname):
            count += 1
            yield library
        elif not is_glob:
            what = (
                "a part of glibc, which is always the image's"
                if library is not None
                else "no library of this node's kind"
            )
            raise FeatureUnusable(f"{origin}: {path} is {what}", hint=f"file -L {path}")
    if not count:
        where = "no such file" if word.startswith("/") else "not among the node's libraries (ldconfig -p)"
        raise FeatureUnusable(f"{origin}: {word}: {where}", hint="install it on the node, or leave it out")


def _bits(machine: str) -> int:
    return 32 if machine in ("i386", "arm") else 64


def _with_dependencies(
    chosen: dict[str, HostLibrary],
    others: Sequence[HostLibrary],
    facts: ImageFacts | None,
    host: HostCache,
    origin: str,
    files: _Files,
) -> list[str]:
    """Add to ``chosen`` what its libraries and ``others`` need of the node; gives what was decided, in words.

    Every addition may need more versions of a library that was the image's so far, so all are looked at until nothing
    is added: sets only grow, and there is a limit.
    """
    theirs = defines_of(facts)
    kept: dict[str, None] = {}
    lacking: set[str] = set()
    is_done = False
    while not is_done:
        is_done = True
        versions: dict[str, set[str]] = {}
        for library in (*chosen.values(), *others):
            for name, wanted in library.file.needs:
                versions.setdefault(name, set()).update(wanted)
        for library in (*chosen.values(), *others):
            for name in library.file.needed:
                if name in chosen or name in lacking or "/" in name or is_of_glibc(name):
                    continue
                if name in theirs and versions.get(name, set()) <= theirs[name]:
                    kept[name] = None
                    continue
                needed = _needed(name, library, host, files)
                if needed is None:
                    lacking.add(name)
                    continue
                if len(chosen) >= _LIBRARIES_MAX:
                    raise FeatureUnusable(
                        f"{origin}: more than {_LIBRARIES_MAX} libraries", hint="name fewer libraries"
                    )
                chosen[name] = needed
                is_done = False
    return [f"{origin}: {name} is the image's own" for name in kept if name not in chosen]


def defines_of(facts: ImageFacts | None) -> dict[str, frozenset[str]]:
    """SONAMEs of the image, each with the symbol versions of the file that its ld.so finds first."""
    found: dict[str, frozenset[str]] = {}
    for library in () if facts is None else facts.libraries:
        found.setdefault(library.soname, frozenset(library.defines))
    return found


def _needed(name: str, of: HostLibrary, host: HostCache, files: _Files) -> HostLibrary | None:
    """The library that ld.so would take on the node."""
    inherited = of.inherited
    if of.file.runpath:
        here = tuple(dict.fromkeys(_expanded(of)))
        before, after = ((*here, *inherited), ()) if of.file.is_rpath else ((), here)
        inherited = before if of.file.is_rpath else inherited
    else:
        before, after = inherited, ()
    by_cache = host.find(name)
    paths = [f"{directory}/{name}" for directory in (*before, *after)]
    paths += [by_cache] if by_cache else []
    paths += [f"{directory}/{name}" for directory in _DEFAULT_DIRECTORIES]
    for path in paths:
        try:
            library = files.library(path, "")
        except FeatureUnusable:
            continue
        if library is not None:
            # It is asked for by this name, whatever it calls itself.
            return replace_fields(library, soname=name, inherited=inherited)
    return None


def _expanded(library: HostLibrary) -> Iterator[str]:
    """The directories of a search path. Of ``$LIB``, which differs between distributions, every form; a relative one
    would be the program's working directory, and is left out.
    """
    for word in library.file.runpath:
        for origin in dict.fromkeys((os.path.dirname(library.path), os.path.dirname(library.real))):
            for lib in ("lib64", f"lib/{library.file.machine}-linux-gnu", "lib") if "LIB" in word else ("",):
                tokens = {"ORIGIN": origin, "LIB": lib, "PLATFORM": library.file.machine}
                directory = _DYNAMIC_TOKEN.sub(lambda match, tokens=tokens: tokens[match[1] or match[2]], word)  # type: ignore[misc]
                if directory.startswith("/"):
                    yield os.path.normpath(directory)


def _of_image(soname: str, facts: ImageFacts | None) -> Iterable[str]:
    """Files of the image that have a SONAME. Where they are is the image's claim: nothing is put over the caller's own
    view.
    """
    if facts is None:
        return ()
    paths = [one.path for one in facts.libraries if one.soname == soname]
    paths += [one.path for one in facts.mpi if one.soname == soname]
    plain = [path for path in paths if path == os.path.normpath("/" + path.lstrip("/")) and not is_never(path)]
    return list(dict.fromkeys(plain))[:_PLACES_MAX]


def _mount(library: HostLibrary, target: str, origin: str) -> MountEdit:
    return MountEdit(source=library.real, target=target, kind="f", origin=origin, identity=library.identity)


def _by_version(path: str) -> list[str | int]:
    parts: list[str | int] = list(_NUMBER.split(path))
    parts[1::2] = [int(number) for number in parts[1::2]]
    return parts
