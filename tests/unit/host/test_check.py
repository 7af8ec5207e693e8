from __future__ import annotations

from pathlib import Path

import pytest

from hpcctr.host.check import problems
from hpcctr.host.edits import HostEdits, MountEdit
from hpcctr.host.libraries import FOLDER
from hpcctr.image.record import ImageFacts, Library
from tests.support import elfs


def glibc(*versions: str) -> Library:
    return Library(soname="libc.so.6", path="/lib/libc.so.6", defines=versions)


def image(*libraries: Library, version: str = "2.36") -> ImageFacts:
    return ImageFacts(libc="glibc", libc_version=version, loader="/lib64/ld.so", libraries=libraries)


BOOKWORM = image(glibc("GLIBC_2.2.5", "GLIBC_2.34", "GLIBC_2.36"))


def edits(*files: Path, folder: str = FOLDER, directories: tuple[Path, ...] = ()) -> HostEdits:
    mounts = [MountEdit(source=str(p), target=f"{folder}/{p.name}", kind="f", origin="/p/ib.toml") for p in files]
    mounts += [MountEdit(source=str(p), target=str(p), kind="d", origin="/p/ib.toml") for p in directories]
    return HostEdits(mounts=tuple(mounts), library_folders=(folder,))


@pytest.fixture
def libc(tmp_path: Path) -> Path:
    defines = ["GLIBC_2.2.5", "GLIBC_2.34", "GLIBC_2.38", "GLIBC_2.41"]
    return elfs.library(tmp_path / "stub/libc.so.6", soname="libc.so.6", defines=defines)


def test_what_fits_is_no_problem(tmp_path: Path, libc: Path) -> None:
    library = elfs.library(tmp_path / "libcuda.so.550.54", soname="libcuda.so.1", needs={libc: ["GLIBC_2.34"]})
    assert problems(edits(library), BOOKWORM) == ()
    assert problems(HostEdits(), BOOKWORM) == problems(HostEdits(), None) == ()


def test_a_library_that_needs_a_newer_glibc_is_refused_with_both_versions_and_a_remedy(
    tmp_path: Path, libc: Path
) -> None:
    needs = {libc: ["GLIBC_2.34", "GLIBC_2.38"]}
    library = elfs.library(tmp_path / "libcuda.so.550.54", soname="libcuda.so.1", needs=needs)
    (problem,) = problems(edits(library), BOOKWORM)
    assert problem.level == "refuse"
    assert problem.text == "libcuda.so.550.54 of the node needs GLIBC_2.38 of libc.so.6, and the image has glibc 2.36"
    newer = "use an image with glibc 2.38 or newer (Ubuntu 24.04, Rocky Linux 10, Debian 13 or newer)"
    assert problem.hint == f"{newer}, or leave ib out"


def test_many_libraries_that_lack_the_same_are_one_problem(tmp_path: Path, libc: Path) -> None:
    files = [
        elfs.library(tmp_path / f"lib{n}.so.1", soname=f"lib{n}.so.1", needs={libc: [version]})
        for n, version in enumerate(["GLIBC_2.38", "GLIBC_2.41", "GLIBC_2.38", "GLIBC_2.34"])
    ]
    (problem,) = problems(edits(*files), BOOKWORM)
    assert problem.text.startswith("lib1.so.1 (and 2 more) of the node needs GLIBC_2.41 of libc.so.6")


def test_a_newer_cxx_library_is_named_with_what_the_image_has(tmp_path: Path) -> None:
    cxx = elfs.library(
        tmp_path / "stub/libstdc++.so.6", soname="libstdc++.so.6", defines=["GLIBCXX_3.4.32", "CXXABI_1.3.15"]
    )
    needs = {cxx: ["GLIBCXX_3.4.32", "CXXABI_1.3.15"]}
    library = elfs.library(tmp_path / "libmpi_cxx.so.40", soname="libmpi_cxx.so.40", needs=needs)
    old = Library(soname="libstdc++.so.6", path="/x", defines=("GLIBCXX_3.4.9", "GLIBCXX_3.4.30", "CXXABI_1.3.13"))
    (problem,) = problems(edits(library), image(glibc(), old))
    assert problem.level == "refuse" and "GLIBCXX_3.4.32 of libstdc++.so.6" in problem.text
    assert problem.text.endswith("the image's has GLIBCXX_3.4.30")
    assert "image with a newer libstdc++.so.6" in problem.hint
    # The node's own comes with it: then it is the one that is asked.
    assert problems(edits(library, cxx), image(glibc())) == ()


