"""The image file is a squashfs of the stream, by either writer, or there is no file and an error with a remedy."""

from __future__ import annotations

import os
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpcctr.errors import ConversionFailed, ImageBroken, StoreUnusable
from hpcctr.image import convert
from hpcctr.image.convert import Tool, find_tool, inode_count, write_squashfs
from hpcctr.image.tarheader import header, padding
from hpcctr.image.tarstream import DIRECTORY, HARDLINK, REGULAR, SYMLINK
from hpcctr.image.verification import sha256_of
from tests.support.polling import wait_until

Write = Callable[[bytes], object]

TAR2SQFS = Tool(name="tar2sqfs", path="/usr/bin/tar2sqfs")
MKSQUASHFS = Tool(name="mksquashfs", path="/usr/bin/mksquashfs")
BOTH = pytest.mark.parametrize("tool", [TAR2SQFS, MKSQUASHFS], ids=lambda tool: tool.name)
DEEP = b"/".join(b"%03d" % number for number in range(1000))


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    directory = tmp_path / "store/tmp/pull-1"
    directory.mkdir(parents=True, mode=0o700)
    return directory


def produce(write: Write) -> str:
    write(header(b"./", DIRECTORY, mode=0o755, mtime=1))
    for depth in range(1000):
        write(header(b"/".join(DEEP.split(b"/")[: depth + 1]), DIRECTORY, mode=0o755, mtime=2))
    for name, content in ((b"a", b"content"), (b"\xff\xfe\n", b"bytes"), (DEEP + b"/f", b"deep")):
        write(header(name, REGULAR, mode=0o644, size=len(content), mtime=3, xattrs={b"user.x": b"\0\xff"}))
        write(content + padding(len(content)))
    write(header(b"l", SYMLINK, mode=0o777, link=b"t/" * 1900))
    write(header(b"b", HARDLINK, mode=0o644, link=b"a"))
    write(bytes(1024))
    return "result"


@BOTH
def test_both_writers_make_a_squashfs_with_everything_in_it(workspace: Path, tool: Tool) -> None:
    file, result = write_squashfs(str(workspace), produce, tool=tool)
    assert result == "result"
    content = Path(file.path).read_bytes()
    assert (file.size, file.digest) == (len(content), sha256_of(content))
    assert inode_count(file.path) == 1 + 1000 + 3 + 1
    listing = subprocess.run(["unsquashfs", "-lln", "-UTC", file.path], check=True, capture_output=True).stdout
    assert b"squashfs-root/" + DEEP + b"/f\n" in listing
    assert b"squashfs-root/l -> " + b"t/" * 1900 + b"\n" in listing
    assert b"squashfs-root/\xff\xfe\n" in listing
    first = listing.splitlines()[0]
    assert first.startswith(b"drwxr-xr-x 0/0 ")
    both = subprocess.run(["unsquashfs", "-cat", file.path, "a", "b"], check=True, capture_output=True).stdout
    assert both == b"contentcontent"


def test_the_same_stream_makes_the_same_file_at_another_time(workspace: Path) -> None:
    before = write_squashfs(str(workspace), produce, tool=TAR2SQFS)[0].digest
    os.unlink(workspace / "root.squashfs")
    second = int(time.time())
    wait_until(lambda: int(time.time()) > second)
    assert write_squashfs(str(workspace), produce, tool=TAR2SQFS)[0].digest == before


