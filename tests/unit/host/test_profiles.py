from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from hpcctr.errors import FeatureUnusable, PolicyUnusable
from hpcctr.host import profiles
from hpcctr.host.edits import HostEdits, NeedEdit
from hpcctr.host.ldcache import HostCache
from hpcctr.host.libraries import FOLDER
from hpcctr.host.profiles import Profile, load
from hpcctr.image.record import ImageFacts
from tests.support import elfs

NO_CACHE = HostCache(())
GLIBC = ImageFacts(libc="glibc", libc_version="2.36", loader="/lib64/ld-linux-x86-64.so.2")
SHIPPED = Path(__file__).parents[3] / "etc/profiles"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "profiles.d"
    path.mkdir(mode=0o755)
    return path


def profile(directory: Path, text: str, name: str = "ib") -> Profile:
    (directory / f"{name}.toml").write_text(text)
    return load(str(directory))[name]


def targets(edits: HostEdits) -> dict[str, str]:
    return {mount.target: mount.source for mount in edits.mounts}


def test_profiles_have_the_names_of_their_files(directory: Path) -> None:
    for name in ("ib.toml", "cray-mpich.toml", ".ib.toml.swp", "README", ".hidden.toml"):
        (directory / name).write_text("")
    assert sorted(load(str(directory))) == ["cray-mpich", "ib"]


def test_a_site_without_profiles_has_none(tmp_path: Path) -> None:
    assert load(str(tmp_path / "none")) == {}


def test_an_edit_is_seen_and_what_stays_is_parsed_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = profile(directory, "description = 'a'")
    assert load(str(directory))["ib"] is first
    assert profile(directory, "description = 'b'").description == "b"
    monkeypatch.setattr(profiles, "parse", lambda *_, **__: pytest.fail("parsed again"))
    load(str(directory))


@pytest.mark.root
@pytest.mark.parametrize("what", ["file", "owner", "directory", "above", "link", "fifo"])
def test_a_profile_that_a_user_could_write_is_refused(directory: Path, what: str) -> None:
    file = directory / "ib.toml"
    file.write_text("")
    if what == "file":
        file.chmod(0o664)
    elif what == "owner":
        os.chown(file, 61202, 61202)
    elif what == "directory":
        directory.chmod(0o777)
    elif what == "above":
        directory.parent.chmod(0o777)
    else:
        file.unlink()
        file.symlink_to("/etc/hostname") if what == "link" else os.mkfifo(file)
    with pytest.raises(PolicyUnusable) as raised:
        load(str(directory))
    assert raised.value.hint
    if what not in ("link", "fifo"):
        assert set(load(str(directory), root_owned=False)) == {"ib"}


def test_one_wrong_file_is_an_error_that_names_it(directory: Path) -> None:
    (directory / "good.toml").write_text("")
    (directory / "wrong.toml").write_text("directories = ['/proc']")
    with pytest.raises(FeatureUnusable, match="wrong.toml: directories: '/proc'"):
        load(str(directory))


def test_libraries_directories_files_devices_variables_and_needs_become_edits(directory: Path, tmp_path: Path) -> None:
    needed = elfs.library(tmp_path / "lib/libneeded.so.1", soname="libneeded.so.1")
    elfs.library(tmp_path / "lib/libtop.so.1", soname="libtop.so.1", needs={needed: []}, runpath="$ORIGIN")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "tool").write_text("#!/bin/sh\n")
    text = f"""
        libraries = ["{tmp_path}/lib/libtop.so.1"]
        devices = ["/dev/nul*", "/dev/zero", "/dev/pts"]
        directories = ["{tmp_path}/conf.d", "{tmp_path}/lib:rw"]
        files = ["{tmp_path}/tool"]
        optional = ["/dev/pts"]
        memlock = "unlimited"
        shm-bytes = 1000
        env.FI_PROVIDER = "verbs"
    """
    one = profile(directory, text)
    edits = one.edits(GLIBC, NO_CACHE, is_asked=True)
    lib = str(tmp_path / "lib")
    assert targets(edits) == {
        str(tmp_path / "conf.d"): str(tmp_path / "conf.d"),
        lib: lib,
        str(tmp_path / "tool"): str(tmp_path / "tool"),
        f"{FOLDER}/libtop.so.1": f"{lib}/libtop.so.1",
        f"{FOLDER}/libneeded.so.1": f"{lib}/libneeded.so.1",
    }
    assert [mount.target for mount in edits.mounts if not mount.is_read_only] == [lib]
    assert {mount.target: mount.kind for mount in edits.mounts}[lib] == "d"
    assert all(mount.identity for mount in edits.mounts)
    assert {edit.origin for edit in edits.mounts} == {one.path} == {edit.origin for edit in edits.env}
    assert [(edit.path, edit.kind, edit.major, edit.minor, edit.device) for edit in edits.devices] == [
        ("/dev/null", "c", 1, 3, "ib"),
        ("/dev/zero", "c", 1, 5, "ib"),
    ]
    assert [(edit.name, edit.value) for edit in edits.env] == [("FI_PROVIDER", "verbs")]
    assert edits.needs == (
        NeedEdit(what="memlock", least=-1, origin="ib"),
        NeedEdit(what="shm", least=1000, origin="ib"),
    )
    assert edits.library_folders == (FOLDER,)


