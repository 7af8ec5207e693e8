from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from hpcctr.errors import FeatureUnusable
from hpcctr.host import ldcache, libraries
from hpcctr.host.edits import HostEdits, MountEdit
from hpcctr.host.ldcache import HostCache
from hpcctr.host.libraries import FOLDER, inject, is_of_glibc, shown
from hpcctr.image.record import ImageFacts, Library, MpiLibrary
from tests.support import elfs

FLAGS = ldcache._FLAGS[(ldcache.node_machine(), 64)]


def cache(*paths: Path) -> HostCache:
    """A node whose ldconfig knows these libraries, by their file names."""
    return HostCache((path.name, str(path), FLAGS) for path in paths)


def image(*found: Library, mpi: tuple[MpiLibrary, ...] = ()) -> ImageFacts:
    return ImageFacts(libc="glibc", libc_version="2.36", loader="/lib64/ld.so", libraries=found, mpi=mpi)


def of_image(soname: str, *defines: str, path: str = "") -> Library:
    return Library(soname=soname, path=path or f"/usr/lib/{soname}", defines=defines)


def names(edits: HostEdits) -> list[str]:
    return [mount.target.removeprefix(f"{FOLDER}/") for mount in edits.mounts]


def test_a_library_comes_by_its_soname_with_all_that_it_needs(tmp_path: Path) -> None:
    deep = elfs.library(tmp_path / "libdeep.so.3", soname="libdeep.so.3")
    needed = elfs.library(tmp_path / "libneeded.so.2", soname="libneeded.so.2", needs={deep: []})
    top = elfs.library(tmp_path / "libtop.so.1.5.0", soname="libtop.so.1", needs={needed: []})
    host = HostCache([("libtop.so.1", str(top), FLAGS), *[(p.name, str(p), FLAGS) for p in (deep, needed)]])
    edits = inject(["libtop.so.1"], facts=image(), origin="ib.toml", host=host)
    assert names(edits) == ["libtop.so.1", "libneeded.so.2", "libdeep.so.3"]
    assert edits.library_folders == (FOLDER,)
    mount = edits.mounts[0]
    status = top.stat()
    assert (mount.source, mount.kind, mount.is_read_only, mount.origin) == (str(top), "f", True, "ib.toml")
    assert mount.identity == f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


def test_a_glob_of_names_and_a_glob_of_paths_find_libraries(tmp_path: Path) -> None:
    old = elfs.library(tmp_path / "v1.9/lib/libfabric.so.1", soname="libfabric.so.1")
    new = elfs.library(tmp_path / "v1.15/lib/libfabric.so.1", soname="libfabric.so.1")
    cm = elfs.library(tmp_path / "librdmacm.so.1", soname="librdmacm.so.1")
    (tmp_path / "v1.15/lib/libfabric.so.1.txt").write_text("not a library")
    (tmp_path / "v1.15/lib/libfabric.so.1.gone").symlink_to("gone")
    host = cache(cm)
    assert libraries.found("librdmacm*.so.*", host) == (str(cm),)
    glob = f"{tmp_path}/*/lib/libfabric.so.1*"
    assert libraries.found(glob, host)[-1] == str(old)
    edits = inject([glob, "librdma*"], facts=None, origin="x", host=host)
    assert [(Path(mount.target).name, mount.source) for mount in edits.mounts] == [
        ("libfabric.so.1", str(new)),
        ("librdmacm.so.1", str(cm)),
    ]


@pytest.mark.parametrize("word", ["libabsent.so.1", "/opt/none/libx.so", "libabsent*", "/opt/none/*.so"])
def test_a_library_the_node_has_not_is_named(word: str) -> None:
    with pytest.raises(FeatureUnusable) as raised:
        inject([word], facts=None, origin="/etc/hpcctr/profiles.d/ib.toml", host=cache())
    assert word in raised.value.message and "ib.toml" in raised.value.message and raised.value.hint


def test_search_paths_of_libraries_lead_to_what_they_need(tmp_path: Path) -> None:
    private = elfs.library(tmp_path / "vendor/private/libpriv.so.1", soname="libpriv.so.1")
    by_runpath = elfs.library(
        tmp_path / "vendor/lib/librun.so.1", soname="librun.so.1", needs={private: []}, runpath="$ORIGIN/../private"
    )
    link = tmp_path / "librun.so"
    link.symlink_to(by_runpath)
    assert names(inject([str(link)], facts=None, origin="x", host=cache())) == ["librun.so.1", "libpriv.so.1"]
    by_lib = elfs.library(
        tmp_path / "lib64/liblib.so.1",
        soname="liblib.so.1",
        needs={private: []},
        runpath=f"relative:{tmp_path}/nowhere:{tmp_path}/vendor/${{ORIGIN}}:$ORIGIN/../vendor/private",
    )
    assert names(inject([str(by_lib)], facts=None, origin="x", host=cache())) == ["liblib.so.1", "libpriv.so.1"]