def test_the_file_is_ours_and_readable_by_all(workspace: Path) -> None:
    file, _ = write_squashfs(str(workspace), produce)
    status = os.stat(file.path)
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (os.geteuid(), os.getegid(), 0o644)
    assert os.listdir(workspace) == ["root.squashfs"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's file is handed to another account")
def test_somebody_who_still_holds_the_file_open_for_writing_cannot_change_it(workspace: Path) -> None:
    held: list[int] = []

    def steal(write: Write) -> None:
        # Another program of the writer's account gets at the file while that account owns it.
        held.append(os.open(workspace / "root.squashfs", os.O_RDWR))
        produce(write)

    try:
        file, _ = write_squashfs(str(workspace), steal)
        before = Path(file.path).read_bytes()
        os.pwrite(held[0], b"evil", 0)
        assert Path(file.path).read_bytes() == before
        assert sha256_of(before) == file.digest
    finally:
        os.close(held[0])


def nothing_is_left(workspace: Path) -> bool:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return not os.listdir(workspace) and not any(
        Path(f"/proc/{pid}/comm").read_text().strip() in ("tar2sqfs", "mksquashfs", "unshare", "setpriv")
        for pid in children
    )


@pytest.mark.parametrize("error", [ImageBroken("broken"), KeyboardInterrupt(), SystemExit(1)])
def test_an_error_of_the_stream_ends_the_writer_and_leaves_nothing(workspace: Path, error: BaseException) -> None:
    def fail(write: Write) -> None:
        write(header(b"a", REGULAR, mode=0o644, size=1 << 30))
        raise error

    with pytest.raises(type(error)):
        write_squashfs(str(workspace), fail)
    assert nothing_is_left(workspace)


def test_a_stream_the_writer_does_not_take_is_named_with_its_words(workspace: Path) -> None:
    with pytest.raises(ConversionFailed, match="tar2sqfs ended with status 1: .+") as caught:
        write_squashfs(str(workspace), lambda write: write(b"this is no tar stream" * 10_000), tool=TAR2SQFS)
    assert caught.value.hint
    assert nothing_is_left(workspace)


@pytest.fixture
def fake(tmp_path: Path) -> Callable[[str], Tool]:
    """A writer of another behaviour, where the writer's account can run it."""

    def make(script: str) -> Tool:
        os.chmod(tmp_path, 0o755)
        for parent in tmp_path.parents:
            if parent.stat().st_uid == os.geteuid() and "pytest" in parent.name:
                os.chmod(parent, 0o755)
        path = tmp_path / "tar2sqfs"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return Tool(name="tar2sqfs", path=str(path))

    return make


@pytest.mark.parametrize(
    ("script", "error", "says"),
    [
        ("kill -9 $$", ConversionFailed, "killed by SIGKILL"),
        ("cat >/dev/null; echo nonsense >&2; exit 3", ConversionFailed, "status 3: nonsense"),
        ("cat >/dev/null; exit 0", ConversionFailed, "wrote no zstd squashfs"),
        ("cat >/dev/null; echo 'write: No space left on device' >&2; exit 1", StoreUnusable, "no space left"),
        ("echo 'Disk quota exceeded' >&2; exit 1", StoreUnusable, "quota"),
        ("exit 1", ConversionFailed, "it did not say why"),
    ],
)
def test_every_end_of_a_writer_has_its_error(
    workspace: Path, fake: Callable[[str], Tool], script: str, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        write_squashfs(str(workspace), produce, tool=fake(script))
    assert nothing_is_left(workspace)


@pytest.fixture
def path_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    def only(**scripts: str) -> None:
        for name, script in scripts.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setattr(convert, "_PATH", str(tmp_path))
        monkeypatch.setenv("PATH", str(tmp_path))

    yield only


def test_a_machine_without_a_writer_is_told_what_to_install(path_with: Callable[..., None]) -> None:
    path_with()
    with pytest.raises(ConversionFailed, match="neither tar2sqfs nor mksquashfs is installed") as caught:
        find_tool()
    assert "squashfs-tools-ng" in caught.value.hint


def test_writers_that_cannot_do_it_are_passed_over(path_with: Callable[..., None]) -> None:
    path_with(tar2sqfs="echo gzip", mksquashfs="echo ' -tar'; echo '  gzip'")
    with pytest.raises(ConversionFailed, match="cannot write zstd from a tar stream"):
        find_tool()
    path_with(mksquashfs="echo '-tar  read tar'; echo '	zstd'")
    assert find_tool().name == "mksquashfs"
    path_with(tar2sqfs="echo '	zstd'")
    assert find_tool().name == "tar2sqfs"


def test_the_installed_writer_is_found() -> None:
    assert find_tool() in (TAR2SQFS, MKSQUASHFS)


def test_a_workspace_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreUnusable, match="no such file"):
        write_squashfs(str(tmp_path / "none"), produce)
