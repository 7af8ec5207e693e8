"""The host's files in a node container: written down when it is built, and compared with what the kernel has mounted.

The record lies beside the upper layer, in a tmpfs that is root's alone: an engine that starts asks the same of a
container it finds as the one that built it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from hpcctr.engine.mounts import open_beneath
from hpcctr.errors import FeatureUnusable
from hpcctr.host.trusted import identity_of
from hpcctr.mounttable import MountEntry, mount_number
from hpcctr.spec.mounts import BindMount

#: The name of the record, and bytes of it that are read: the most edits with the longest paths, twice.
RECORD = "bindings"
_RECORD_MAX = 8 << 20


class NotAsAsked(Exception):
    """The kernel's mounts are not the ones that were asked for; the text says in what."""


def write(directory: str, binds: Sequence[BindMount]) -> None:
    """Write the record into a container's directory, once; none for nothing. Raises OSError."""
    if not binds:
        return
    with open(os.path.join(directory, RECORD), "xb") as file:
        file.write(msgspec.json.encode(list(binds)))


def read(directory: str) -> tuple[BindMount, ...]:
    """The record; nothing where none was written. Raises OSError, and :class:`NotAsAsked` when it is no record."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(os.path.join(directory, RECORD), flags), "rb") as file:
            raw = file.read(_RECORD_MAX)
    except FileNotFoundError:
        return ()
    try:
        return tuple(msgspec.json.decode(raw, type=list[BindMount]))
    except msgspec.MsgspecError:
        raise NotAsAsked("the record of the host's files in it cannot be read") from None


def require_as_asked(entries: Iterable[MountEntry], binds: Sequence[BindMount]) -> None:
    """Raise :class:`NotAsAsked` unless the mounts of the host's are ``binds``, each once and as restricted as asked.

    What the host has mounted below a directory came with it, and is as restricted. ``entries`` are all mounts of the
    container but those of the runtime's own.
    """
    wanted = {bind.target: bind for bind in binds}
    missing = set(wanted)
    for entry in entries:
        bind = wanted.get(entry.target)
        if bind is not None:
            if entry.target not in missing:
                raise NotAsAsked(f"two things are mounted on {entry.target}")
            missing.remove(entry.target)
        else:
            bind = _directory_above(entry.target, wanted)
        if bind is None:
            raise NotAsAsked(f"something is mounted on {entry.target}")
        lacking = _restrictions(bind) - entry.options
        if lacking:
            raise NotAsAsked(f"{entry.target} is not {', '.join(sorted(lacking))}")
    if missing:
        raise NotAsAsked(f"nothing is mounted on {min(missing)}")


def require_unchanged(pid: int, root: MountEntry, binds: Sequence[BindMount]) -> None:
    """Raise :class:`FeatureUnusable` when something else than what was looked at has been mounted: a driver's update in
    between, another mount over it.

    ``root`` is the mount that is the root of process ``pid``. Raises OSError when the process has ended, and
    :class:`NotAsAsked` when its root is another.
    """
    if not binds:
        return
    top = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if mount_number(top) != root.number:
            raise NotAsAsked("its root has been replaced")
        for bind in binds:
            if _identity_below(top, bind.target) != bind.identity:
                raise FeatureUnusable(f"{bind.origin}: {bind.source} changed while it was mounted", hint="try again")
    finally:
        os.close(top)


def _restrictions(bind: BindMount) -> set[str]:
    return {"nosuid", "nodev", *(["ro"] if bind.is_read_only else []), *(["noexec"] if bind.is_noexec else [])}


def _identity_below(top: int, target: str) -> str:
    try:
        # Through no link and no magic link: the way is the engine's own making, and still nothing of it is followed.
        descriptor = open_beneath(top, os.fsencode(target), is_mount_crossed=True)
    except OSError:
        return ""
    try:
        return identity_of(os.fstat(descriptor))
    finally:
        os.close(descriptor)


def _directory_above(target: str, wanted: Mapping[str, BindMount]) -> BindMount | None:
    """The innermost directory of the host's that ``target`` lies below."""
    while len(target) > 1:
        target = os.path.dirname(target)
        bind = wanted.get(target)
        if bind is not None:
            return bind if bind.kind == "d" else None
    return None
