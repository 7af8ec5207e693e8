"""Whose a file of the host's is."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from hpcctr.errors import FeatureUnusable
from hpcctr.host.trusted import Look, identity_of, require_only_roots

pytestmark = pytest.mark.root

USER = 61501
DAEMON = 995


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of root's in a directory of root's."""
    made = tmp_path / "lib/libx.so.1.0"
    made.parent.mkdir()
    made.write_text("x")
    return made


def test_a_file_of_roots_is_found_through_links_of_roots(file: Path) -> None:
    link, directory = file.parent / "libx.so", file.parent.parent / "through"
    link.symlink_to("libx.so.1")
    (file.parent / "libx.so.1").symlink_to("../lib/libx.so.1.0")
    directory.symlink_to(file.parent)
    found = require_only_roots(f"{directory}/./libx.so")
    assert (found.path, found.kind) == (str(file), "f")
    assert found.identity == identity_of(file.stat())
    assert require_only_roots(str(directory)).path == str(file.parent)


def test_another_owner_of_anything_on_the_way_is_refused(file: Path) -> None:
    for path in (file, file.parent):
        os.chown(path, USER, 0)
        with pytest.raises(FeatureUnusable, match=f"^profile: {file}.* not root's alone"):
            require_only_roots(str(file), origin="profile")
        os.chown(path, 0, 0)
    require_only_roots(str(file))


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_what_others_can_write_is_refused(file: Path, mode: int) -> None:
    file.chmod(mode)
    with pytest.raises(FeatureUnusable, match="not root's alone"):
        require_only_roots(str(file))
    file.chmod(0o644)
    file.parent.chmod(mode | 0o111)
    with pytest.raises(FeatureUnusable, match="not root's alone"):
        require_only_roots(str(file))
    # Where nobody moves away what is root's.
    file.parent.chmod(mode | 0o1111)
    require_only_roots(str(file))


def test_a_link_of_a_users_is_refused_wherever_it_leads(file: Path) -> None:
    file.parent.chmod(0o1777)
    link = file.parent / "link"
    link.symlink_to("/usr/bin/env")
    os.chown(link, USER, USER, follow_symlinks=False)
    with pytest.raises(FeatureUnusable, match="not root's alone"):
        require_only_roots(str(link))


def test_links_without_end_and_names_that_are_not_there_are_said(file: Path) -> None:
    (file.parent / "loop").symlink_to("loop")
    for path, reason in ((f"{file.parent}/loop", "levels of symbolic links"), (f"{file}/x", "not a directory")):
        with pytest.raises(FeatureUnusable, match=reason):
            require_only_roots(path)
    with pytest.raises(FeatureUnusable, match="no such file") as raised:
        require_only_roots(f"{file}.gone")
    assert "driver" in raised.value.hint
    for path in ("relative", "", "/a\0b"):
        with pytest.raises(FeatureUnusable, match="absolute path"):
            require_only_roots(path)


def test_devices_and_pipes_are_no_sources(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/null", str(tmp_path / "pipe")):
        with pytest.raises(FeatureUnusable, match="neither a file nor a directory nor a socket"):
            require_only_roots(path)


def test_a_daemons_socket_may_be_its_own_and_its_files_may_not(tmp_path: Path) -> None:
    directory = tmp_path / "munge"
    directory.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "socket"))
    (directory / "library").write_text("x")
    for path in (directory, directory / "socket"):
        os.chown(path, DAEMON, DAEMON)
    (directory / "socket").chmod(0o777)
    assert require_only_roots(str(directory / "socket")).kind == "f"
    with pytest.raises(FeatureUnusable, match="not root's alone"):
        require_only_roots(str(directory / "library"))
    os.chown(directory, USER, USER)
    with pytest.raises(FeatureUnusable, match="not root's alone"):
        require_only_roots(str(directory / "socket"))


def test_an_identity_changes_with_a_file_and_not_with_what_a_directory_has(file: Path) -> None:
    before = [identity_of(path.stat()) for path in (file, file.parent)]
    (file.parent / "more").write_text("")
    os.utime(file, ns=(1, 1))
    after = [identity_of(path.stat()) for path in (file, file.parent)]
    assert (before[0] != after[0], before[1] == after[1]) == (True, True)


def test_one_look_asks_for_a_directory_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = Look()
    look.require(str(file))
    asked: list[str] = []
    real = os.lstat

    def noted(path: str) -> os.stat_result:
        asked.append(path)
        return real(path)

    monkeypatch.setattr("hpcctr.host.trusted.os.lstat", noted)
    (file.parent / "other").write_text("")
    look.require(str(file.parent / "other"))
    assert asked == [str(file.parent / "other")]
