"""fs-verity: the kernel's own check of a file whenever it is read (Documentation/filesystems/fsverity.rst).

Once it is enabled the file cannot be changed any more, by root neither, every page is compared with a tree of hashes
when it is read from the disk, and the kernel tells the digest of that tree at once. Local filesystems have it (ext4 and
btrfs, where it is switched on); NFS, Lustre and GlusterFS do not pass it on.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

#: linux/fsverity.h: _IOW('f', 133, struct fsverity_enable_arg), _IOWR('f', 134, struct fsverity_digest).
_ENABLE = 0x40806685
_MEASURE = 0xC0046686
_SHA256 = 1
_BLOCK_SIZE = 4096
#: version, hash algorithm, block size, salt size, its pointer, signature size, reserved, its pointer, reserved.
_ENABLE_ARG = struct.Struct("=IIIIQIIQ88x")
_DIGEST_HEAD = struct.Struct("=HH")
_DIGEST_MAX = 64
#: What a kernel or filesystem without it says.
_WITHOUT = (errno.ENOTTY, errno.EOPNOTSUPP, errno.ENODATA, errno.EINVAL, errno.ENOSYS, errno.EPERM)


def enable(path: str) -> str:
    """Seal a finished file that nobody has open for writing, and return its digest; ``""`` where that is not to be had.

    Raises OSError for what is not about fs-verity: no space for the tree, an error of the disk.
    """
    argument = _ENABLE_ARG.pack(1, _SHA256, _BLOCK_SIZE, 0, 0, 0, 0, 0)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        try:
            fcntl.ioctl(descriptor, _ENABLE, argument)
        except OSError as error:
            if error.errno in _WITHOUT:
                return ""
            if error.errno != errno.EEXIST:
                raise
        return measure(descriptor)
    finally:
        os.close(descriptor)


def measure(file: int) -> str:
    """The digest by which the kernel checks an open file, ``sha256:<64 hex>``; ``""`` when it does not.

    Raises OSError.
    """
    buffer = bytearray(_DIGEST_HEAD.pack(0, _DIGEST_MAX) + bytes(_DIGEST_MAX))
    try:
        fcntl.ioctl(file, _MEASURE, buffer)
    except OSError as error:
        if error.errno in _WITHOUT:
            return ""
        raise
    algorithm, size = _DIGEST_HEAD.unpack_from(buffer)
    if algorithm != _SHA256 or size != 32:
        return ""
    return f"sha256:{buffer[_DIGEST_HEAD.size :][:size].hex()}"
