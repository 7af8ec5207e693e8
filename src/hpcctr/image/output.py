"""The image file while it is made: the puller's file, which the converter writes, and which is the puller's alone again
before anything is believed of it.

The converter runs as another account, or as this one where it can reach no file, so no owner is changed, which only
root could: the file is open to everybody's writing as long as it is lent, in a directory that only this uid can
enter. It is reached by the descriptor the converter is given and in no other way."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import struct
from types import TracebackType

from hpcctr.errors import ConversionFailed
from hpcctr.image.convert import BLOCK_SIZE, MISSING_HINT, ImageFile
from hpcctr.image.imagefile import store_unusable

_PIECE = 1 << 20
#: Bytes of struct squashfs_super_block (fs/squashfs/squashfs_fs.h).
_SUPERBLOCK = 96
_ZSTD = 6


class Output:
    """``directory``/root.squashfs, until it is kept; otherwise nothing is left of it."""

    def __init__(self, directory: str) -> None:
        """``directory`` is one that only this uid can enter. Raises :class:`StoreUnusable`."""
        self.path = f"{directory}/root.squashfs"
        self._is_kept = False
        try:
            self.descriptor = _create(self.path)
        except OSError as error:
            raise store_unusable(self.path, error) from None

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.descriptor)
        if not self._is_kept:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        if isinstance(error, OSError):
            raise store_unusable(self.path, error) from None

    def lend(self) -> None:
        """Whoever has the descriptor can open the file for writing by /proc/self/fd."""
        os.fchmod(self.descriptor, 0o666)

    @property
    def size(self) -> int:
        """Bytes so far."""
        return os.fstat(self.descriptor).st_size

    def keep(self, inodes: int) -> ImageFile:
        """Take the file back for good, and see that it is what was asked for, of ``inodes`` inodes.

        Raises :class:`ConversionFailed`, OSError."""
        self._take_back()
        _require_squashfs(self.descriptor, inodes)
        os.fchmod(self.descriptor, 0o644)
        os.fsync(self.descriptor)
        file = ImageFile(path=self.path, size=self.size, digest=_digest(self.descriptor))
        self._is_kept = True
        return file

    def _take_back(self) -> None:
        """Make ``descriptor`` one of a file that nobody else can write.

        From the first line on nobody can open it any more; who has it open for writing still could. A read lease is
        granted only when nobody has (fcntl(2), F_SETLEASE; an owner needs no privilege). Where it is not, or where the
        filesystem has no leases, a copy is made that nobody has ever seen."""
        os.fchmod(self.descriptor, 0o600)
        reading = os.open(f"/proc/self/fd/{self.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.dup2(reading, self.descriptor, inheritable=False)
        finally:
            os.close(reading)
        try:
            fcntl.fcntl(self.descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            fcntl.fcntl(self.descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError:
            self._replace_by_copy()

    def _replace_by_copy(self) -> None:
        os.unlink(self.path)
        copy = _create(self.path)
        try:
            # No more than there is now: somebody may be appending.
            left, at = self.size, 0
            while left and (piece := os.pread(self.descriptor, min(_PIECE, left), at)):
                view = memoryview(piece)
                while view:
                    view = view[os.write(copy, view) :]
                at += len(piece)
                left -= len(piece)
            os.dup2(copy, self.descriptor, inheritable=False)
        finally:
            os.close(copy)


def inode_count(path: str) -> int:
    """Inodes of a squashfs."""
    with open(path, "rb") as file:
        return int(struct.unpack_from("<I", file.read(_SUPERBLOCK), 4)[0])


def _create(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _require_squashfs(descriptor: int, inodes: int) -> None:
    """Raise :class:`ConversionFailed` unless the file is a squashfs 4.0 with the options asked for, wholly there."""
    head = os.pread(descriptor, _SUPERBLOCK, 0)
    if len(head) == _SUPERBLOCK:
        magic, found, _, block_size, _, compression, _, _, _, major, minor = struct.unpack_from("<4sIIIIHHHHHH", head)
        (used,) = struct.unpack_from("<Q", head, 40)
        if (magic, block_size, compression, major, minor) == (b"hsqs", BLOCK_SIZE, _ZSTD, 4, 0) and (
            _SUPERBLOCK <= used <= os.fstat(descriptor).st_size
        ):
            if found != inodes:
                raise ConversionFailed(
                    f"the image file has {found} inodes, the image {inodes}",
                    hint="install another version of squashfs-tools-ng",
                )
            return
    raise ConversionFailed(f"no zstd squashfs of blocks of {BLOCK_SIZE} bytes was written", hint=MISSING_HINT)


def _digest(descriptor: int) -> str:
    digest = hashlib.sha256()
    at = 0
    while piece := os.pread(descriptor, _PIECE, at):
        digest.update(piece)
        at += len(piece)
    if at != os.fstat(descriptor).st_size:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return f"sha256:{digest.hexdigest()}"