def test_an_rpath_counts_for_what_the_librarys_libraries_need_and_a_runpath_does_not(tmp_path: Path) -> None:
    deep = elfs.library(tmp_path / "hidden/libdeep.so.1", soname="libdeep.so.1")
    middle = elfs.library(tmp_path / "hidden/libmiddle.so.1", soname="libmiddle.so.1", needs={deep: []})
    for kind, expected in (("rpath", ["libmiddle.so.1", "libdeep.so.1"]), ("runpath", ["libmiddle.so.1"])):
        path = tmp_path / f"lib{kind}.so.1"
        top = elfs.library(path, soname=path.name, needs={middle: []}, **{kind: str(deep.parent)})
        assert names(inject([str(top)], facts=None, origin="x", host=cache())) == [path.name, *expected]


def test_the_images_own_library_is_used_where_it_has_every_version(tmp_path: Path) -> None:
    cxx = elfs.library(
        tmp_path / "libstdc++.so.6", soname="libstdc++.so.6", defines=["GLIBCXX_3.4.20", "GLIBCXX_3.4.30"]
    )
    top = elfs.library(tmp_path / "libtop.so.1", soname="libtop.so.1", needs={cxx: ["GLIBCXX_3.4.20"]})
    host = cache(cxx)
    newer = image(of_image("libstdc++.so.6", "GLIBCXX_3.4.20", "GLIBCXX_3.4.32"))
    older = image(of_image("libstdc++.so.6", "GLIBCXX_3.4.19"))
    edits = inject([str(top)], facts=newer, origin="ib", host=host)
    assert names(edits) == ["libtop.so.1"] and edits.notes == ("ib: libstdc++.so.6 is the image's own",)
    assert names(inject([str(top)], facts=older, origin="ib", host=host)) == ["libtop.so.1", "libstdc++.so.6"]
    assert names(inject([str(top)], facts=image(), origin="ib", host=host)) == ["libtop.so.1", "libstdc++.so.6"]


def test_what_a_dependency_needs_can_bring_in_a_library_that_was_the_images_at_first(tmp_path: Path) -> None:
    base = elfs.library(tmp_path / "libbase.so.1", soname="libbase.so.1", defines=["B_1", "B_2"])
    late = elfs.library(tmp_path / "liblate.so.1", soname="liblate.so.1", needs={base: ["B_2"]})
    top = elfs.library(tmp_path / "libtop.so.1", soname="libtop.so.1", needs={base: ["B_1"], late: []})
    facts = image(of_image("libbase.so.1", "B_1"))
    edits = inject([str(top)], facts=facts, origin="x", host=cache(base, late))
    assert names(edits) == ["libtop.so.1", "liblate.so.1", "libbase.so.1"] and not edits.notes


def test_a_program_and_a_plug_in_bring_what_they_need_and_not_themselves(tmp_path: Path) -> None:
    needed = elfs.library(tmp_path / "libneeded.so.2", soname="libneeded.so.2")
    plugin = elfs.library(tmp_path / "plugins/mlx.so", needs={needed: []})
    edits = inject([], facts=image(), origin="x", host=cache(needed), beside=[str(plugin)])
    assert names(edits) == ["libneeded.so.2"]


@pytest.mark.parametrize(
    "name",
    ["libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1", "libnss_files.so.2"],
)
def test_nothing_of_glibc_is_taken(name: str, tmp_path: Path) -> None:
    assert is_of_glibc(name)
    part = elfs.library(tmp_path / name, soname=name)
    top = elfs.library(tmp_path / "libtop.so.1", soname="libtop.so.1", needs={part: []})
    assert names(inject([str(top)], facts=image(), origin="x", host=cache(part))) == ["libtop.so.1"]
    assert names(inject([f"{tmp_path}/*.so*"], facts=None, origin="x", host=cache(part))) == ["libtop.so.1"]
    with pytest.raises(FeatureUnusable, match="glibc"):
        inject([name], facts=image(), origin="x", host=cache(part))


@pytest.mark.parametrize(
    "name", ["libnsl.so.2", "libcrypt.so.1", "libnss3.so", "libcuda.so.1", "libmpi.so.12", "libc.so"]
)
def test_what_only_looks_like_glibc_is_taken(name: str) -> None:
    assert is_of_glibc(name) is (name == "libc.so")


def test_every_library_that_this_machines_glibc_packages_bring_is_of_glibc() -> None:
    lists = Path("/var/lib/dpkg/info").glob("libc6:*.list")
    paths = [Path(line) for listed in lists for line in listed.read_text().splitlines()]
    installed = {path.name for path in paths if ".so" in path.name and path.parent.name.endswith("-linux-gnu")}
    assert len(installed) > 10
    assert {name for name in installed if not is_of_glibc(name)} <= {"libcrypt.so.1"}


