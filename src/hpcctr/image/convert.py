"""From a tar stream to the image file: a squashfs written by tar2sqfs, or by mksquashfs where that is missing.

The writer parses what came from an image. Started by root it runs as the unprivileged account 65534 without groups,
capabilities, network or the right to gain privileges, with nothing open but the stream, a log and the output file.
That file lies in a directory only root can enter, belongs to the writer while it writes, and is taken back
afterwards."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from hpcctr.errors import ConversionFailed
from hpcctr.image.imagefile import store_unusable

T = TypeVar("T")

BLOCK_SIZE = 131072
_ZSTD_LEVEL = 3
_WRITER_UID = 65534
#: Root's own search path: never that of the environment.
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PIPE_SIZE = 1 << 20
_MISSING_HINT = "install squashfs-tools-ng (tar2sqfs), or squashfs-tools 4.5 or later with zstd (mksquashfs)"


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A program that makes a squashfs of a tar stream."""

    name: str
    path: str

    def argv(self, output: str) -> list[str]:
        """The command line.

        What tar2sqfs writes depends on nothing but the stream; mksquashfs 4.5 gives the root directory the time of day.
        """
        if self.name == "tar2sqfs":
            options = f"--compressor zstd --comp-extra level={_ZSTD_LEVEL} --block-size {BLOCK_SIZE}"
            return [self.path, "--quiet", "--force", "--no-skip", *options.split(), output]
        options = f"-tar -noappend -quiet -no-progress -comp zstd -Xcompression-level {_ZSTD_LEVEL} -b {BLOCK_SIZE}"
        # With -tar it gives the root directory its own uid and 0777 unless told otherwise, and knows no -root-uid.
        root = "-mkfs-time 0 -root-mode 0755 -force-uid 0 -force-gid 0"
        return [self.path, "-", output, *options.split(), *root.split()]


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """A written image file: where, bytes, and ``sha256:<64 hex>``."""

    path: str
    size: int
    digest: str


def find_tool() -> Tool:
    """The writer to use. Raises :class:`ConversionFailed` when none is installed that can do it."""
    path = _PATH if os.geteuid() == 0 else None
    tar2sqfs, mksquashfs = shutil.which("tar2sqfs", path=path), shutil.which("mksquashfs", path=path)
    if tar2sqfs and re.search(r"^\s*zstd\b", _output([tar2sqfs, "--help"]), re.MULTILINE):
        return Tool(name="tar2sqfs", path=tar2sqfs)
    if mksquashfs:
        text = _output([mksquashfs, "-help"])
        if "-tar" in text and re.search(r"^\s*zstd\b", text, re.MULTILINE):
            return Tool(name="mksquashfs", path=mksquashfs)
    found = " and ".join(tool for tool in (tar2sqfs, mksquashfs) if tool)
    raise ConversionFailed(
        f"{found} cannot write zstd from a tar stream" if found else "neither tar2sqfs nor mksquashfs is installed",
        hint=_MISSING_HINT,
    )


def write_squashfs(
    directory: str, produce: Callable[[Callable[[bytes], object]], T], *, tool: Tool | None = None
) -> tuple[ImageFile, T]:
    """Write ``directory``/root.squashfs from the tar stream ``produce`` writes; also what ``produce`` returned.

    ``directory`` is one that only this uid can enter. Nothing is left in it unless this returns.
    Raises :class:`ConversionFailed`, :class:`StoreUnusable` (no space), and what ``produce`` raises.
    """
    tool = tool or find_tool()
    path = f"{directory}/root.squashfs"
    try:
        output = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        log = os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise store_unusable(path, error) from None
    try:
        result = _run(tool, output, log, directory, produce)
        _require_squashfs(output, tool)
        if os.geteuid() == 0:
            _take_back(output, path)
        os.fchmod(output, 0o644)
        os.fsync(output)
        return ImageFile(path=path, size=os.fstat(output).st_size, digest=_digest(output)), result
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(path)
        if isinstance(error, OSError):
            raise store_unusable(path, error) from None
        raise
    finally:
        os.close(output)
        os.close(log)


def inode_count(path: str) -> int:
    """Inodes of a squashfs (fs/squashfs/squashfs_fs.h, struct squashfs_super_block)."""
    with open(path, "rb") as file:
        return int(struct.unpack_from("<I", file.read(96), 4)[0])


