"""Whose MPI a library is, by its bytes; the texts are those of real libraries, which tests of whole images look at."""

from __future__ import annotations

import io
from typing import cast

import pytest

from hpcctr.host.elf import ElfFile, parse
from hpcctr.image import mpilib
from tests.support.linked_images import glibc, holding, library

MPICH = ("MPICH Version:      %s\\nMPICH ABI:          %s", "PMI_FD", "14:2:2", "Thu Apr  7 12:34:45 CDT 2022", "4.0.2")


def of(content: bytes, name: bytes = b"libmpi.so.12") -> mpilib.MpiWords:
    found = mpilib.mpi_words(name, content, parse(io.BytesIO(content)))
    assert found is not None
    return found


def nothing() -> ElfFile:
    return parse(io.BytesIO(library("libnothing.so")))


@pytest.mark.parametrize(
    ("texts", "needed", "expected"),
    [
        (MPICH, (), ("mpich", "MPICH", "4.0.2", {"pmi1"})),
        ((*MPICH, "cmd=fullinit"), (), ("mpich", "MPICH", "4.0.2", {"pmi1", "pmi2"})),
        (MPICH[:1], ("libpmi.so.0",), ("mpich", "MPICH", "", {"pmi1"})),
        (MPICH[:1], ("libpmi2.so.0",), ("mpich", "MPICH", "", {"pmi2"})),
        (MPICH[:1], ("libpmix.so.2",), ("mpich", "MPICH", "", {"pmix"})),
        (
            ("CRAY MPICH version 8.1.29.26 (ANL base 3.4a2)", "MPICH Version: %s"),
            ("libpmi.so.0", "libpmi2.so.0"),
            ("mpich", "Cray MPICH", "8.1.29.26", {"pmi1", "pmi2"}),
        ),
        (
            ("Intel(R) MPI Library %s for Linux* OS", "2021.19.0", "PMI_FD", "3.4a2", "12:0:0"),
            (),
            ("mpich", "Intel MPI", "2021.19.0", {"pmi1"}),
        ),
        (
            ("MVAPICH2 Version      : %s", "12:0:0", "Mon Mar  1 22:00:00 EST 2021", "2.3.7", "PMI_FD"),
            (),
            ("mpich", "MVAPICH", "2.3.7", {"pmi1"}),
        ),
        (("ompi_mpi_init", "Open MPI v5.0.7, package: x", "PMI_FD"), (), ("openmpi", "Open MPI", "5.0.7", {"pmix"})),
        (
            ("ompi_mpi_init", "Open MPI v%d.%d.%d", "Whether this 4.1.4 installation supports storing of data"),
            (),
            ("openmpi", "Open MPI", "4.1.4", set()),
        ),
        (("something else",), (), ("unknown", "", "", set())),
    ],
)
def test_products_are_told_apart(texts: tuple[str, ...], needed: tuple[str, ...], expected: tuple[object, ...]) -> None:
    words = of(holding("libmpi.so.12", *texts, needed=needed))
    assert (words.family, words.product, words.version, set(words.pmi)) == expected


def test_the_standards_interface_is_a_family_of_its_own() -> None:
    words = of(holding("libmpi_abi.so.1", *MPICH), b"libmpi_abi.so.1")
    assert (words.family, words.product) == ("mpi-abi", "MPICH")


def test_a_library_without_mpi_init_is_none() -> None:
    content = library("libmpi_gtl_cuda.so.0")
    assert mpilib.mpi_words(b"libmpi_gnu.so.12", content, parse(io.BytesIO(content))) is None


@pytest.mark.parametrize(
    "name",
    ["libmpi.so", "libmpi.so.40.30.4", "libmpich.so.12", "libmpi_abi.so.1", "libmpi_gnu_123.so.12", "libmpi_ibm.so.3"],
)
def test_names_of_mpi_libraries(name: str) -> None:
    assert mpilib.is_mpi_name(name.encode())


@pytest.mark.parametrize(
    "name",
    [
        "libmpicxx.so.12",
        "libmpifort.so.12",
        "libmpi_mpifh.so.40",
        "libmpi_cxx.so",
        "libmpi.so.12.debug",
        "mpi.so",
        "libmpi.a",
    ],
)
def test_names_of_other_libraries(name: str) -> None:
    assert not mpilib.is_mpi_name(name.encode())


def test_pmix_says_its_version() -> None:
    assert (
        mpilib.pmix_version(holding("libpmix.so.2", "OpenPMIx 5.0.7a1 (PMIx Standard: 5.1, Stable ABI: 5.0)"))
        == "5.0.7a1"
    )
    inside = holding("libopen-pal.so.40", "PMIX_SERVER_URI2", "v4.1.8", "4.1.8", "3.2.5a1", "1.2.11")
    assert mpilib.pmix_version(inside) == "3.2.5a1"
    assert mpilib.pmix_version(holding("libpmix.so.2", "3.2.5", "4.4.4", "PMIX_SERVER_URI2")) == ""
    assert mpilib.pmix_version(b"") == ""


def test_glibc_says_its_version_or_its_newest_symbols_do() -> None:
    said = library(
        "libc.so.6",
        "GLIBC_2.2.5",
        "GLIBC_2.34",
        body='const char a[] = "GNU C Library (x) stable release version 2.36.";',
    )
    for content, version in ((said, "2.36"), (glibc("GLIBC_2.9", "GLIBC_2.34", "GLIBC_PRIVATE"), "2.34")):
        assert mpilib.glibc_version(content, parse(io.BytesIO(content))) == version
    assert mpilib.glibc_version(b"", nothing()) == ""


def test_musl_says_its_version() -> None:
    assert mpilib.musl_version(b"\x001.2.5\0musl libc (x86_64)\nVersion %s") == "1.2.5"
    assert mpilib.musl_version(b"musl libc") == ""
    assert mpilib.musl_version(b"\x001.2.5\0") is None


def test_plugins_say_what_they_are_linked_to() -> None:
    content = holding("mca_ess_pmi.so", needed=("libpmi.so.0",))
    assert mpilib.plugin_pmi(content, parse(io.BytesIO(content))) == {"pmi1"}
    assert mpilib.plugin_pmi(b"mca_pmix_isolated_component\0mca_pmix_base_selected", nothing()) == set()
    assert mpilib.in_order(frozenset(cast(set[mpilib.Pmi], {"pmix", "pmi1"}))) == ("pmi1", "pmix")
