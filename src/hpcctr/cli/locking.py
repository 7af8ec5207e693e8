"""``hpcctr pull --lock FILE``: what was pulled, written into a lock file (:mod:`hpcctr.lockfile`) of the user's.

In the user's own process, with the user's rights: under another name, flushed, and renamed. The file's mode stays, and
a symbolic link to it too.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path

from hpcctr import lockfile
from hpcctr.cli import shared_images
from hpcctr.errors import LockFileWrong
from hpcctr.lockfile import Locked
from hpcctr.site import Site


def require_writable(path: str) -> None:
    """Raise :class:`LockFileWrong` before anything is pulled for a file that cannot be written, or is another kind."""
    lockfile.parse(_text(path), path)
    directory = Path(os.path.realpath(path)).parent
    if not os.access(directory, os.W_OK | os.X_OK):
        raise LockFileWrong(f"{path}: {directory} is not a directory you can write", hint="name another file")


def of_shared(image: str, platform: str) -> Locked:
    """What another user's image is locked as: it is not pulled. Raises :class:`ImageNotInStore`."""
    facts = shared_images.facts(Site.of_this_process(), image, platform)
    found = facts["platform"]
    assert isinstance(found, dict)  # noqa: S101 - a record's
    words = (found.get(key) for key in ("os", "architecture", "variant"))
    return Locked(
        name=str(facts["name"]), digest=str(facts["digest"]), platform="/".join(str(word) for word in words if word)
    )


def write(path: str, images: Sequence[Locked]) -> None:
    """Put images into a lock file, which is made when there is none. Raises :class:`LockFileWrong`."""
    target = Path(os.path.realpath(path))
    text = lockfile.updated(_text(path), images, path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                if mode is not None:
                    os.fchmod(descriptor, mode)
                file.write(text)
                file.flush()
                os.fsync(descriptor)
            temporary.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise LockFileWrong(f"{path}: {error.strerror}", hint="name a file you can write") from None


def _text(path: str) -> str:
    return lockfile.read(path) if os.path.lexists(path) else ""