def test_what_neither_node_nor_image_has_is_refused_where_we_looked_for_it(tmp_path: Path) -> None:
    absent = elfs.library(tmp_path / "stub/libabsent.so.1", soname="libabsent.so.1")
    library = elfs.library(tmp_path / "libx.so.1", soname="libx.so.1", needs={absent: []})
    (problem,) = problems(edits(library), image(glibc()))
    assert problem.level == "refuse"
    assert problem.text == "libx.so.1 of the node needs libabsent.so.1, which neither the node nor the image has"
    # A driver's files are a vendor's list, with display libraries that few images can load and few programs ask for.
    assert problems(edits(library, folder="/usr/lib/x86_64-linux-gnu"), image(glibc())) == ()


def test_a_plug_in_that_does_not_load_is_a_warning(tmp_path: Path, libc: Path) -> None:
    for name in ("libmlx5-rdmav34.so", "libefa-rdmav34.so"):
        elfs.library(tmp_path / "plugins" / name, needs={libc: ["GLIBC_2.38"]})
    (problem,) = problems(edits(directories=(tmp_path / "plugins",)), BOOKWORM)
    assert problem.level == "warn" and "(and 1 more)" in problem.text and "GLIBC_2.38" in problem.text


def test_a_node_that_is_older_than_the_image_is_noted(tmp_path: Path) -> None:
    library = elfs.library(
        tmp_path / "libibverbs.so.1", soname="libibverbs.so.1", defines=["IBVERBS_1.1", "IBVERBS_PRIVATE_34"]
    )
    newer = ("IBVERBS_1.1", "IBVERBS_1.14", "IBVERBS_PRIVATE_50")
    facts = image(glibc(), Library(soname="libibverbs.so.1", path="/x", defines=newer))
    (problem,) = problems(edits(library), facts)
    assert problem.level == "note"
    assert problem.text.startswith(
        "libibverbs.so.1 of the node takes the place of the image's and lacks its IBVERBS_1.14:"
    )


def test_private_versions_are_no_reason_to_warn(tmp_path: Path) -> None:
    library = elfs.library(tmp_path / "libibverbs.so.1", soname="libibverbs.so.1", defines=["IBVERBS_PRIVATE_34"])
    theirs = Library(soname="libibverbs.so.1", path="/x", defines=("IBVERBS_PRIVATE_50",))
    assert problems(edits(library), image(glibc(), theirs)) == ()


def test_a_library_without_versions_takes_every_need(tmp_path: Path) -> None:
    """ld.so says so, and goes on."""
    nl = elfs.library(tmp_path / "stub/libnl-3.so.200", soname="libnl-3.so.200", defines=["libnl_3"])
    library = elfs.library(tmp_path / "libcxi.so.1", soname="libcxi.so.1", needs={nl: ["libnl_3"]})
    assert problems(edits(library), image(glibc(), Library(soname="libnl-3.so.200", path="/x"))) == ()


@pytest.mark.parametrize("facts", [ImageFacts(libc="musl", libc_version="1.2.5"), ImageFacts()])
def test_an_image_without_glibc_takes_no_library(tmp_path: Path, facts: ImageFacts) -> None:
    library = elfs.library(tmp_path / "libx.so.1", soname="libx.so.1")
    (problem,) = problems(edits(library), facts)
    assert problem.level == "refuse" and "libx.so.1 of the node cannot be loaded" in problem.text
    assert "image with glibc" in problem.hint
    assert problems(HostEdits(mounts=(MountEdit(source="/etc/hosts", target="/x", kind="f", origin="x"),)), facts) == ()


def test_an_image_of_which_nothing_was_noted_is_a_warning(tmp_path: Path) -> None:
    library = elfs.library(tmp_path / "libx.so.1", soname="libx.so.1")
    (problem,) = problems(edits(library), None)
    assert problem.level == "warn" and problem.hint


def test_an_images_words_do_not_reach_a_terminal(tmp_path: Path, libc: Path) -> None:
    library = elfs.library(tmp_path / "libx.so.1", soname="libx.so.1", needs={libc: ["GLIBC_2.38"]})
    facts = image(glibc("GLIBC_2.2.5", "GLIBC_\x1b[2J"), version="2\x1b[2J\n")
    for problem in problems(edits(library), facts):
        assert problem.text.isprintable() and problem.hint.isprintable()


def test_refusals_come_first(tmp_path: Path, libc: Path) -> None:
    old = elfs.library(tmp_path / "libold.so.1", soname="libold.so.1", defines=["O_1"])
    new = elfs.library(tmp_path / "libnew.so.1", soname="libnew.so.1", needs={libc: ["GLIBC_2.41"]})
    facts = image(glibc("GLIBC_2.2.5"), Library(soname="libold.so.1", path="/x", defines=("O_1", "O_2")))
    assert [problem.level for problem in problems(edits(old, new), facts)] == ["refuse", "note"]
