"""What a library's bytes say about MPI, PMIx and libc: whose it is, which version, and what it says to a launcher.

Libraries have no field for any of that. What is looked for here are texts they print, the names of environment
variables they read, words of the wire protocols they speak, and what they are linked to (DT_NEEDED). Compared with
the libraries of Debian 12 and 13 and with the wheels of MPICH 5, Open MPI 5 and Intel MPI 2021.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from hpcctr.host.elf import ElfFile

Pmi = Literal["pmi1", "pmi2", "pmix"]
Family = Literal["mpich", "openmpi", "mpi-abi", "unknown"]

#: libmpi.so.12, libmpich.so.12.2.2, libmpi_abi.so.1, and those of Cray and IBM, one for each compiler. Not those for
#: one language (libmpifort, libmpi_mpifh, libmpicxx, …), which need one of these.
_MPI_NAME = re.compile(
    rb"libmpi(?:ch)?(?:_(?:abi|ibm|mt|dbg|(?:gnu|cray|intel|nvidia|aocc|amd|pgi)(?:_\w+)?))?\.so(?:\.\d+){0,4}"
)
_PMIX_NAME = re.compile(rb"libpmix\.so(?:\.\d+){0,4}")
#: Open MPI's plugins that find the launcher, and the library that has them where they are no files of their own.
_PLUGIN_NAME = re.compile(rb"mca_(?:pmix_\w+|ess_pmi)\.so|libopen-pal\.so(?:\.\d+){0,4}")

_VERSION = rb"\d{1,4}(?:\.\d{1,4}){1,4}(?:[a-z]{1,5}\d{0,4})?"
_ALONE = re.compile(rb"\0(" + _VERSION + rb")\0")
#: MPICH's libtool version, which lies among its other version texts (src/mpi/init/initinfo.c and its successors).
#: Written so that it begins with what is rare: a library has tens of megabytes.
_MPICH_ABI = re.compile(rb":(?:(?<=\0\d:)|(?<=\0\d\d:)|(?<=\0\d\d\d:))\d{1,3}:\d{1,3}\0")
_AROUND = 256
_RELEASES = {
    "Cray MPICH": (re.compile(rb"CRAY MPICH version (" + _VERSION + rb")"),),
    "Intel MPI": (
        re.compile(rb"\0(20\d\d(?:\.\d{1,4}){1,3})\0"),
        re.compile(rb"Intel\(R\) MPI Library[ ,]*(?:Version )?(20\d\d(?:\.\d{1,4}){0,3})"),
    ),
    "Open MPI": (
        re.compile(rb"Open MPI v(" + _VERSION + rb")[, \0]"),
        re.compile(rb"Whether this (?:Open MPI )?(" + _VERSION + rb") installation supports"),
        re.compile(rb"\0v(" + _VERSION + rb")\0"),
    ),
}
_PMIX_RELEASE = re.compile(rb"PMIx (" + _VERSION + rb") \(PMIx Standard")
_PMIX_ALONE = re.compile(rb"\0([2-9]\.\d\.\d{1,2}(?:[a-z]{1,2}\d{1,2})?)\0")
#: Components of Open MPI's framework pmix that carry PMIx, or Slurm's libpmi and libpmi2.
_COMPONENT = re.compile(rb"mca_pmix_(ext\d?x?|pmix\d\w{0,3}|s1|s2)(?:_component|\.so|\0)")
_GLIBC_RELEASE = re.compile(rb"GNU C Library [^\n\0]{0,100}release version (\d+\.\d+(?:\.\d+)?)")
_MUSL_RELEASE = re.compile(rb"\0([01]\.\d{1,2}\.\d{1,3}(?:[-_][\w-]{1,30})?)\0")
_NEEDED: tuple[tuple[str, Pmi], ...] = (("libpmi.so", "pmi1"), ("libpmi2.so", "pmi2"), ("libpmix.so", "pmix"))
_ORDER: tuple[Pmi, ...] = ("pmi1", "pmi2", "pmix")


@dataclass(frozen=True, kw_only=True)
class MpiWords:
    """What an MPI library says of itself."""

    family: Family
    product: str
    version: str
    pmi: frozenset[Pmi]
    #: It loads a libpmix when a program starts, if there is one.
    may_load_pmix: bool


def is_mpi_name(name: bytes) -> bool:
    """Whether a file of that name may be an MPI library."""
    return _MPI_NAME.fullmatch(name) is not None


def is_pmix_name(name: bytes) -> bool:
    """Whether a file of that name may be a PMIx library."""
    return _PMIX_NAME.fullmatch(name) is not None


def is_plugin_name(name: bytes) -> bool:
    """Whether a file of that name may be how an Open MPI finds its launcher."""
    return _PLUGIN_NAME.fullmatch(name) is not None


def mpi_words(name: bytes, content: bytes, elf: ElfFile) -> MpiWords | None:
    """None for a library without MPI_Init."""
    if b"MPI_Init\0" not in content:
        return None
    product = _product(content)
    pmi = needed_pmi(elf)
    if product not in ("", "Open MPI") and b"PMI_FD\0" in content:
        # MPICH's own clients, both over the descriptor in PMI_FD. Open MPI knows the variable's name only to remove it.
        pmi |= {"pmi1"}
        if b"fullinit" in content:
            pmi |= {"pmi2"}
    if b"PMIX_SERVER_URI" in content:
        # Where a client finds its server: it is linked statically.
        pmi |= {"pmix"}
    version = _version(product, content)
    if product == "Open MPI" and version.partition(".")[0] not in ("", "1", "2", "3", "4"):
        # From 5.0 on it knows nothing else.
        pmi |= {"pmix"}
    family: Family = "unknown"
    if name.startswith(b"libmpi_abi"):
        family = "mpi-abi"
    elif product:
        family = "openmpi" if product == "Open MPI" else "mpich"
    return MpiWords(family=family, product=product, version=version, pmi=pmi, may_load_pmix=b"libpmix.so" in content)


def needed_pmi(elf: ElfFile) -> frozenset[Pmi]:
    """By the libraries it is linked to."""
    return frozenset(word for name in elf.needed for library, word in _NEEDED if name.startswith(library))


def plugin_pmi(content: bytes, elf: ElfFile) -> frozenset[Pmi]:
    """What a plugin of Open MPI 1 to 4, or the library that has them all, gives it."""
    words = set(needed_pmi(elf))
    for found in _bounded(_COMPONENT, content, 64):
        words.add({b"s1": "pmi1", b"s2": "pmi2"}.get(found, "pmix"))  # type: ignore[arg-type]
    return frozenset(words)


def in_order(pmi: frozenset[Pmi]) -> tuple[Pmi, ...]:
    """``pmi1``, ``pmi2``, ``pmix``, as far as they are there."""
    return tuple(word for word in _ORDER if word in pmi)


def pmix_version(content: bytes) -> str:
    """Of a PMIx library, or of one that has it inside; empty when it does not say."""
    said = _first((_PMIX_RELEASE,), content, hint=b"(PMIx Standard")
    if said or b"PMIX_SERVER_URI" not in content:
        return said
    # PMIx 3, as Open MPI 4 has it inside: its version stands alone, beside that of the Open MPI.
    alone = {found.decode("ascii") for found in _bounded(_PMIX_ALONE, content, 64)}
    others = {found.decode("ascii") for found in _bounded(_RELEASES["Open MPI"][2], content, 64)}
    left = alone - others
    return left.pop() if len(left) == 1 else ""


def glibc_version(content: bytes, elf: ElfFile) -> str:
    """Of a libc.so.6: what it says when it is run; else the newest symbol version it defines. Empty for no glibc."""
    versions = [_numbers(name[6:]) for name in elf.defines if re.fullmatch(r"GLIBC_\d{1,3}\.\d{1,3}(\.\d{1,3})?", name)]
    if not versions:
        return ""
    said = _first((_GLIBC_RELEASE,), content, hint=b"GNU C Library ")
    return said or ".".join(map(str, max(versions)))


def musl_version(content: bytes) -> str | None:
    """Of musl's libc, which is its loader as well; None for no musl."""
    if b"musl libc" not in content:
        return None
    found = _MUSL_RELEASE.search(content)
    return found[1].decode("ascii") if found else ""