def test_a_plug_in_that_is_a_link_out_of_its_directory_leads_to_its_file_inside_as_well(
    directory: Path, tmp_path: Path
) -> None:
    """rdma-core: libibverbs/libmlx5-rdmav34.so -> ../libmlx5.so.1.24.44.0, which needs libraries of its own."""
    needed = elfs.library(tmp_path / "lib/libnl.so.1", soname="libnl.so.1")
    elfs.library(
        tmp_path / "lib/libmlx5.so.1.2", soname="libmlx5.so.1", needs={needed: []}, runpath=str(tmp_path / "lib")
    )
    plugins = tmp_path / "lib/libibverbs"
    plugins.mkdir()
    (plugins / "libmlx5-rdmav34.so").symlink_to("../libmlx5.so.1.2")
    (plugins / "gone.so").symlink_to("../gone.so.1")
    (plugins / "self.so").symlink_to("libmlx5-rdmav34.so")
    edits = profile(directory, f'directories = ["{plugins}"]').edits(GLIBC, NO_CACHE, is_asked=True)
    assert targets(edits) == {
        str(plugins): str(plugins),
        str(tmp_path / "lib/libmlx5.so.1.2"): str(tmp_path / "lib/libmlx5.so.1.2"),
        f"{FOLDER}/libnl.so.1": str(needed),
    }


def test_a_default_profile_gives_nothing_where_the_node_has_not_what_it_is_about(
    directory: Path, tmp_path: Path
) -> None:
    library = elfs.library(tmp_path / "libx.so.1", soname="libx.so.1")
    text = f"""
        libraries = ["{library}", "libabsent.so.1"]
        devices = ["/dev/infiniband-of-nobody/*"]
        directories = ["/etc/none-of-this"]
        env.A = "b"
    """
    one = profile(directory, text)
    absent = ("libabsent.so.1", "/dev/infiniband-of-nobody/*", "/etc/none-of-this")
    assert one.missing(NO_CACHE) == absent
    edits = one.edits(GLIBC, NO_CACHE, is_asked=False)
    assert edits == HostEdits(notes=edits.notes)
    assert len(edits.notes) == 1 and all(word in edits.notes[0] for word in absent)
    with pytest.raises(FeatureUnusable) as raised:
        one.edits(GLIBC, NO_CACHE, is_asked=True)
    assert all(word in raised.value.message for word in absent) and one.path in raised.value.hint
    words = ", ".join(f'"{word}"' for word in absent)
    rest = profile(directory, text.replace("env.A", f"optional = [{words}]\nenv.A")).edits(
        GLIBC, NO_CACHE, is_asked=True
    )
    assert [mount.target for mount in rest.mounts] == [f"{FOLDER}/libx.so.1"] and rest.env


