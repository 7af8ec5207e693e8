"""From a tar stream to the image file: a squashfs written by tar2sqfs, or by mksquashfs where that is missing.

This runs in the converter (:mod:`hpcctr.image.converter`). The writer is started before the first byte of an image is
read, inherits the converter's confinement, and has nothing open but the stream, a log and the output file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import re
import resource
import shutil
import signal
import subprocess
from dataclasses import dataclass

from hpcctr.errors import ConversionFailed

BLOCK_SIZE = 131072
_ZSTD_LEVEL = 3
#: Where the writers are looked for, whoever asks: never in the environment's path.
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PIPE_SIZE = 1 << 20
TOO_LARGE_HINT = "make the image smaller, or ask the administrator for a larger limit"
MISSING_HINT = "install squashfs-tools-ng (tar2sqfs), or squashfs-tools 4.5 or later with zstd (mksquashfs)"


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A program that makes a squashfs of a tar stream."""

    name: str
    path: str

    def argv(self, output: str) -> list[str]:
        """The command line.

        What tar2sqfs writes depends on nothing but the stream; mksquashfs 4.5 gives the root directory the time of day.
        """
        # Said, for neither finds the processors of its affinity where /sys is missing.
        jobs = len(os.sched_getaffinity(0))
        if self.name == "tar2sqfs":
            options = f"--compressor zstd --comp-extra level={_ZSTD_LEVEL} --block-size {BLOCK_SIZE} --num-jobs {jobs}"
            return [self.path, "--quiet", "--force", "--no-skip", *options.split(), output]
        options = f"-tar -noappend -quiet -no-progress -processors {jobs} -b {BLOCK_SIZE}"
        zstd = f"-comp zstd -Xcompression-level {_ZSTD_LEVEL}"
        # With -tar it gives the root directory its own uid and 0777 unless told otherwise, and knows no -root-uid.
        root = "-mkfs-time 0 -root-mode 0755 -force-uid 0 -force-gid 0"
        return [self.path, "-", output, *options.split(), *zstd.split(), *root.split()]


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """A written image file: where, bytes, and ``sha256:<64 hex>``."""

    path: str
    size: int
    digest: str


def find_tool() -> Tool:
    """The writer to use. Raises :class:`ConversionFailed` when none is installed that can do it."""
    tar2sqfs, mksquashfs = shutil.which("tar2sqfs", path=_PATH), shutil.which("mksquashfs", path=_PATH)
    if tar2sqfs and re.search(r"^\s*zstd\b", _output([tar2sqfs, "--help"]), re.MULTILINE):
        return Tool(name="tar2sqfs", path=tar2sqfs)
    if mksquashfs:
        text = _output([mksquashfs, "-help"])
        if "-tar" in text and re.search(r"^\s*zstd\b", text, re.MULTILINE):
            return Tool(name="mksquashfs", path=mksquashfs)
    found = " and ".join(tool for tool in (tar2sqfs, mksquashfs) if tool)
    raise ConversionFailed(
        f"{found} cannot write zstd from a tar stream" if found else "neither tar2sqfs nor mksquashfs is installed",
        hint=MISSING_HINT,
    )


class Writer:
    """A running writer: it takes the stream piece by piece and is then told that this was all."""

    def __init__(self, tool: Tool, output: int) -> None:
        """``output`` is a descriptor of the image file, which the writer opens once more by /proc/self/fd.

        Raises :class:`ConversionFailed`."""
        self._tool = tool
        self._output = output
        # What it says beyond what the pipe holds is lost, and does not make it wait.
        self._log, log = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        environment = {"PATH": _PATH, "LC_ALL": "C"}
        if tool.name == "tar2sqfs":
            # It takes the time in the superblock from it (squashfs-tools-ng, NEWS of 0.9).
            environment["SOURCE_DATE_EPOCH"] = "0"
        argv = tool.argv(f"/proc/self/fd/{output}")
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[output],
                cwd="/",
                env=environment,
                bufsize=0,
            )
        except OSError as error:
            os.close(self._log)
            raise ConversionFailed(f"{argv[0]} cannot be started: {error.strerror}", hint=MISSING_HINT) from None
        finally:
            os.close(log)
        assert isinstance(self._process.stdin, io.RawIOBase)  # noqa: S101 - asked for above
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._process.stdin, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        self._stream: io.BufferedWriter = io.BufferedWriter(self._process.stdin, _PIPE_SIZE)

    def write(self, piece: bytes) -> None:
        """Raises :class:`ConversionFailed` when the writer has ended, OSError when it ended for want of space."""
        try:
            self._stream.write(piece)
        except BrokenPipeError:
            self._process.wait()
            raise self._failure() from None

    def finish(self) -> None:
        """The stream is whole; the file is, when this returns. Raises as :meth:`write`."""
        try:
            self._stream.flush()
            self._stream.close()
        except BrokenPipeError:
            self._process.wait()
            raise self._failure() from None
        if self._process.wait() != 0:
            raise self._failure()

    def close(self) -> None:
        """End it, whether or not it has finished."""
        with contextlib.suppress(OSError):
            self._process.kill()
        for stream in (self._stream.raw, self._stream):
            with contextlib.suppress(OSError, ValueError):
                stream.close()
        self._process.wait()
        os.close(self._log)

    def _failure(self) -> Exception:
        name, status = self._tool.name, self._process.returncode
        with contextlib.suppress(BlockingIOError):
            said = os.read(self._log, 1 << 16).decode(errors="replace").strip()
            if "Disk quota exceeded" in said:
                return OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
            if "No space left" in said or os.fstatvfs(self._output).f_bavail == 0:
                return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if "File too large" in said or status == -signal.SIGXFSZ:
                limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
                return ConversionFailed(f"the image file would be larger than {limit} bytes", hint=TOO_LARGE_HINT)
            if status >= 0:
                last = said.splitlines()[-1] if said else "it did not say why"
                return ConversionFailed(f"{name} ended with status {status}: {last[:300]}", hint=MISSING_HINT)
        return ConversionFailed(
            f"{name} was killed by {signal.Signals(-status).name}",
            hint="if memory ran out (dmesg), pull where there is more",
        )


def _output(argv: list[str]) -> str:
    try:
        # Not DEVNULL: the converter has no /dev.
        done = subprocess.run(argv, capture_output=True, input=b"", timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout + done.stderr).decode(errors="replace")