def test_a_replaced_library_lies_over_every_file_of_the_image_with_its_soname(tmp_path: Path) -> None:
    host_mpi = elfs.library(tmp_path / "libmpi.so.12", soname="libmpi.so.12")
    conda = MpiLibrary(soname="libmpi.so.12", path="/opt/conda/lib/libmpi.so.12.3.0", family="mpich")
    facts = image(of_image("libmpi.so.12", path="/usr/lib/libmpi.so.12.1.0"), of_image("libz.so.1"), mpi=(conda,))
    kept = inject([str(host_mpi)], facts=facts, origin="mpi", host=cache())
    assert [mount.target for mount in kept.mounts] == [f"{FOLDER}/libmpi.so.12"]
    for replace in (["libmpi.so.12"], ["*"], ["libmpi.so.*"]):
        edits = inject([str(host_mpi)], facts=facts, origin="mpi", host=cache(), replace=replace)
        assert [mount.target for mount in edits.mounts] == [
            f"{FOLDER}/libmpi.so.12",
            "/usr/lib/libmpi.so.12.1.0",
            "/opt/conda/lib/libmpi.so.12.3.0",
        ]
        assert {mount.source for mount in edits.mounts} == {str(host_mpi)}


@pytest.mark.parametrize(
    "path", ["/proc/self/exe", "/dev/null", "/usr/../proc/1", "relative", "//x", "/", "/run/hpcctr/x"]
)
def test_an_image_says_of_no_place_of_the_callers_that_its_library_is_there(tmp_path: Path, path: str) -> None:
    mpi = elfs.library(tmp_path / "libmpi.so.12", soname="libmpi.so.12")
    facts = image(of_image("libmpi.so.12", path=path))
    edits = inject([str(mpi)], facts=facts, origin="mpi", host=cache(), replace=["*"])
    assert [mount.target for mount in edits.mounts] == [f"{FOLDER}/libmpi.so.12"]


@pytest.mark.root
@pytest.mark.parametrize("what", ["file", "directory", "owner"])
def test_what_a_user_could_write_is_not_taken(tmp_path: Path, what: str) -> None:
    path = elfs.library(tmp_path / "theirs/libx.so.1", soname="libx.so.1")
    if what == "file":
        path.chmod(0o666)
    elif what == "directory":
        path.parent.chmod(0o777)
    else:
        os.chown(path, 61201, 61201)
    with pytest.raises(FeatureUnusable, match="root"):
        inject([str(path)], facts=None, origin="x", host=cache())
    assert names(inject([str(path)], facts=None, origin="x", host=cache(), root_owned=False)) == ["libx.so.1"]
    top = elfs.library(tmp_path / "libtop.so.1", soname="libtop.so.1", needs={path: []}, runpath=str(path.parent))
    assert names(inject([str(top)], facts=None, origin="x", host=cache(path))) == ["libtop.so.1"]


def test_a_library_of_another_processor_is_passed_over_by_a_glob_and_named_otherwise(tmp_path: Path) -> None:
    path = elfs.library(tmp_path / "libx.so.1", soname="libx.so.1")
    raw = bytearray(path.read_bytes())
    raw[18:20] = (22).to_bytes(2, "little")  # EM_S390
    path.write_bytes(raw)
    good = elfs.library(tmp_path / "liby.so.1", soname="liby.so.1")
    assert names(inject([f"{tmp_path}/lib*.so.1"], facts=None, origin="x", host=cache())) == [good.name]
    with pytest.raises(FeatureUnusable, match="no library of this node's kind"):
        inject([str(path)], facts=None, origin="x", host=cache())


def test_files_that_edits_show_are_found_in_directories_as_well(tmp_path: Path) -> None:
    one = elfs.library(tmp_path / "libone.so.1.0", soname="libone.so.1")
    elfs.library(tmp_path / "plugins/two.so")
    (tmp_path / "plugins/readme").write_text("")
    (tmp_path / "conf").write_text("")
    edits = HostEdits(
        mounts=(
            MountEdit(source=str(one), target="/f/libone.so.1", kind="f", origin="a"),
            MountEdit(source=str(tmp_path / "conf"), target="/f/conf", kind="f", origin="a"),
            MountEdit(source=str(tmp_path / "gone"), target="/f/gone", kind="f", origin="a"),
            MountEdit(source=str(tmp_path / "plugins"), target="/plugins", kind="d", origin="b"),
        ),
        library_folders=("/f/",),
    )
    found = [(file.target, file.soname, file.is_findable, file.is_in_directory, file.origin) for file in shown(edits)]
    assert found == [
        ("/f/libone.so.1", "libone.so.1", True, False, "a"),
        ("/plugins/two.so", "two.so", False, True, "b"),
    ]


def test_this_machines_own_libraries_close_over_what_ldd_says() -> None:
    """Of a library with many: curl's, or Python's TLS; whatever is here."""
    host = HostCache.load()
    wanted = next(name for name in ("libcurl.so.4", "libcurl-gnutls.so.4", "libssl.so.3") if host.find(name))
    path = host.find(wanted)
    assert path is not None
    edits = inject([wanted], facts=None, origin="x", host=host)
    ldd = subprocess.run(["ldd", path], check=True, capture_output=True, text=True, timeout=60).stdout.split()
    expected = {
        word for word in ldd if ".so" in word and "/" not in word and "vdso" not in word and not is_of_glibc(word)
    }
    assert set(names(edits)) == expected | {wanted}
