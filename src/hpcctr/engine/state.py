"""The state directory of an engine: root's alone, and locked while the engine lives.

<base>/state/        the gateway's          images/       image mounts
<base>/direct-PID/   of direct engines      containers/   upper layers
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator

from hpcctr.engine.mounts import unmount
from hpcctr.errors import EngineBusy, HpcctrError
from hpcctr.mounttable import read_mounts

_CONTAINERS = "containers"
_DIRECT = re.compile(r"direct-[0-9]{1,10}")
#: Paths below it become options of mount(2) and labels of containerd.
_PLAIN = re.compile(r"/[A-Za-z0-9_./-]+")
#: Seconds to wait for a lock somebody holds for a moment, to see whether its owner lives.
_CLAIM_SECONDS = 10.0


class StateDirectory:
    """One state directory and the lock on it."""

    def __init__(self, path: str) -> None:
        if not _PLAIN.fullmatch(path) or os.path.normpath(path) != path:
            raise HpcctrError(f"state directory {path!r} is not a plain absolute path")
        self.path = path
        self.images = os.path.join(path, "images")
        self.containers = os.path.join(path, _CONTAINERS)
        self._lock: int | None = None

    def claim(self) -> None:
        """Make the directory and lock it. Raises :class:`EngineBusy` when a living engine has it."""
        late = time.monotonic() + _CLAIM_SECONDS
        while self._lock is None:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
            self._lock = _locked(self.path)
            if self._lock is None:
                if time.monotonic() > late:
                    raise EngineBusy(f"another engine uses {self.path}", hint="systemctl status hpcctr-engine")
                time.sleep(0.05)
        os.makedirs(self.images, mode=0o700, exist_ok=True)
        os.makedirs(self.containers, mode=0o700, exist_ok=True)

    def release(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove(self) -> None:
        """Remove the directory and every mount in it, if it is ours."""
        if self._lock is not None:
            unmount_all(self.path)

    def sibling(self, owner: str) -> str | None:
        """``<state>/containers`` of the direct engine ``owner`` beside this one; None for any other word."""
        if _DIRECT.fullmatch(owner) is None:
            return None
        return os.path.join(os.path.dirname(self.path), owner, _CONTAINERS)

    def is_gone(self, owner: str) -> bool:
        """Whether ``owner`` names a direct engine that has no state directory beside this one."""
        is_direct = _DIRECT.fullmatch(owner) is not None
        return is_direct and not os.path.lexists(os.path.join(os.path.dirname(self.path), owner))


def _locked(path: str) -> int | None:
    """A descriptor that holds the lock of a state directory; None while somebody else does, or it goes away meanwhile.

    Raises :class:`HpcctrError` when anybody but root could have changed what is in it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        os.close(descriptor)
        raise HpcctrError(f"{path} is not closed to other users", hint=f"chown root:root {path} && chmod 0700 {path}")
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Who sweeps a dead engine's directory removes it: the lock counts only for the directory that has the name now.
        if os.path.samestat(status, os.stat(path, follow_symlinks=False)):
            return descriptor
    os.close(descriptor)
    return None


def dead_siblings(state: StateDirectory) -> Iterator[tuple[str, str]]:
    """Path and owner of the direct engines beside ``state`` that have died, each locked while it is yielded."""
    base = os.path.dirname(state.path)
    for name in os.listdir(base):
        path = os.path.join(base, name)
        if not _DIRECT.fullmatch(name) or path == state.path:
            continue
        descriptor = _locked(path)
        if descriptor is not None:
            try:
                yield path, name
            finally:
                os.close(descriptor)


def unmount_all(path: str) -> None:
    """Take every mount at or below ``path`` down, innermost and latest first, and remove the directory."""
    for entry in reversed(read_mounts()):
        if entry.target == path or entry.target.startswith(path + "/"):
            unmount(entry.target)
    # Nothing is mounted there any more, so this cannot reach an image or a running container.
    shutil.rmtree(path, ignore_errors=True)
