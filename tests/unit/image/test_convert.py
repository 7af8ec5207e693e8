"""A writer makes a squashfs of the stream, or there is an error with a remedy."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpcctr.errors import ConversionFailed
from hpcctr.image import convert
from hpcctr.image.convert import Tool, Writer, find_tool
from hpcctr.image.output import inode_count
from hpcctr.image.tarheader import header, padding
from hpcctr.image.tarstream import DIRECTORY, HARDLINK, REGULAR, SYMLINK
from tests.support.polling import wait_until

Write = Callable[[bytes], object]

TAR2SQFS = Tool(name="tar2sqfs", path="/usr/bin/tar2sqfs")
MKSQUASHFS = Tool(name="mksquashfs", path="/usr/bin/mksquashfs")
BOTH = pytest.mark.parametrize("tool", [TAR2SQFS, MKSQUASHFS], ids=lambda tool: tool.name)
DEEP = b"/".join(b"%03d" % number for number in range(1000))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "root.squashfs"


def write(output: Path, produce: Callable[[Write], object], tool: Tool = TAR2SQFS) -> None:
    descriptor = os.open(output, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        writer = Writer(tool, descriptor)
        try:
            produce(writer.write)
            writer.finish()
        finally:
            writer.close()
    finally:
        os.close(descriptor)


def produce(write: Write) -> None:
    write(header(b"./", DIRECTORY, mode=0o755, mtime=1))
    for depth in range(1000):
        write(header(b"/".join(DEEP.split(b"/")[: depth + 1]), DIRECTORY, mode=0o755, mtime=2))
    for name, content in ((b"a", b"content"), (b"\xff\xfe\n", b"bytes"), (DEEP + b"/f", b"deep")):
        write(header(name, REGULAR, mode=0o644, size=len(content), mtime=3, xattrs={b"user.x": b"\0\xff"}))
        write(content + padding(len(content)))
    write(header(b"l", SYMLINK, mode=0o777, link=b"t/" * 1900))
    write(header(b"b", HARDLINK, mode=0o644, link=b"a"))
    write(bytes(1024))


@BOTH
def test_both_writers_make_a_squashfs_with_everything_in_it(output: Path, tool: Tool) -> None:
    write(output, produce, tool)
    assert inode_count(str(output)) == 1 + 1000 + 3 + 1
    listing = subprocess.run(["unsquashfs", "-lln", "-UTC", output], check=True, capture_output=True).stdout
    assert b"squashfs-root/" + DEEP + b"/f\n" in listing
    assert b"squashfs-root/l -> " + b"t/" * 1900 + b"\n" in listing
    assert b"squashfs-root/\xff\xfe\n" in listing
    first = listing.splitlines()[0]
    assert first.startswith(b"drwxr-xr-x 0/0 ")
    both = subprocess.run(["unsquashfs", "-cat", output, "a", "b"], check=True, capture_output=True).stdout
    assert both == b"contentcontent"


def test_the_same_stream_makes_the_same_file_at_another_time(output: Path) -> None:
    write(output, produce)
    before = output.read_bytes()
    second = int(time.time())
    wait_until(lambda: int(time.time()) > second)
    write(output, produce)
    assert output.read_bytes() == before


def test_the_number_of_processors_changes_nothing_in_the_file(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def many(write: Write) -> None:
        for number in range(40):
            content = os.urandom(70_000) if number % 2 else bytes(300_000)
            write(header(b"f%d" % number, REGULAR, mode=0o644, size=len(content)) + content + padding(len(content)))
        write(bytes(1024))

    stream: list[bytes] = []
    many(stream.append)
    found = set()
    for processors in ({0}, set(range(7))):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, processors=processors: processors)
        write(output, lambda take: [take(piece) for piece in stream])
        found.add(output.read_bytes())
    assert len(found) == 1


def no_writer_runs() -> bool:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return not any(Path(f"/proc/{pid}/comm").read_text().strip() in ("tar2sqfs", "mksquashfs") for pid in children)


def test_a_writer_ends_with_the_stream_that_was_broken_off(output: Path) -> None:
    def fail(write: Write) -> None:
        write(header(b"a", REGULAR, mode=0o644, size=1 << 30))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(output, fail)
    assert no_writer_runs()


def test_a_stream_the_writer_does_not_take_is_named_with_its_words(output: Path) -> None:
    with pytest.raises(ConversionFailed, match="tar2sqfs ended with status 1: .+") as caught:
        write(output, lambda write: write(b"this is no tar stream" * 10_000))
    assert caught.value.hint
    assert no_writer_runs()


def fake(tmp_path: Path, script: str) -> Tool:
    """A writer of another behaviour."""
    path = tmp_path / "tar2sqfs"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return Tool(name="tar2sqfs", path=str(path))


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("kill -9 $$", "killed by SIGKILL"),
        ("kill -XFSZ $$", "larger than"),
        ("cat >/dev/null; echo 'write: File too large' >&2; exit 1", "larger than"),
        ("cat >/dev/null; echo nonsense >&2; exit 3", "status 3: nonsense"),
        ("cat >/dev/null; echo nonsense; exit 3", "status 3: nonsense"),
        ("exit 1", "it did not say why"),
        ("yes >&2 & yes & sleep 0.1; kill %1 %2; exit 5", "status 5: y"),
    ],
)
def test_every_end_of_a_writer_has_its_error(tmp_path: Path, output: Path, script: str, says: str) -> None:
    with pytest.raises(ConversionFailed, match=says):
        write(output, produce, fake(tmp_path, script))
    assert no_writer_runs()


@pytest.mark.parametrize(
    ("script", "number"),
    [
        ("cat >/dev/null; echo 'write: No space left on device' >&2; exit 1", errno.ENOSPC),
        ("echo 'Disk quota exceeded' >&2; exit 1", errno.EDQUOT),
    ],
)
def test_want_of_space_is_told_as_the_kernels_error(tmp_path: Path, output: Path, script: str, number: int) -> None:
    with pytest.raises(OSError) as caught:
        write(output, produce, fake(tmp_path, script))
    assert caught.value.errno == number


@BOTH
def test_a_file_over_the_limit_is_named_so(tmp_path: Path, tool: Tool) -> None:
    code = f"""
import os, resource, signal
from hpcctr.errors import ConversionFailed
from hpcctr.image.convert import Tool, Writer
from hpcctr.image.tarheader import header
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
output = os.open({str(tmp_path / "out")!r}, os.O_RDWR | os.O_CREAT)
writer = Writer(Tool(name={tool.name!r}, path={tool.path!r}), output)
try:
    writer.write(header(b"f", b"0", mode=0o644, size=8 << 20) + os.urandom(8 << 20) + bytes(1024))
    writer.finish()
except ConversionFailed as error:
    print(error)
writer.close()
"""
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "the image file would be larger than 1048576 bytes\n", done.stderr


def test_a_writer_that_is_killed_is_named(output: Path) -> None:
    descriptor = os.open(output, os.O_RDWR | os.O_CREAT, 0o600)
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    others = set(children.read_text().split())
    writer = Writer(TAR2SQFS, descriptor)
    (pid,) = set(children.read_text().split()) - others
    os.kill(int(pid), signal.SIGKILL)
    with pytest.raises(ConversionFailed, match="tar2sqfs was killed by SIGKILL") as caught:
        produce(writer.write)
        writer.finish()
    writer.close()
    os.close(descriptor)
    assert "memory" in caught.value.hint


@pytest.fixture
def path_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    def only(**scripts: str) -> None:
        for name, script in scripts.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setattr(convert, "_PATH", str(tmp_path))

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
