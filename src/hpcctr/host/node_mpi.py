"""The MPI libraries of the node, the parts that belong to each, and what they load by path.

What a file is, it says itself (:mod:`hpcctr.image.mpilib`); what belongs to it lies beside it, as every package and
``make install`` has it.
"""

from __future__ import annotations

import glob
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from hpcctr.host import elf, libraries
from hpcctr.host.edits import EnvEdit, MountEdit
from hpcctr.host.elf import NotElf
from hpcctr.host.ldcache import HostCache
from hpcctr.host.profiles import Profile
from hpcctr.host.trusted import Look, identity_of
from hpcctr.image import mpilib
from hpcctr.image.record import MpiLibrary

#: Bytes of an MPI library: Debian's MPICH has 41 MiB.
_BYTES_MAX = 256 * 1024 * 1024
#: Names of one library in the MPICH family: upstream's, Debian's, older ones.
MPICH_NAMES = (
    ("libmpi.so.12", "libmpich.so.12"),
    ("libmpifort.so.12", "libmpichfort.so.12", "libmpichf90.so.12"),
    ("libmpicxx.so.12", "libmpichcxx.so.12"),
)
#: The parts of an Open MPI that programs and plug-ins are linked to.
_OPEN_MPI_PARTS = (
    "libmpi_cxx.so.*", "libmpi_mpifh*.so.*", "libmpi_usempi*.so.*", "libopen-rte.so.*", "libopen-pal.so.*",
    "liboshmem.so.*", "libompitrace.so.*", "libmca_common_*.so.*",
)  # fmt: skip
#: Directories that a library loads plug-ins and texts from: beside it (of several the first that is there), and below
#: its prefix; of /usr, configuration is in /etc.
_PLUGINS = (
    ("libopen-pal.so.*", ("openmpi/lib", "openmpi"), ("share/openmpi", "etc/openmpi")),
    ("libpmix.so.*", ("pmix2/lib/pmix", "pmix"), ("share/pmix", "lib/x86_64-linux-gnu/pmix2/share/pmix")),
    ("libucs.so.*", ("ucx",), ()),
    ("libfabric.so.*", ("libfabric",), ()),
    ("libibverbs.so.*", ("libibverbs",), ("etc/libibverbs.d",)),
)
_NAMES = {"mpich": "MPICH", "openmpi": "Open MPI", "mpi-abi": "MPI (standard ABI)", "unknown": "MPI"}


@dataclass(frozen=True, kw_only=True)
class HostMpi:
    """An MPI of the node. Paths are the node's."""

    library: MpiLibrary
    #: Its other parts by SONAME.
    parts: Mapping[str, str]


def host_mpis(profile: Profile | None, host: HostCache) -> tuple[HostMpi, ...]:
    """The MPIs of the node that programs could be given: those its profile names, else those its ld.so finds."""
    words = profile.libraries if profile is not None else ()
    paths = [path for word in words for path in libraries.found(word, host)]
    found = _mpis(paths, host) if paths else ()
    return found or _mpis([path for _, path in host.matching("libmpi*.so.*")], host)


def shown(library: MpiLibrary) -> str:
    """``Open MPI 4.1.4``."""
    return f"{library.product or _NAMES[library.family]} {library.version or 'of an unknown version'}"


def _mpis(paths: Sequence[str], host: HostCache) -> tuple[HostMpi, ...]:
    found: dict[str, HostMpi] = {}
    for path in paths:
        real = os.path.realpath(path)
        if real in found or not mpilib.is_mpi_name(os.fsencode(os.path.basename(path))):
            continue
        library = _identified(real, path)
        if library is not None:
            found[real] = HostMpi(library=library, parts=dict(_parts(library, paths, host)))
    return tuple(found.values())


def _parts(library: MpiLibrary, paths: Sequence[str], host: HostCache) -> Iterator[tuple[str, str]]:
    """(SONAME, path) of what belongs to an MPI library of the node: of those named, beside it, or in the cache."""
    directory = os.path.dirname(library.path)
    named = {os.path.basename(path): path for path in paths}
    if library.family == "mpich":
        for group in MPICH_NAMES[1:]:
            for name in group:
                path = next(
                    (one for one in (named.get(name), f"{directory}/{name}", host.find(name)) if _exists(one)), None
                )
                if path is not None:
                    yield name, path
                    break
    elif library.family == "openmpi":
        beside = (f"{directory}/{name}" for name in libraries.names_in(directory))
        for path in (*paths, *beside):
            name = os.path.basename(path)
            if any(fnmatchcase(name, part) for part in _OPEN_MPI_PARTS) and _soname(path) == name:
                yield name, path


