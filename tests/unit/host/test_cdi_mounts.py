"""Mounts of CDI files. The libraries here are empty files that stand in for a driver's."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcctr.errors import FeatureUnusable
from hpcctr.host.cdi_mounts import Sources, driver_version, remedy
from hpcctr.host.cdi_written import Mount
from hpcctr.host.edits import MountEdit
from tests.support.cdi import nvidia_libraries
from tests.support.scratch import scratch

pytestmark = pytest.mark.root

FILE = "/etc/cdi/nvidia.yaml"


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that only root can write, as those of the host's libraries."""
    with scratch("cdi") as made:
        yield Path(made)


def mount(source: object, target: str = "/usr/lib/x", *, type: str = "", options: str = "") -> Mount:
    words = tuple(options.split(",")) if options else ()
    return Mount(host_path=str(source), container_path=target, type=type, options=words)


def edit(one: Mount, *, root_owned: bool = True) -> MountEdit | str | None:
    return Sources(file=FILE, kind="nvidia.com/gpu", root_owned=root_owned).edit(one, "origin")


def refusal(one: Mount) -> FeatureUnusable:
    with pytest.raises(FeatureUnusable) as raised:
        edit(one)
    assert FILE in raised.value.message and raised.value.hint
    return raised.value


def test_a_mount_of_nvidias_is_read_only_and_known_by_what_it_is_now(place: Path) -> None:
    file = place / "libx.so.1"
    file.write_text("x")
    status = file.stat()
    assert edit(mount(file, options="ro,nosuid,nodev,rbind,rprivate")) == MountEdit(
        source=str(file),
        target="/usr/lib/x",
        kind="f",
        origin="origin",
        is_read_only=True,
        identity=f"{status.st_dev}:{status.st_ino}:1:{status.st_mtime_ns}",
    )


@pytest.mark.parametrize(
    ("options", "is_read_only", "is_noexec"),
    [
        ("", False, False),
        ("rw,bind", False, False),
        ("rbind,rw,slave,relatime", False, False),
        ("ro", True, False),
        ("rro,exec", True, False),
        ("nosuid,nodev,rbind,rprivate,noexec", False, True),
    ],
)
def test_options_are_those_of_the_mount(place: Path, options: str, is_read_only: bool, is_noexec: bool) -> None:
    found = edit(mount(place, options=options))
    assert isinstance(found, MountEdit)
    assert (found.kind, found.is_read_only, found.is_noexec) == ("d", is_read_only, is_noexec)


@pytest.mark.parametrize(
    "option", ["rshared", "shared", "suid", "dev", "unbindable", "idmap", "size=1m", "", "RO", "nosymfollow"]
)
def test_an_option_that_cannot_be_given_is_refused(place: Path, option: str) -> None:
    one = Mount(host_path=str(place), container_path="/c", type="", options=("ro", option))
    assert f"mount of /c has option {option!r}, which cannot be given" in refusal(one).message


def test_only_binds_are_given(place: Path) -> None:
    for kind in ("", "bind", "none"):
        assert isinstance(edit(mount(place, type=kind)), MountEdit)
    for kind in ("tmpfs", "proc", "overlay", "nfs"):
        assert f"is of type {kind}, and only binds can be given" in refusal(mount(place, type=kind)).message


@pytest.mark.parametrize("path", ["lib", "", "/a/../b", "..", "/.."])
def test_paths_are_plain_and_absolute(place: Path, path: str) -> None:
    assert "is not a plain absolute path" in refusal(mount(path or "x")).message
    assert "is not a plain absolute path" in refusal(mount(place, path or "x")).message


def test_paths_are_cleaned_as_they_are_for_the_runtime(place: Path) -> None:
    found = edit(mount(f"/{place}//.", "//usr/./lib//x/"))
    assert isinstance(found, MountEdit) and (found.source, found.target) == (str(place), "/usr/lib/x")


@pytest.mark.parametrize(
    "target", ["/", "/dev", "/proc", "/sys", "/run/hpcctr", "/run/hpcctr/x", "/proc/driver", "/dev/dri/by-path"]
)
def test_nothing_is_mounted_over_what_is_the_nodes_own(place: Path, target: str) -> None:
    assert "cannot be made" in refusal(mount(place, target)).message


def test_what_the_container_has_anyway_needs_no_mount() -> None:
    assert edit(mount("/dev/dri/by-path", "/dev/dri/by-path", options="rw,bind", type="none")) is None
    assert edit(mount("/proc/sys/kernel", "/proc/sys/kernel")) is None


def test_a_socket_is_given_and_other_things_are_not(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place / "socket"))
        found = edit(mount(place / "socket", options="noexec"))
    assert isinstance(found, MountEdit) and found.kind == "f" and found.is_noexec
    os.mkfifo(place / "fifo")
    for path in (place / "fifo", "/dev/null"):
        assert "is neither a file nor a directory nor a socket" in refusal(mount(path)).message
        with pytest.raises(FeatureUnusable, match="is neither file, directory nor socket"):
            edit(mount(path), root_owned=False)


