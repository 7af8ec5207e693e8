"""What the node's MPI libraries are, what belongs to each, and where they load from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcctr.host import node_mpi
from hpcctr.host.ldcache import HostCache
from hpcctr.host.node_mpi import host_mpis, places
from tests.support import stand_in_mpi


def test_a_library_says_what_it_is_and_its_parts_lie_beside_it(tmp_path: Path) -> None:
    host = stand_in_mpi.mpich(tmp_path)
    (found,) = host_mpis(None, host)
    library = found.library
    assert (library.family, library.product, library.version, library.pmi) == ("mpich", "MPICH", "4.0.2", ("pmi1",))
    assert dict(found.parts) == {"libmpichfort.so.12": str(tmp_path / "usr/lib/libmpichfort.so.12")}
    assert node_mpi.shown(library) == "MPICH 4.0.2"


def test_one_file_with_several_names_is_one_mpi(tmp_path: Path) -> None:
    file = stand_in_mpi.main_library(tmp_path, "mpich", "libmpich.so.12.2.2")
    for name in ("libmpich.so.12", "libmpi.so.12", "libmpi.so"):
        (tmp_path / name).symlink_to(file.name)
    assert len(host_mpis(None, stand_in_mpi.cache(tmp_path / "libmpich.so.12", tmp_path / "libmpi.so.12"))) == 1


def test_a_library_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    file = stand_in_mpi.main_library(tmp_path, "mpich", "libmpi.so.12")
    host = stand_in_mpi.cache(file)
    assert [found.library.product for found in host_mpis(None, host)] == ["MPICH"]
    newer = stand_in_mpi.main_library(tmp_path / "newer", "openmpi", "libmpi.so.12")
    newer.rename(file)
    assert [found.library.product for found in host_mpis(None, host)] == ["Open MPI"]


def test_a_file_with_the_name_of_an_mpi_that_is_none_does_not_count(tmp_path: Path) -> None:
    named = stand_in_mpi.library(tmp_path, "libmpi.so.12")
    gone = stand_in_mpi.library(tmp_path, "libmpi.so.40")
    text = stand_in_mpi.library(tmp_path, "libmpich.so.12")
    host = stand_in_mpi.cache(named, gone, text)
    gone.unlink()
    text.write_text("no ELF file")
    assert host_mpis(None, host) == ()


@pytest.mark.parametrize(
    ("library", "directories", "wanted"),
    [
        (
            "usr/lib/libopen-pal.so.40",
            ["usr/lib/openmpi/lib", "usr/lib/openmpi/include", "usr/share/openmpi"],
            ["usr/lib/openmpi/lib", "usr/share/openmpi"],
        ),
        (
            "usr/lib64/openmpi/lib/libopen-pal.so.40",
            ["usr/lib64/openmpi/lib/openmpi", "usr/lib64/openmpi/share/openmpi", "usr/share/openmpi"],
            ["usr/lib64/openmpi/lib/openmpi", "usr/lib64/openmpi/share/openmpi"],
        ),
        ("opt/ucx/lib/libucs.so.0", ["opt/ucx/lib/ucx", "opt/ucx/lib/libfabric"], ["opt/ucx/lib/ucx"]),
        ("opt/ofi/lib/libfabric.so.1", ["opt/ofi/lib/libfabric"], ["opt/ofi/lib/libfabric"]),
        ("opt/x/lib/libhwloc.so.15", ["opt/x/lib/ucx"], []),
    ],
)
def test_directories_of_plug_ins_are_shown_at_the_same_place(
    tmp_path: Path, library: str, directories: list[str], wanted: list[str]
) -> None:
    for name in directories:
        (tmp_path / name).mkdir(parents=True)
    file = tmp_path / library
    stand_in_mpi.library(file.parent, file.name)
    mounts = list(places([str(file)], "test", root_owned=False))
    assert [mount.target for mount in mounts] == [str(tmp_path / name) for name in wanted]
    assert all(mount.source == os.path.realpath(mount.target) and mount.is_read_only for mount in mounts)


def test_a_node_without_a_cache_has_no_mpi() -> None:
    assert host_mpis(None, HostCache(())) == ()
