"""The image file is the puller's alone before anything is believed of it, or there is none."""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcctr.errors import ConversionFailed, StoreUnusable
from hpcctr.image.output import Output, inode_count
from hpcctr.image.verification import sha256_of

INODES = 3


@pytest.fixture(scope="module")
def squashfs(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    where = tmp_path_factory.mktemp("tree")
    (where / "tree").mkdir()
    (where / "tree/a").write_bytes(b"content")
    (where / "tree/b").write_bytes(os.urandom(3 << 20))
    argv = ["mksquashfs", str(where / "tree"), str(where / "file"), "-comp", "zstd", "-quiet", "-no-progress"]
    subprocess.run(argv, check=True, capture_output=True)
    return (where / "file").read_bytes()


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    (tmp_path / "workspace").mkdir(mode=0o700)
    return tmp_path / "workspace"


def test_a_kept_file_is_ours_whole_and_readable_by_all(workspace: Path, squashfs: bytes) -> None:
    with Output(str(workspace)) as output:
        output.lend()
        os.write(output.descriptor, squashfs)
        assert output.size == len(squashfs)
        file = output.keep(INODES)
    assert (file.size, file.digest) == (len(squashfs), sha256_of(squashfs))
    assert Path(file.path).read_bytes() == squashfs
    status = os.stat(file.path)
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (os.geteuid(), 0o644)
    assert os.listdir(workspace) == ["root.squashfs"]
    assert inode_count(file.path) == INODES


def test_what_is_not_kept_is_gone(workspace: Path) -> None:
    with Output(str(workspace)) as output:
        os.write(output.descriptor, b"x")
    assert not os.listdir(workspace)
    with pytest.raises(KeyboardInterrupt), Output(str(workspace)):
        raise KeyboardInterrupt
    assert not os.listdir(workspace)


def test_whoever_has_the_descriptor_can_open_it_only_while_it_is_lent(workspace: Path, squashfs: bytes) -> None:
    with Output(str(workspace)) as output:
        output.lend()
        os.write(output.descriptor, squashfs)
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
        command += ["sh", "-c", f"printf '' 1<>/proc/self/fd/{output.descriptor}"]
        assert subprocess.run(command, pass_fds=[output.descriptor]).returncode == 0
        output.keep(INODES)
        if os.geteuid() == 0:
            refused = subprocess.run(command, pass_fds=[output.descriptor], capture_output=True)
            assert b"Permission denied" in refused.stderr


def hold(path: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    descriptor = os.open(path, os.O_RDWR)
    return lambda: os.pwrite(descriptor, b"evil", 0), lambda: os.close(descriptor)


def mapped(path: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    descriptor = os.open(path, os.O_RDWR)
    memory = mmap.mmap(descriptor, 4096)
    os.close(descriptor)
    return lambda: memory.__setitem__(slice(0, 4), b"evil"), memory.close


@pytest.mark.parametrize("hold", [hold, mapped])
def test_somebody_who_still_holds_the_file_for_writing_cannot_change_it(
    workspace: Path, squashfs: bytes, hold: Callable[[Path], tuple[Callable[[], object], Callable[[], object]]]
) -> None:
    with Output(str(workspace)) as output:
        output.lend()
        os.write(output.descriptor, squashfs)
        change, let_go = hold(workspace / "root.squashfs")
        file = output.keep(INODES)
    change()
    let_go()
    assert Path(file.path).read_bytes() == squashfs
    assert file.digest == sha256_of(squashfs)


def test_where_there_are_no_leases_a_copy_is_made(
    workspace: Path, squashfs: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "F_SETLEASE", 999_999)
    with Output(str(workspace)) as output:
        os.write(output.descriptor, squashfs)
        before = os.fstat(output.descriptor).st_ino
        file = output.keep(INODES)
    assert os.stat(file.path).st_ino != before
    assert Path(file.path).read_bytes() == squashfs
    assert os.listdir(workspace) == ["root.squashfs"]


def cut_off(squashfs: bytes) -> bytes:
    return squashfs[:-8192]


def other_block_size(squashfs: bytes) -> bytes:
    return squashfs[:12] + (1 << 20).to_bytes(4, "little") + squashfs[16:]


def says_it_is_empty(squashfs: bytes) -> bytes:
    return squashfs[:40] + bytes(8) + squashfs[48:]


@pytest.mark.parametrize("spoil", [lambda _: b"", lambda _: b"hsqs", cut_off, other_block_size, says_it_is_empty])
def test_what_is_no_squashfs_of_ours_is_not_kept(
    workspace: Path, squashfs: bytes, spoil: Callable[[bytes], bytes]
) -> None:
    with pytest.raises(ConversionFailed, match="no zstd squashfs"), Output(str(workspace)) as output:
        os.write(output.descriptor, spoil(squashfs))
        output.keep(INODES)
    assert not os.listdir(workspace)


def test_another_number_of_inodes_than_was_noted_is_not_kept(workspace: Path, squashfs: bytes) -> None:
    with pytest.raises(ConversionFailed, match="has 3 inodes, the image 4"), Output(str(workspace)) as output:
        os.write(output.descriptor, squashfs)
        output.keep(INODES + 1)
    assert not os.listdir(workspace)


def test_a_workspace_that_is_gone_or_has_the_file_already_is_named(tmp_path: Path, workspace: Path) -> None:
    with pytest.raises(StoreUnusable, match="no such file"):
        Output(str(tmp_path / "none"))
    (workspace / "root.squashfs").symlink_to("/etc/passwd")
    with pytest.raises(StoreUnusable, match="exists"):
        Output(str(workspace))
    shutil.rmtree(workspace)


def test_an_error_of_the_kernel_is_about_the_store(workspace: Path) -> None:
    with pytest.raises(StoreUnusable, match="no space left"), Output(str(workspace)):
        raise OSError(28, os.strerror(28))
