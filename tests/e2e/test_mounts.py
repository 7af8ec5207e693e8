"""What a program sees: the image as its root, and the caller's own directories."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import Profile
from tests.support.node import node
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.usefixtures("module_leaves_nothing")]


@pytest.fixture
def mine(profile: Profile, place: Path) -> Path:
    """A directory of the caller's outside home and /tmp, with a file ``in``."""
    directory = place / "data"
    directory.mkdir()
    (directory / "in").write_text("data\n")
    for path in (directory, directory / "in"):
        os.chown(path, profile.uid, profile.uid)
    return directory


def test_the_root_is_the_image_and_cannot_be_written(profile: Profile) -> None:
    done = profile.run("sh", "-c", "ls /bin/busybox; touch /x; touch /bin/x; touch /etc/x", check=False)
    assert done.stdout == b"/bin/busybox\n", done.stderr
    assert done.stderr.count(b"Read-only file system") == 3


def test_the_root_honours_neither_set_user_id_nor_devices(profile: Profile) -> None:
    line = next(line for line in profile.output("cat", "/proc/self/mountinfo").splitlines() if " - overlay " in line)
    assert {"ro", "nosuid", "nodev"} <= set(line.split()[5].split(","))


def test_home_tmp_and_working_directory_are_the_callers(profile: Profile) -> None:
    name = f"seen-{os.getpid()}"
    for directory in (profile.home, "/tmp"):
        profile.run("sh", "-c", f"echo inside > {directory}/{name}")
        path = Path(directory) / name
        assert path.read_text() == "inside\n"
        assert path.stat().st_uid == profile.uid
        path.unlink()
    assert profile.output("pwd") == f"{profile.native('pwd')}"


def test_a_working_directory_anywhere_comes_along(profile: Profile, mine: Path) -> None:
    assert profile.output("sh", "-c", "pwd; cat in", cwd=mine) == f"{mine}\ndata\n"


def test_a_working_directory_of_the_system_is_the_images(profile: Profile) -> None:
    assert profile.output("sh", "-c", "pwd; test -e /etc/debian_version || echo image", cwd="/etc") == "/etc\nimage\n"
    assert Path("/etc/debian_version").exists()


def test_directories_named_by_variables_come_along(profile: Profile, mine: Path) -> None:
    environment = {"TMPDIR": str(mine), "PMIX_SERVER_TMPDIR": str(mine / "gone"), "XDG_RUNTIME_DIR": str(mine)}
    script = 'cat "$TMPDIR/in"; echo "${PMIX_SERVER_TMPDIR-dropped}"'
    assert profile.output("sh", "-c", script, env=environment) == "data\ndropped\n"


def test_a_volume_is_where_it_was_asked_for(profile: Profile, mine: Path) -> None:
    assert profile.output("cat", "/there/deep/in", flags=["-v", f"{mine}:/there/deep"]) == "data\n"
    assert profile.output("cat", f"{mine}/in", flags=["-v", str(mine)]) == "data\n"
    assert profile.output("cat", "/one", flags=["-v", f"{mine}/in:/one"]) == "data\n"


def test_a_volume_may_replace_something_of_the_image(profile: Profile, mine: Path) -> None:
    assert profile.output("cat", "/etc/hosts", flags=["-v", f"{mine}/in:/etc/hosts"]) == "data\n"
    assert profile.output("ls", "/usr", flags=["-v", f"{mine}:/usr"]) == "in\n"


def test_a_read_only_volume_cannot_be_written_and_another_can(profile: Profile, mine: Path) -> None:
    done = profile.run("sh", "-c", "echo x > /ro/new", flags=["-v", f"{mine}:/ro:ro"], check=False)
    assert b"Read-only file system" in done.stderr
    profile.run("sh", "-c", "echo x > /rw/new", flags=["-v", f"{mine}:/rw"])
    assert (mine / "new").read_text() == "x\n"


def test_a_volume_is_opened_with_the_callers_rights(gateway: Profile, place: Path) -> None:
    secret = place / "secret"
    secret.mkdir(mode=0o700)
    (secret / "file").write_text("root's")
    assert "Permission denied" in gateway.refusal("true", flags=["-v", f"{secret}/file:/x"])
    done = gateway.run("ls", "/x", flags=["-v", f"{secret}:/x"], check=False)
    assert b"ermission denied" in done.stderr


def test_a_volume_inside_another_is_on_top_of_it(profile: Profile, mine: Path) -> None:
    (mine / "sub").mkdir()
    script = "ls /m; ls /m/sub"
    assert (
        profile.output("sh", "-c", script, flags=["-v", f"{mine}:/m", "-v", f"{mine}:/m/sub"]) == "in\nsub\nin\nsub\n"
    )


def test_without_home_there_is_none(gateway: Profile) -> None:
    done = gateway.run("ls", gateway.home, flags=["--no-home"], cwd="/", check=False)
    assert b"No such file" in done.stderr


def test_workdir_says_where_it_starts(profile: Profile) -> None:
    assert profile.output("pwd", flags=["-w", "/bin"]) == "/bin\n"


def test_the_kernels_trees_are_the_nodes(profile: Profile) -> None:
    script = "cat /proc/sys/kernel/random/boot_id; ls /dev | head -3; ls -d /sys/kernel; ls /proc/1/cmdline"
    assert profile.output("sh", "-c", script) == profile.native("sh", "-c", script)


def test_device_shared_memory_is_the_nodes(profile: Profile) -> None:
    name = f"/dev/shm/hpcctr-{os.getpid()}"
    profile.run("sh", "-c", f"echo shared > {name}")
    assert Path(name).read_text() == "shared\n"
    Path(name).unlink()


def test_name_resolution_and_time_zone_are_the_nodes(profile: Profile) -> None:
    for path in ("/etc/resolv.conf", "/etc/hosts"):
        assert profile.output("cat", path) == Path(path).read_text()


def test_what_a_program_mounts_or_sees_stays_its_own(profile: Profile) -> None:
    before = {mount.target for mount in profile.node.host.mounts()}
    script = "cat /proc/self/mountinfo; sleep 0.2"
    process = profile.node.popen(
        "run", profile.image, "--", "sh", "-c", script, user=profile.user, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    inside = process.stdout.read().decode()
    during = {mount.target for mount in profile.node.host.mounts()} - before
    process.wait(20)
    assert "shared:" not in inside
    own = ("/run/hpcctr/", "/run/containerd/", str(profile.node.containerd.directory))
    assert all(target.startswith(own) for target in during), during


def test_the_sites_directories_come_along_where_they_exist(place: Path, alice: User, busybox_image: str) -> None:
    (place / "scratch").mkdir()
    (place / "scratch/file").write_text("x")
    with node(place, carry=[f"{place}/scratch", f"{place}/absent"]) as carrying:
        carrying.pull(busybox_image)
        script = f"ls {place}/scratch; ls {place}/absent 2>&1 | wc -l"
        assert carrying.run(busybox_image, "sh", "-c", script, user=alice).stdout == b"file\n0\n"
