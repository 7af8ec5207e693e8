"""The image file as a mount: once per file, however many node containers stand on it.

The kernel is given the very file the store opened and checked, as a descriptor: no path of the store is looked up
again. A mount is known by what the kernel says of that file (device, inode, size, time), never by what a record claims
of its content, so one user's private file cannot stand in for another's image of the same digest.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from hpcctr.engine.mounts import MS_NODEV, MS_NOSUID, MS_RDONLY, mount, unmount
from hpcctr.engine.uses import Uses
from hpcctr.errors import DeadlinePassed, ImageMountFailed
from hpcctr.mounttable import mounted_by, read_mounts

#: linux/loop.h.
_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LO_FLAGS_READ_ONLY = 1
_LO_FLAGS_AUTOCLEAR = 4
#: struct loop_config: fd, block size, struct loop_info64 (232 bytes: lo_flags at 52, lo_file_name at 56), reserved.
_LOOP_CONFIG = struct.Struct("=II52xI64s112x64x")
#: Others may take the free device first; who loses asks again.
_LOOP_ATTEMPTS = 64
#: Seconds to wait for another thread that reads, mounts or unmounts the same file: mount(2) itself has no limit.
_MOUNT_SECONDS = 110.0
#: First bytes of a squashfs (fs/squashfs/squashfs_fs.h).
_SQUASHFS_MAGIC = b"hsqs"


@dataclass(kw_only=True)
class _Mount:
    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0


class ImageMounts:
    """The image mounts of one engine, below ``directory`` (root-owned, 0700); ``uses`` tells the store of them."""

    def __init__(self, directory: str, uses: Uses | None = None) -> None:
        self.directory = directory
        self._uses = uses
        self._lock = threading.Lock()
        self._mounts: dict[str, _Mount] = {}

    def path(self, name: str) -> str:
        """Where the mount of that name is."""
        return os.path.join(self.directory, name)

    def take(
        self, image: int, *, image_digest: str, path: str = "", require_intact: Callable[[], None] = lambda: None
    ) -> str:
        """Mount the file behind the descriptor unless it is, and count one user more; the name of the mount.

        ``path`` is where the store has the file; ``require_intact`` is called before it is mounted. Raises
        :class:`ImageMountFailed`, :class:`ImageNotInStore` when it is being removed, and :class:`DeadlinePassed` while
        another's mounting of the same file hangs.
        """
        name = name_of_mount(image, image_digest)
        entry = self._counted(name)
        if not entry.lock.acquire(timeout=_MOUNT_SECONDS):
            with self._lock:
                entry.users -= 1
            raise DeadlinePassed(
                f"image {image_digest} was not mounted within {_MOUNT_SECONDS:.0f} s",
                hint="look at the filesystem of the store: dmesg | tail",
            )
        try:
            # Looked up each time: an administrator may have unmounted it, and the directory below is an empty root.
            if not _is_image_mount(self.path(name)):
                if self._uses is not None:
                    self._uses.begin(name, image=image, path=path)
                require_intact()
                _mount_image(image, self.path(name), image_digest)
        except BaseException:
            entry.lock.release()
            self.release(name)
            raise
        entry.lock.release()
        return name

    def adopt(self, name: str) -> None:
        """Count one user of a mount an earlier engine made. Raises :class:`ImageMountFailed` unless it is there."""
        entry = self._counted(name)
        try:
            with entry.lock:
                _require_image_mount(self.path(name))
        except BaseException:
            self.release(name)
            raise

    def release(self, name: str) -> None:
        """Count one user less; the last one takes the mount down."""
        with self._lock:
            entry = self._mounts[name]
            entry.users -= 1
        # Whoever comes meanwhile counts itself and waits for this lock, then mounts again.
        with entry.lock:
            with self._lock:
                # Of two who go at once, the second finds the work done and the name perhaps with a new entry.
                if entry.users or self._mounts.get(name) is not entry:
                    return
            self._take_down(name)
            with self._lock:
                if not entry.users:
                    self._mounts.pop(name, None)

    def sweep(self) -> None:
        """Take down every mount in the directory that has no user."""
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.directory):
                # As its last user would: nobody can begin to use it meanwhile.
                self._counted(name)
                self.release(name)

    def _counted(self, name: str) -> _Mount:
        with self._lock:
            entry = self._mounts.setdefault(name, _Mount())
            entry.users += 1
            return entry

    def _take_down(self, name: str) -> None:
        unmount(self.path(name))
        with contextlib.suppress(OSError):
            os.rmdir(self.path(name))
        if self._uses is not None:
            self._uses.end(name)


def name_of_mount(image: int, image_digest: str) -> str:
    """What the mount of an open image file is called. Raises :class:`ImageMountFailed` for what is no file."""
    status = os.fstat(image)
    if not stat.S_ISREG(status.st_mode):
        raise ImageMountFailed(f"image {image_digest}: what the store opened is not a file", hint="hpcctr doctor")
    identity = (image_digest, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:32]


def _mount_image(image: int, target: str, image_digest: str) -> None:
    try:
        if mounted_by(image) != 0:
            # Owner and content of its files are whatever the program says that serves it, at any moment.
            raise ImageMountFailed(
                f"image {image_digest}: its file is on a filesystem that is served for a user",
                hint="findmnt --target the store; it must be mounted by root",
            )
        if os.pread(image, len(_SQUASHFS_MAGIC), 0) != _SQUASHFS_MAGIC:
            raise ImageMountFailed(
                f"image {image_digest}: its file is not a squashfs",
                hint=f"hpcctr rm {image_digest}, then pull it again",
            )
        os.makedirs(target, mode=0o700, exist_ok=True)
        device = _attach_loop(image, image_digest)
    except OSError as error:
        raise _failed(image_digest, error) from None
    try:
        # The loop device goes with its last user (LO_FLAGS_AUTOCLEAR): this descriptor, then the mount.
        mount(device.path, target, "squashfs", flags=MS_RDONLY | MS_NOSUID | MS_NODEV)
        _require_image_mount(target)
    except OSError as error:
        raise _failed(image_digest, error) from None
    except ImageMountFailed:
        unmount(target)
        raise
    finally:
        os.close(device.descriptor)


def _failed(image_digest: str, error: OSError) -> ImageMountFailed:
    remedy = {
        errno.ENODEV: "modprobe squashfs loop",
        errno.ENXIO: "modprobe loop",
        errno.ENOENT: "modprobe loop",
        errno.EINVAL: f"the file is damaged: hpcctr rm {image_digest}, then pull it again",
        errno.EIO: f"the file is damaged: hpcctr rm {image_digest}, then pull it again",
    }
    return ImageMountFailed(
        f"image {image_digest} cannot be mounted: {error.strerror}", hint=remedy.get(error.errno or 0, "dmesg | tail")
    )


@dataclass(frozen=True, kw_only=True)
class _Loop:
    path: str
    descriptor: int


def _attach_loop(image: int, image_digest: str) -> _Loop:
    config = _LOOP_CONFIG.pack(
        image, 0, _LO_FLAGS_READ_ONLY | _LO_FLAGS_AUTOCLEAR, image_digest.encode("ascii", "replace")[:63]
    )
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_LOOP_ATTEMPTS):
            path = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            device = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, config)
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:
                    raise
            else:
                return _Loop(path=path, descriptor=device)
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, "no free loop device")


def _is_image_mount(target: str) -> bool:
    """Whether a squashfs is on ``target``, with every restriction, as the kernel tells."""
    found = [entry for entry in read_mounts() if entry.target == target]
    return bool(found) and found[-1].kind == "squashfs" and {"ro", "nosuid", "nodev"} <= found[-1].options


def _require_image_mount(target: str) -> None:
    if not _is_image_mount(target):
        raise ImageMountFailed(f"{target} is not the restricted squashfs it should be", hint="dmesg | tail")
