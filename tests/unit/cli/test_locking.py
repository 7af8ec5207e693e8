"""Lock files are written as a careful person's editor writes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hpcctr.cli.locking import require_writable, write
from hpcctr.errors import LockFileWrong
from hpcctr.lockfile import Locked

APP = Locked(name="docker.io/library/app:1", digest="sha256:" + "a" * 64, platform="linux/amd64")


def test_a_file_is_made_with_the_umask_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "images.lock"
    earlier = os.umask(0o027)
    try:
        require_writable(str(path))
        assert not path.exists()
        write(str(path), [APP])
    finally:
        os.umask(earlier)
    assert path.read_text() == APP.line() + "\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_mode_link_and_comments_of_a_file_stay(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("# mine\n")
    target.chmod(0o600)
    link.symlink_to("target")
    write(str(link), [APP])
    assert link.is_symlink() and target.read_text() == f"# mine\n{APP.line()}\n"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_what_is_no_lock_file_is_found_before_anything_is_pulled(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("buy milk\n")
    for wrong in (path, tmp_path, tmp_path / "none/images.lock"):
        with pytest.raises(LockFileWrong):
            require_writable(str(wrong))
    assert path.read_text() == "buy milk\n"
