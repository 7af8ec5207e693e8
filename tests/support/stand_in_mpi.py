"""MPI libraries of a node that are none: small files with the names, links and texts of real ones, compiled by gcc."""

from __future__ import annotations

import subprocess
from pathlib import Path

from hpcctr.host import elf
from hpcctr.host.ldcache import HostCache, flags_of

_SAYS = {
    "mpich": 'const char *says[] = {"MPICH Version:      %s", "PMI_FD"};\n'
    'const char versions[] = "4.0.2\\0" "Fri Jan 20 00:00:00 2023\\0" "14:2:2\\0" "4.0.2";\n',
    "openmpi": 'const char *says[] = {"Open MPI v4.1.4, package: none", "ompi_mpi_init"};\n',
}


def library(place: Path, soname: str, *needed: Path, text: str = "") -> Path:
    """A shared library that is linked to ``needed``."""
    place.mkdir(parents=True, exist_ok=True)
    source = place / f"{soname}.c"
    source.write_text(text or "extern int nothing;\n")
    file = place / soname
    argv = ["gcc", "-shared", "-fPIC", "-nostdlib", f"-Wl,-soname,{soname}", "-Wl,--no-as-needed"]
    subprocess.run([*argv, "-o", str(file), str(source), *map(str, needed)], check=True)
    source.unlink()
    return file


def main_library(place: Path, family: str, soname: str, *needed: Path) -> Path:
    """MPICH 4.0.2 (``mpich``) or Open MPI 4.1.4 (``openmpi``), as far as it says."""
    return library(place, soname, *needed, text=_SAYS[family] + "int MPI_Init(void) { return 0; }\n")


def cache(*files: Path) -> HostCache:
    """The node's ld.so.cache with these."""
    return HostCache([(file.name, str(file), flags_of(elf.read(str(file))) or 0) for file in files])


def mpich(root: Path) -> HostCache:
    """As Debian has it: SONAMEs of its own, UCX with plug-ins, hwloc."""
    place = root / "usr/lib"
    ucx = library(place, "libucs.so.0")
    library(place / "ucx", "libuct_cma.so.0")
    hwloc = library(place, "libhwloc.so.15")
    gfortran = library(place, "libgfortran.so.5")
    main = main_library(place, "mpich", "libmpich.so.12", ucx, hwloc)
    return cache(main, library(place, "libmpichfort.so.12", main, gfortran), ucx, hwloc, gfortran)


def open_mpi(root: Path) -> HostCache:
    """With plug-ins that need something more, and files of its own in share and etc."""
    place = root / "opt/lib"
    pal = library(place, "libopen-pal.so.40")
    main = main_library(place, "openmpi", "libmpi.so.40", pal)
    event = library(place, "libevent_core-2.1.so.7")
    library(place / "openmpi", "mca_btl_sm.so", main, event)
    for name in ("share/openmpi", "etc/openmpi"):
        (root / "opt" / name).mkdir(parents=True)
    return cache(main, pal, event)
