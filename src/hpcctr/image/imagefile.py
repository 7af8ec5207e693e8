"""The image file as the engine gets it: a descriptor of a file that nobody but root and the store's owner can have
written.

Root mounts this file, and a squashfs is parsed by the kernel: whoever can write it attacks the kernel. Everything is
opened first and looked at through its descriptor; the other way round another file could be slipped in between."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from hpcctr.errors import ImageBroken, StoreUnusable
from hpcctr.image.record import StoredImage

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

_HINTS = {
    errno.EACCES: "make {path} readable for everyone (directories 0755, files 0644), or ask its administrator",
    errno.EPERM: "ask the administrator of the store",
    errno.EROFS: "pull on the node where the store is mounted read-write",
    errno.ENOSPC: "free space there (hpcctr images, hpcctr rm), or set another store in site.toml",
    errno.EDQUOT: "free space there (hpcctr images, hpcctr rm), or ask for more quota",
    errno.ENOENT: "hpcctr pull makes what is missing when the store's administrator runs it",
    errno.ELOOP: "{path} is a symbolic link; put the file itself there",
    errno.ENOTDIR: "remove what is in the way of that directory",
    errno.ESTALE: "the file server was restarted or its export changed; mount it again",
}


def open_image_file(store_path: str, image: StoredImage) -> int:
    """A read-only descriptor of the image's file; the caller closes it.

    Refused when the file, a directory from the store's root on, or one above it can be changed by anybody but root
    and the store's owner. Above the root a directory that others can write is fine when it is sticky, as /tmp is.
    Raises :class:`StoreUnusable` naming the path, and :class:`ImageBroken` for a file that is not the size that was
    published."""
    again = f"pull the image again: hpcctr pull {image.record.source}"
    parts = image.path.removeprefix(f"{store_path}/").split("/")
    if not image.path.startswith(f"{store_path}/") or any(part in ("", ".", "..") for part in parts):
        raise StoreUnusable(f"{image.path} is not in the store {store_path}", hint=again)
    path = os.path.realpath(store_path)
    directory = _open(path, _DIRECTORY, path)
    try:
        owner = os.fstat(directory).st_uid
        _require_untamperable_above(path, owner)
        _require_untamperable(path, os.fstat(directory), owner)
        for part in parts[:-1]:
            path = f"{path}/{part}"
            inner = _open(part, _DIRECTORY | os.O_NOFOLLOW, path, at=directory)
            os.close(directory)
            directory = inner
            _require_untamperable(path, os.fstat(directory), owner)
        path = f"{path}/{parts[-1]}"
        file = _open(parts[-1], _FILE, path, at=directory)
    finally:
        os.close(directory)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise StoreUnusable(f"{path} is not a regular file", hint=again)
        _require_untamperable(path, status, owner)
        if status.st_size != image.record.file_size:
            raise ImageBroken(f"{path} has {status.st_size} bytes, {image.record.file_size} were published", hint=again)
    except BaseException:
        os.close(file)
        raise
    return file


def store_unusable(path: str, error: OSError) -> StoreUnusable:
    """What an error of the kernel about a path in the store means."""
    hint = _HINTS.get(error.errno or 0, "").format(path=path)
    return StoreUnusable(f"{path}: {(error.strerror or str(error)).lower()}", hint=hint)


def _require_untamperable_above(path: str, owner: int) -> None:
    below = os.stat(path)
    for parent in Path(path).parents:
        status = parent.stat()
        # In a sticky directory a name is whose who came first: only root's cannot have been made by anybody.
        is_sticky = status.st_mode & stat.S_ISVTX and below.st_uid == 0
        if status.st_uid not in (0, owner) or (status.st_mode & _OTHERS_WRITE and not is_sticky):
            raise _tamperable(str(parent), status)
        below = status


def _require_untamperable(path: str, status: os.stat_result, owner: int) -> None:
    if status.st_uid not in (0, owner) or status.st_mode & _OTHERS_WRITE:
        raise _tamperable(path, status)


def _tamperable(path: str, status: os.stat_result) -> StoreUnusable:
    access = f"uid {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}"
    return StoreUnusable(
        f"{path} can be changed by others than the store's owner ({access})",
        hint=f"chown root {path} && chmod go-w {path}",
    )


def _open(name: str, flags: int, path: str, *, at: int | None = None) -> int:
    try:
        return os.open(name, flags, dir_fd=at)
    except OSError as error:
        raise store_unusable(path, error) from None