def _product(content: bytes) -> str:
    if b"Intel(R) MPI Library" in content:
        return "Intel MPI"
    if b"CRAY MPICH" in content:
        return "Cray MPICH"
    if b"MVAPICH2 Version" in content or b"MVAPICH Version" in content:
        return "MVAPICH"
    if b"MPICH Version" in content or b"MPICH2 Version" in content:
        return "MPICH"
    return "Open MPI" if b"ompi_mpi_init" in content or b"Open MPI v" in content else ""


def _version(product: str, content: bytes) -> str:
    said = _first(_RELEASES.get(product, ()), content)
    if said or product in ("", "Open MPI"):
        return said
    for match in islice(_MPICH_ABI.finditer(content), 16):
        near = content[max(match.start() - _AROUND, 0) : match.start() + _AROUND].replace(b"\0", b"\0\0")
        if found := _ALONE.findall(near):
            return str(found[-1], "ascii")
    return ""


def _first(patterns: tuple[re.Pattern[bytes], ...], content: bytes, *, hint: bytes = b"") -> str:
    """The first group of the first pattern that is found; with ``hint`` only around the first of those words."""
    if hint:
        place = content.find(hint)
        content = content[max(place - _AROUND, 0) : place + _AROUND] if place >= 0 else b""
    for pattern in patterns:
        if found := pattern.search(content):
            return found[1].decode("ascii")
    return ""


def _bounded(pattern: re.Pattern[bytes], content: bytes, most: int) -> list[bytes]:
    return [match[1] for match in islice(pattern.finditer(content), most)]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))
