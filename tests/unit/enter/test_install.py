"""Installing enter: what it is afterwards, and every way in which an installed one can be wrong."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcctr.enter.install import CAPABILITIES, enter_problem, front_problem, install_enter, install_front
from hpcctr.errors import EnterUnusable
from tests.support.scratch import scratch

pytestmark = pytest.mark.root

XATTR = "security.capability"


@pytest.fixture
def directory() -> Iterator[Path]:
    """Below root's directories only: pytest's own lie in /tmp, where enter may not be."""
    with scratch("install") as made:
        yield made


@pytest.fixture
def built(tmp_path: Path) -> Path:
    file = tmp_path / "built"
    file.write_bytes(b"\x7fELF program")
    return file


@pytest.fixture
def installed(directory: Path, built: Path) -> Path:
    install_enter(built, directory / "enter")
    return directory / "enter"


def _problem(target: Path) -> str:
    found = enter_problem(target)
    assert found is not None
    reason, remedy = found
    assert reason and remedy
    return reason


def test_an_installed_enter_has_owner_mode_and_capabilities_and_no_problem(installed: Path, built: Path) -> None:
    status = installed.stat()
    assert (status.st_uid, status.st_gid, status.st_mode) == (0, 0, 0o100711)
    assert installed.read_bytes() == built.read_bytes()
    assert enter_problem(installed) is None
    shown = subprocess.run(["getcap", installed], capture_output=True, text=True, check=True).stdout
    # Permitted only: no e, so nothing is in force when the program starts.
    assert shown.strip() == f"{installed} cap_sys_chroot,cap_sys_admin=p"


def test_installing_again_replaces_the_file_and_leaves_nothing_else(installed: Path, built: Path) -> None:
    before = installed.stat().st_ino
    built.write_bytes(b"newer")
    install_enter(built, installed)
    assert installed.read_bytes() == b"newer"
    assert installed.stat().st_ino != before
    assert list(installed.parent.iterdir()) == [installed]


def test_installing_the_same_again_leaves_the_file_as_it_is(installed: Path, built: Path) -> None:
    before = installed.stat().st_ino
    install_enter(built, installed)
    assert installed.stat().st_ino == before
    installed.chmod(0o755)
    install_enter(built, installed)
    assert enter_problem(installed) is None
    os.removexattr(installed, XATTR)
    install_enter(built, installed)
    assert enter_problem(installed) is None


def test_a_link_at_the_target_is_replaced_not_followed(directory: Path, built: Path) -> None:
    (directory / "victim").write_text("untouched")
    (directory / "enter").symlink_to("victim")
    install_enter(built, directory / "enter")
    assert (directory / "victim").read_text() == "untouched"
    assert not (directory / "enter").is_symlink()


def test_a_missing_source_leaves_nothing(directory: Path) -> None:
    with pytest.raises(EnterUnusable):
        install_enter(directory / "none", directory / "enter")
    assert list(directory.iterdir()) == []


def test_directories_others_may_write_are_refused(directory: Path, built: Path) -> None:
    inner = directory / "libexec"
    inner.mkdir()
    for mode in (0o775, 0o757, 0o1777):
        inner.chmod(mode)
        with pytest.raises(EnterUnusable, match="written by others") as raised:
            install_enter(built, inner / "enter")
        assert raised.value.hint == f"chmod go-w {inner}"
    assert list(inner.iterdir()) == []


def test_directories_of_others_are_refused_at_any_height(directory: Path, built: Path) -> None:
    (directory / "theirs/inner").mkdir(parents=True)
    os.chown(directory / "theirs", 41001, 0)
    with pytest.raises(EnterUnusable, match="belongs to uid 41001"):
        install_enter(built, directory / "theirs/inner/enter")


def test_symbolic_links_and_dots_on_the_way_are_refused(directory: Path, built: Path) -> None:
    (directory / "real").mkdir()
    (directory / "link").symlink_to("real")
    with pytest.raises(EnterUnusable, match="is not a directory") as raised:
        install_enter(built, directory / "link/enter")
    assert str(directory / "real/enter") in raised.value.hint
    with pytest.raises(EnterUnusable, match="absolute path"):
        install_enter(built, directory / "real/../enter")
    with pytest.raises(EnterUnusable, match="absolute path"):
        install_enter(built, Path("enter"))


def test_only_root_installs(directory: Path, built: Path) -> None:
    built.chmod(0o644)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setuid(41001)
            install_enter(built, directory / "enter")
        except EnterUnusable as error:
            status = 0 if "only root may" in error.message else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_filesystem_that_keeps_no_capabilities_is_refused(directory: Path, built: Path) -> None:
    # Of what a Debian kernel always has, ramfs is without security attributes.
    subprocess.run(["mount", "-t", "ramfs", "ramfs", directory], check=True)
    try:
        with pytest.raises(EnterUnusable) as raised:
            install_enter(built, directory / "enter")
        assert raised.value.hint == "choose a local filesystem that keeps file capabilities"
        assert list(directory.iterdir()) == []
        (directory / "enter").write_bytes(b"x")
        (directory / "enter").chmod(0o711)
        assert _problem(directory / "enter") == "its filesystem keeps no file capabilities"
    finally:
        subprocess.run(["umount", directory], check=True)


def test_a_missing_enter_is_noticed(directory: Path) -> None:
    assert _problem(directory / "enter") == "it is not there"


def test_a_wrong_kind_of_file_is_noticed(directory: Path) -> None:
    (directory / "enter").mkdir()
    assert _problem(directory / "enter") == "it is not a regular file"
    (directory / "enter2").symlink_to("/bin/true")
    assert _problem(directory / "enter2") == "it is not a regular file"


def test_a_wrong_owner_is_noticed(installed: Path) -> None:
    os.chown(installed, 41001, 0)
    assert "belongs to 41001:0" in _problem(installed)
    os.chown(installed, 0, 41001)
    assert "belongs to 0:41001" in _problem(installed)


@pytest.mark.parametrize("mode", [0o755, 0o4711, 0o2711, 0o700, 0o777, 0o713])
def test_a_wrong_mode_is_noticed(installed: Path, mode: int) -> None:
    installed.chmod(mode)
    assert _problem(installed) == f"its mode is {mode:04o}, not 0711"


def test_lost_capabilities_are_noticed(installed: Path) -> None:
    os.removexattr(installed, XATTR)
    assert _problem(installed) == "it has no file capabilities"


@pytest.mark.parametrize(
    "words",
    [
        # effective bit; one missing; one too many; one in the second word; inheritable instead of permitted
        (0x02000001, 1 << 18 | 1 << 21, 0, 0, 0),
        (0x02000000, 1 << 21, 0, 0, 0),
        (0x02000000, 1 << 18 | 1 << 21 | 1 << 1, 0, 0, 0),
        (0x02000000, 1 << 18 | 1 << 21, 0, 1 << 6, 0),
        (0x02000000, 0, 1 << 18 | 1 << 21, 0, 0),
    ],
)
def test_other_capabilities_are_noticed(installed: Path, words: tuple[int, ...]) -> None:
    os.setxattr(installed, XATTR, struct.pack("<IIIII", *words))
    assert _problem(installed) == "its file capabilities are not cap_sys_admin,cap_sys_chroot=p"
    os.setxattr(installed, XATTR, CAPABILITIES)
    assert enter_problem(installed) is None


def test_directories_that_became_writable_are_noticed(installed: Path) -> None:
    installed.parent.chmod(0o777)
    assert "may be written by others" in _problem(installed)


def test_a_filesystem_mounted_nosuid_is_noticed(installed: Path) -> None:
    subprocess.run(["mount", "--bind", installed.parent, installed.parent], check=True)
    subprocess.run(["mount", "-o", "remount,bind,nosuid", installed.parent], check=True)
    try:
        assert _problem(installed) == "its filesystem is mounted nosuid"
    finally:
        subprocess.run(["umount", installed.parent], check=True)


def test_the_check_needs_no_privilege(installed: Path) -> None:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setuid(41001)
            status = 0 if enter_problem(installed) is None else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_an_installed_front_is_roots_and_for_everyone_and_without_capabilities(directory: Path, built: Path) -> None:
    target = directory / "front"
    install_front(built, target)
    status = target.stat()
    assert (status.st_uid, status.st_gid, status.st_mode) == (0, 0, 0o100755)
    assert XATTR not in os.listxattr(target)
    assert front_problem(target) is None
    inode = status.st_ino
    install_front(built, target)
    assert target.stat().st_ino == inode
    built.write_bytes(b"newer")
    install_front(built, target)
    assert target.read_bytes() == b"newer"


def test_a_front_that_others_could_replace_or_nobody_can_run_is_noticed(directory: Path, built: Path) -> None:
    target = directory / "front"
    assert front_problem(target) == ("it is not there", "hpcctr engine install")
    install_front(built, target)
    target.chmod(0o775)
    found = front_problem(target)
    assert found is not None and found[0] == "its mode is 0775, not 0755"
    target.chmod(0o755)
    directory.chmod(0o777)
    found = front_problem(target)
    assert found is not None and "may be written by others" in found[0]
    directory.chmod(0o755)
    subprocess.run(["mount", "--bind", directory, directory], check=True)
    subprocess.run(["mount", "-o", "remount,bind,noexec", directory], check=True)
    try:
        found = front_problem(target)
        assert found is not None and found[0] == "its filesystem is mounted noexec"
    finally:
        subprocess.run(["umount", directory], check=True)
