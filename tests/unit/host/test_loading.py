from __future__ import annotations

from pathlib import Path

import pytest

from hpcctr.host.edits import HostEdits, LinkEdit, MountEdit
from hpcctr.host.elf import read
from hpcctr.host.ldcache import flags_of
from hpcctr.host.loading import told
from hpcctr.image.record import ImageFacts
from tests.support import elfs

GLIBC = ImageFacts(libc="glibc", libc_version="2.36", loader="/lib64/ld-linux-x86-64.so.2")


def mount(source: Path, target: str, kind: str = "f") -> MountEdit:
    return MountEdit(source=str(source), target=target, kind="d" if kind == "d" else "f", origin="x.toml")


def entries(edits: HostEdits) -> dict[str, str]:
    assert len({one.soname for one in edits.cache}) == len(edits.cache)
    return {one.soname: one.path for one in edits.cache}


def test_a_library_in_a_folder_is_told_by_its_soname_and_by_its_file_name(tmp_path: Path) -> None:
    driver = elfs.library(tmp_path / "libcuda.so.550.54", soname="libcuda.so.1")
    outside = elfs.library(tmp_path / "libother.so.1", soname="libother.so.1")
    edits = HostEdits(
        mounts=(mount(driver, "/usr/lib/libcuda.so.550.54"), mount(outside, "/opt/libother.so.1")),
        library_folders=("/usr/lib",),
    )
    found = told(edits, GLIBC)
    path = "/usr/lib/libcuda.so.550.54"
    assert entries(found) == {"libcuda.so.1": path, "libcuda.so.550.54": path}
    assert {one.flags for one in found.cache} == {flags_of(read(str(driver)))}
    # As ldconfig does: links that lead to the SONAME lead to something.
    assert [(link.path, link.target) for link in found.links] == [("/usr/lib/libcuda.so.1", "libcuda.so.550.54")]
    assert not found.warnings


def test_a_link_in_a_folder_is_told_by_its_own_name(tmp_path: Path) -> None:
    driver = elfs.library(tmp_path / "libcuda.so.550.54", soname="libcuda.so.1")
    links = (
        LinkEdit(path="/usr/lib/libcuda.so", target="libcuda.so.1", origin="hook"),
        LinkEdit(path="/usr/lib/libcuda.so.1", target="./libcuda.so.550.54", origin="hook"),
        LinkEdit(path="/usr/lib/dangling.so", target="libabsent.so", origin="hook"),
        LinkEdit(path="/usr/lib/loop.so", target="loop.so", origin="hook"),
    )
    edits = HostEdits(mounts=(mount(driver, "/usr/lib/libcuda.so.550.54"),), links=links, library_folders=("/usr/lib",))
    found = told(edits, GLIBC)
    assert set(entries(found)) == {"libcuda.so", "libcuda.so.1", "libcuda.so.550.54"}
    assert entries(found)["libcuda.so"] == "/usr/lib/libcuda.so" and found.links == links


def test_a_link_may_lead_to_a_soname_that_is_linked_only_here(tmp_path: Path) -> None:
    driver = elfs.library(tmp_path / "libnvidia-ml.so.550.54", soname="libnvidia-ml.so.1")
    edits = HostEdits(
        mounts=(mount(driver, "/usr/lib/libnvidia-ml.so.550.54"),),
        links=(LinkEdit(path="/usr/lib/libnvidia-ml.so", target="libnvidia-ml.so.1", origin="hook"),),
        library_folders=("/usr/lib",),
    )
    assert entries(told(edits, GLIBC))["libnvidia-ml.so"] == "/usr/lib/libnvidia-ml.so"


def test_a_directory_that_is_a_folder_is_told_with_its_libraries(tmp_path: Path) -> None:
    elfs.library(tmp_path / "driver/liba.so.1.2", soname="liba.so.1")
    (tmp_path / "driver/liba.so.1").symlink_to("liba.so.1.2")
    edits = HostEdits(mounts=(mount(tmp_path / "driver", "/opt/driver", "d"),), library_folders=("/opt/driver",))
    found = told(edits, GLIBC)
    assert entries(found) == {"liba.so.1": "/opt/driver/liba.so.1", "liba.so.1.2": "/opt/driver/liba.so.1.2"}
    assert not found.links


def test_of_two_folders_the_first_is_told(tmp_path: Path) -> None:
    one = elfs.library(tmp_path / "1/liba.so.1", soname="liba.so.1")
    two = elfs.library(tmp_path / "2/liba.so.1", soname="liba.so.1")
    edits = HostEdits(mounts=(mount(one, "/b/liba.so.1"), mount(two, "/a/liba.so.1")), library_folders=("/b", "/a"))
    assert entries(told(edits, GLIBC)) == {"liba.so.1": "/b/liba.so.1"}


def test_a_program_in_a_folder_is_no_library() -> None:
    edits = HostEdits(mounts=(mount(Path("/bin/true"), "/f/true"),), library_folders=("/f",))
    assert told(edits, GLIBC).cache == ()


@pytest.mark.parametrize(
    ("facts", "word"), [(ImageFacts(libc="musl", libc_version="1.2.5"), "musl"), (ImageFacts(), "no dynamic loader")]
)
def test_an_image_whose_loader_cannot_be_told_is_said(tmp_path: Path, facts: ImageFacts, word: str) -> None:
    library = elfs.library(tmp_path / "liba.so.1", soname="liba.so.1")
    edits = HostEdits(mounts=(mount(library, "/f/liba.so.1"),), library_folders=("/f",))
    found = told(edits, facts)
    assert found.cache == () and len(found.warnings) == 1 and word in found.warnings[0]


def test_edits_without_libraries_stay_as_they_are(tmp_path: Path) -> None:
    edits = HostEdits(mounts=(mount(tmp_path, "/etc/libibverbs.d", "d"),))
    assert told(edits, ImageFacts(libc="musl")) is edits
    assert told(HostEdits(library_folders=("/usr/lib",)), None).cache == ()


def test_an_image_of_which_nothing_was_noted_is_told(tmp_path: Path) -> None:
    library = elfs.library(tmp_path / "liba.so.1", soname="liba.so.1")
    edits = HostEdits(mounts=(mount(library, "/f/liba.so.1"),), library_folders=("/f",))
    assert set(entries(told(edits, None))) == {"liba.so.1"}