def _exists(path: str | None) -> bool:
    return path is not None and os.path.exists(path)


def _soname(path: str) -> str:
    try:
        return elf.read(os.path.realpath(path)).soname
    except (OSError, NotElf):
        return ""


def places(paths: Sequence[str], origin: str, root_owned: bool) -> Iterator[MountEdit]:
    """The directories that libraries load from by path, at the same place inside."""
    look = Look() if root_owned else None
    for path in dict.fromkeys(directory for one in paths for directory in _directories(one)):
        if look is None:
            real, identity = os.path.realpath(path), identity_of(os.stat(path))
        else:
            trusted = look.require(path, origin=origin)
            real, identity = trusted.path, trusted.identity
        yield MountEdit(source=real, target=path, kind="d", origin=origin, identity=identity)


def _directories(path: str) -> Iterator[str]:
    name = _soname(path)
    # /lib is a link to /usr/lib, and a program's paths are written with either; one mount serves both.
    here = os.path.dirname(path)
    here = os.path.realpath(here) if here.startswith("/lib") else here
    for directory in dict.fromkeys((here, os.path.dirname(os.path.realpath(path)))):
        prefix = _prefix(directory)
        for pattern, beside, below in _PLUGINS:
            if not fnmatchcase(name, pattern):
                continue
            near = next((f"{directory}/{word}" for word in beside if os.path.isdir(f"{directory}/{word}")), None)
            if near is not None:
                yield near
            for word in below if prefix else ():
                place = f"/{word}" if prefix == "/usr" and word.startswith("etc/") else f"{prefix}/{word}"
                if os.path.isdir(place):
                    yield place


def _prefix(directory: str) -> str:
    """Where something is installed whose libraries are in ``directory``: what is above the last lib or lib64."""
    parts = directory.split("/")
    for index in range(len(parts) - 1, 0, -1):
        if parts[index] in ("lib", "lib64"):
            return "/".join(parts[:index]) or "/usr"
    return ""


def plugin_files(directory: str) -> list[str]:
    """Libraries in a directory of plug-ins and in those directly below."""
    folders = [directory, *sorted(glob.glob(f"{glob.escape(directory)}/*/"))]
    return [os.path.join(folder, name) for folder in folders for name in libraries.names_in(folder)]


def variables(beside: Sequence[MountEdit], origin: str) -> Iterator[EnvEdit]:
    """Where Open MPI finds its parts, for images whose own OPAL_PREFIX would lead it to theirs."""
    for place in beside:
        if place.target.endswith("share/openmpi"):
            yield EnvEdit(name="OPAL_PKGDATADIR", value=place.target, origin=origin)
        elif place.target.endswith("etc/openmpi"):
            yield EnvEdit(name="OPAL_SYSCONFDIR", value=place.target, origin=origin)
        elif os.path.basename(place.target) == "openmpi" or place.target.endswith("/openmpi/lib"):
            folders = (place.target, *sorted(glob.glob(f"{glob.escape(place.target)}/*")))
            plugins = next((folder for folder in folders if glob.glob(f"{glob.escape(folder)}/mca_*.so")), None)
            if plugins is not None:
                yield EnvEdit(name="OPAL_PKGLIBDIR", value=plugins, origin=origin)


def _identified(real: str, path: str) -> MpiLibrary | None:
    """What a library of the node is; None for one that is no MPI library. Kept while the file does not change."""
    try:
        identity = identity_of(os.stat(real))
    except OSError:
        return None
    with _lock:
        known = _known.get(real)
    if known is None or known[0] != identity:
        try:
            file = elf.read(real)
        except (OSError, NotElf):
            return None
        words = mpilib.mpi_words(os.fsencode(os.path.basename(real)), content(real), file)
        library = None
        if words is not None:
            pmi = words.pmi
            for plugin in glob.glob(f"{glob.escape(os.path.dirname(real))}/openmpi/**/mca_pmix_*.so", recursive=True):
                try:
                    pmi |= mpilib.plugin_pmi(content(plugin), elf.read(plugin))
                except (OSError, NotElf):
                    continue
            library = MpiLibrary(
                soname=file.soname or os.path.basename(path),
                path=path,
                family=words.family,
                version=words.version,
                pmi=mpilib.in_order(pmi if words.family == "openmpi" else words.pmi),
                product=words.product,
            )
        known = (identity, library)
        with _lock:
            if len(_known) >= _KNOWN_MAX:
                _known.clear()
            _known[real] = known
    return known[1]


_KNOWN_MAX = 64
_known: dict[str, tuple[str, MpiLibrary | None]] = {}
_lock = threading.Lock()


def content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_BYTES_MAX)
    except OSError:
        return b""