@pytest.mark.parametrize("facts", [ImageFacts(libc="musl"), ImageFacts()])
def test_a_default_profile_leaves_an_image_alone_whose_loader_cannot_be_told(
    directory: Path, tmp_path: Path, facts: ImageFacts
) -> None:
    library = elfs.library(tmp_path / "libx.so.1", soname="libx.so.1")
    one = profile(directory, f'libraries = ["{library}"]')
    edits = one.edits(facts, NO_CACHE, is_asked=False)
    assert not edits.mounts and edits.notes
    # Asked for, it is the check that refuses: it knows all the libraries of a launch.
    assert one.edits(facts, NO_CACHE, is_asked=True).mounts
    variables = profile(directory, 'env.A = "b"').edits(facts, NO_CACHE, is_asked=False)
    assert variables.env


@pytest.mark.root
def test_what_a_user_could_write_is_not_shown(directory: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, 61203, 61203)
    with pytest.raises(FeatureUnusable, match="root"):
        profile(directory, f'directories = ["{theirs}"]').edits(GLIBC, NO_CACHE, is_asked=True)


def test_a_link_does_not_lead_to_what_is_no_profiles(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "etc").symlink_to("/proc/sys")
    with pytest.raises(FeatureUnusable, match=r"/proc/sys|filesystem"):
        profile(directory, f'directories = ["{tmp_path}/etc"]').edits(GLIBC, NO_CACHE, is_asked=True)


def test_a_file_among_directories_is_named(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FeatureUnusable, match="files"):
        profile(directory, f'directories = ["{tmp_path}/file"]').edits(GLIBC, NO_CACHE, is_asked=True)


def test_a_profile_that_replaces_lies_over_the_images_files(directory: Path, tmp_path: Path) -> None:
    from hpcctr.image.record import Library

    library = elfs.library(tmp_path / "libfabric.so.1", soname="libfabric.so.1")
    facts = ImageFacts(libc="glibc", libraries=(Library(soname="libfabric.so.1", path="/usr/lib/libfabric.so.1.2"),))
    one = profile(directory, f'libraries = ["{library}"]\nreplace = true')
    found = targets(one.edits(facts, NO_CACHE, is_asked=True))
    assert found == {f"{FOLDER}/libfabric.so.1": str(library), "/usr/lib/libfabric.so.1.2": str(library)}


def shipped(name: str, directory: Path, *changes: tuple[str, str]) -> Profile:
    text = (SHIPPED / f"{name}.toml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return profile(directory, text, name)


@pytest.mark.skipif(HostCache.load().find("libibverbs.so.1") is None, reason="this node has no rdma-core")
def test_the_shipped_profile_ib_brings_this_nodes_rdma_core(directory: Path) -> None:
    """Without a card: a device that is no card's stands in for /dev/infiniband/uverbs0."""
    host = HostCache.load()
    stand_in = ("/dev/infiniband/uverbs*", "/dev/nul*")
    edits = shipped("ib", directory, stand_in).edits(GLIBC, host, is_asked=True)
    assert {f"{FOLDER}/libibverbs.so.1", f"{FOLDER}/librdmacm.so.1", "/etc/libibverbs.d"} <= set(targets(edits))
    assert all(Path(source).exists() for source in targets(edits).values())
    assert edits.devices[0].path == "/dev/null" and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    if not Path("/dev/infiniband").exists():
        notes = shipped("ib", directory).edits(GLIBC, host, is_asked=False).notes
        assert notes and "/dev/infiniband/uverbs*" in notes[0]


@pytest.mark.skipif(shutil.which("squeue") is None, reason="this node has no Slurm")
def test_the_shipped_profile_slurm_client_brings_this_nodes_commands_with_all_they_need(directory: Path) -> None:
    host = HostCache.load()
    socket = ("/run/munge/munge.socket.2", "/etc/hostname")
    edits = shipped("slurm-client", directory, socket).edits(GLIBC, host, is_asked=True)
    places = targets(edits)
    assert "/usr/bin/srun" in places and any(place.endswith(("slurm-wlm", "/slurm")) for place in places)
    ldd = subprocess.run(["ldd", "/usr/bin/srun"], check=True, capture_output=True, text=True, timeout=60).stdout
    needed = [line.split()[0] for line in ldd.splitlines() if "=> /" in line]
    of_glibc = ("libc.", "libm.", "libresolv.", "libdl.", "libpthread.")
    assert {name for name in needed if not name.startswith(of_glibc)} <= {Path(place).name for place in places}