def _run(tool: Tool, output: int, log: int, directory: str, produce: Callable[[Callable[[bytes], object]], T]) -> T:
    argv = tool.argv(f"/proc/self/fd/{output}")
    if os.geteuid() == 0:
        os.fchown(output, _WRITER_UID, _WRITER_UID)
        account = ["--reuid", str(_WRITER_UID), "--regid", str(_WRITER_UID), "--clear-groups", "--no-new-privs"]
        argv = ["unshare", "--net", "--ipc", "setpriv", *account, "--inh-caps=-all", "--bounding-set=-all", *argv]
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=log,
            pass_fds=[output],
            cwd="/",
            # tar2sqfs takes the time in the superblock from it (squashfs-tools-ng, NEWS of 0.9).
            env={"PATH": _PATH, "LC_ALL": "C", "SOURCE_DATE_EPOCH": "0"}
            if tool.name == "tar2sqfs"
            else {"PATH": _PATH, "LC_ALL": "C"},
            bufsize=0,
        )
    except OSError as error:
        raise ConversionFailed(f"{argv[0]} cannot be started: {error.strerror}", hint=_MISSING_HINT) from None
    assert process.stdin is not None and isinstance(process.stdin, io.RawIOBase)  # noqa: S101 - asked for above
    try:
        _limit(process.pid)
        with contextlib.suppress(OSError):
            fcntl.fcntl(process.stdin, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        stream = io.BufferedWriter(process.stdin, _PIPE_SIZE)
        try:
            result = produce(stream.write)
            stream.flush()
        except BrokenPipeError:
            process.wait()
            raise _failure(tool, process.returncode, log, directory) from None
        stream.close()
        if process.wait() != 0:
            raise _failure(tool, process.returncode, log, directory)
        return result
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        with contextlib.suppress(OSError):
            process.stdin.close()


def _limit(pid: int) -> None:
    """No core file, few descriptors: it parses hostile input and needs nothing else."""
    for limit, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 64)):
        with contextlib.suppress(OSError, ValueError, ProcessLookupError):
            resource.prlimit(pid, limit, (value, value))


def _failure(tool: Tool, status: int, log: int, directory: str) -> Exception:
    said = os.pread(log, 1 << 16, 0).decode(errors="replace").strip()
    if "No space left" in said or "Disk quota exceeded" in said or os.statvfs(directory).f_bavail == 0:
        number = 122 if "quota" in said else 28
        return store_unusable(os.path.dirname(os.path.dirname(directory)), OSError(number, os.strerror(number)))
    if status < 0:
        return ConversionFailed(
            f"{tool.name} was killed by {signal.Signals(-status).name}",
            hint="if memory ran out (dmesg), pull where there is more",
        )
    last = said.splitlines()[-1] if said else "it did not say why"
    return ConversionFailed(f"{tool.name} ended with status {status}: {last[:300]}", hint=_MISSING_HINT)


def _require_squashfs(output: int, tool: Tool) -> None:
    """Raise :class:`ConversionFailed` unless the file is a squashfs 4.0 with the options asked for, wholly there."""
    head = os.pread(output, 96, 0)
    if len(head) == 96:
        magic, _, _, block_size, _, compression, _, _, _, major, minor = struct.unpack_from("<4sIIIIHHHHHH", head)
        (used,) = struct.unpack_from("<Q", head, 40)
        if (magic, block_size, compression, major, minor) == (b"hsqs", BLOCK_SIZE, 6, 4, 0) and used <= os.fstat(
            output
        ).st_size:
            return
    raise ConversionFailed(f"{tool.name} wrote no zstd squashfs of blocks of {BLOCK_SIZE} bytes", hint=_MISSING_HINT)


def _take_back(output: int, path: str) -> None:
    """Make the file root's alone, and ``output`` a descriptor of it, or of a copy when somebody may still be able to
    write it.

    Other programs of account 65534 could have got a descriptor through the writer's /proc. A read lease is granted
    only when nobody has the file open for writing (fcntl(2), F_SETLEASE), and nobody can open it any more once it is
    root's."""
    os.fchown(output, 0, 0)
    os.fchmod(output, 0o600)
    reading = os.open(f"/proc/self/fd/{output}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.dup2(reading, output, inheritable=False)
    finally:
        os.close(reading)
    try:
        fcntl.fcntl(output, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(output, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        _replace_by_copy(output, path)


def _replace_by_copy(output: int, path: str) -> None:
    os.unlink(path)
    copy = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        at = 0
        while chunk := os.pread(output, 1 << 20, at):
            at += os.pwrite(copy, chunk, at)
        os.dup2(copy, output, inheritable=False)
    finally:
        os.close(copy)


def _digest(descriptor: int) -> str:
    digest = hashlib.sha256()
    at = 0
    while chunk := os.pread(descriptor, 1 << 20, at):
        digest.update(chunk)
        at += len(chunk)
    return f"sha256:{digest.hexdigest()}"


def _output(argv: list[str]) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, stdin=subprocess.DEVNULL, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout + done.stderr).decode(errors="replace")