def test_a_directory_stays_the_same_when_something_is_made_in_it(place: Path) -> None:
    before = edit(mount(place))
    (place / "new").mkdir()
    assert edit(mount(place)) == before


def test_a_library_that_is_gone_names_both_drivers_and_the_remedy(place: Path) -> None:
    nvidia_libraries(place, "570.86.10")
    nvidia_libraries(place, "535.1")
    error = refusal(mount(place / "libcuda.so.550.54.15"))
    assert error.message == (
        f"{FILE} is out of date: it names {place}/libcuda.so.550.54.15 of driver 550.54.15, which is gone; "
        "here is libcuda.so.570.86.10 of driver 570.86.10"
    )
    assert error.hint == f"nvidia-ctk cdi generate --output={FILE}"


def test_anything_else_that_is_gone_is_named(place: Path) -> None:
    for name in ("libcuda.so.550.54.15", "bin/nvidia-smi"):
        assert (
            refusal(mount(place / name)).message
            == f"{FILE} is out of date: it names {place}/{name}, which is not there"
        )
    (place / "file").write_text("")
    assert refusal(mount(place / "file/below")).message == f"{FILE} names {place}/file/below: Not a directory"
    (place / "dangling").symlink_to("none")
    assert f"{place}/dangling" in refusal(mount(place / "dangling")).message


@pytest.mark.parametrize("stem", ["libcuda.so", "libnvidia-ml.so"])
def test_an_old_library_beside_that_of_the_driver_in_use_is_out_of_date(place: Path, stem: str) -> None:
    nvidia_libraries(place, "550.54.15")
    assert isinstance(edit(mount(place / f"{stem}.550.54.15")), MountEdit)
    nvidia_libraries(place, "570.86.10")
    error = refusal(mount(place / f"{stem}.550.54.15"))
    assert error.message == (
        f"{FILE} is out of date: it names {place}/{stem}.550.54.15 of driver 550.54.15, and {place}/{stem}.1 is of "
        "driver 570.86.10"
    )
    assert error.hint == f"nvidia-ctk cdi generate --output={FILE}"


def test_a_daemons_socket_that_is_not_there_takes_only_its_service(place: Path) -> None:
    options = "nosuid,nodev,rbind,rprivate,noexec"
    found = edit(mount(place / "socket", "/run/nvidia-persistenced/socket", options=options))
    assert found == f"{FILE} is out of date: it names {place}/socket, which is not there: left out"


def test_a_socket_of_a_daemons_own_account_is_given(place: Path) -> None:
    (place / "daemon").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place / "daemon/socket"))
    for path in (place / "daemon/socket", place / "daemon"):
        os.chown(path, 997, 997)
    assert isinstance(edit(mount(place / "daemon/socket", options="noexec")), MountEdit)
    os.chown(place / "daemon", 61100, 61100)
    assert "not root's alone" in refusal(mount(place / "daemon/socket")).message


@pytest.mark.parametrize("whose", ["directory", "link", "entry"])
def test_a_path_that_a_user_can_make_lead_elsewhere_is_not_given(place: Path, whose: str) -> None:
    (place / "secret").mkdir(mode=0o700)
    (place / "secret/key").write_text("")
    (place / "way").mkdir()
    path = place / "way/lib"
    if whose == "directory":
        path.symlink_to("../secret/key")
        os.chown(place / "way", 61100, 61100)
    elif whose == "link":
        path.symlink_to("../secret/key")
        os.lchown(path, 61100, 61100)
    else:
        (place / "way").chmod(0o1777)
        path.write_text("")
        os.chown(path, 61100, 61100)
    error = refusal(mount(path))
    assert "not root's alone" in error.message and str(place / "way") in error.message
    assert str(edit(mount(path, options="noexec"))).endswith(": left out")
    assert isinstance(edit(mount(path), root_owned=False), MountEdit)


def test_links_of_roots_are_followed_on_every_part_of_the_way(place: Path) -> None:
    (place / "real").mkdir()
    (place / "real/lib").write_text("")
    (place / "alias").symlink_to("real")
    (place / "lib").symlink_to("alias/lib")
    found = edit(mount(place / "lib"))
    assert isinstance(found, MountEdit) and found.kind == "f" and found.source == str(place / "real/lib")
    (place / "loop").symlink_to("loop")
    assert "oo many levels" in refusal(mount(place / "loop")).message


def test_versions_of_drivers_are_read_from_names() -> None:
    assert driver_version("/usr/lib/libcuda.so.550.54.15") == "550.54.15"
    assert driver_version("/usr/lib/libcuda.so.1") == "" == driver_version("/usr/bin/nvidia-smi")


def test_every_vendor_has_its_remedy() -> None:
    assert remedy("amd.com/gpu", "/etc/cdi/amd.json") == "amd-ctk cdi generate --output=/etc/cdi/amd.json"
    assert remedy("intel.com/gpu", "/etc/cdi/i.yaml") == "intel-cdi-specs-generator --cdi-dir=/etc/cdi gpu"
    assert remedy("acme.org/x", "/etc/cdi/x.json") == "have acme.org's tool write /etc/cdi/x.json again"
