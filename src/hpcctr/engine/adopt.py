"""What an engine finds of another that has ended: containers still in use, and leftovers.

Everything is found by our labels in containerd and by the kernel's tables; nothing is written down for this.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection

from hpcctr.containerd.client import Containerd, ContainerEntry, TaskState
from hpcctr.engine.members import members_in_proc
from hpcctr.engine.node import (
    LABEL_DIGEST,
    LABEL_KEY,
    LABEL_OWNER,
    LABEL_UID,
    NodeBuilder,
    NodeContainer,
    upper_below,
)
from hpcctr.engine.state import StateDirectory, dead_siblings, unmount_all
from hpcctr.engine.view import Place
from hpcctr.errors import ContainerdFailed, DeadlinePassed, HpcctrError

_CONTAINER_ID = re.compile(r"[0-9a-f]{32}-[0-9a-f]{8}")

#: A container and its members, each as pid and pidfd.
Survivor = tuple[NodeContainer, list[tuple[int, int]]]


def survivors(builder: NodeBuilder, *, known: Collection[str]) -> list[Survivor]:
    """The containers of the builder's owner that have living members and can still be entered, the newest of each key.

    Containers in ``known`` are left alone. Raises what :mod:`hpcctr.containerd.client` names.
    """
    entries = [
        entry
        for entry in builder.containerd.list_containers(label=LABEL_OWNER, value=builder.owner)
        if _is_plausible(entry) and entry.container_id not in known
    ]
    if not entries:
        return []
    entries.sort(key=lambda entry: entry.created, reverse=True)
    tasks = {entry.container_id: builder.containerd.find_task(entry.container_id) for entry in entries}
    # From here on nothing outside is asked: a failure would leave half of it done.
    members: dict[str, list[tuple[int, int]]] = {}
    for upper, pid, pidfd in members_in_proc(
        {builder.upper(entry.container_id): int(entry.labels[LABEL_UID]) for entry in entries}
    ):
        members.setdefault(upper, []).append((pid, pidfd))
    found: dict[str, Survivor] = {}
    for entry in entries:
        its = members.pop(builder.upper(entry.container_id), [])
        key = entry.labels[LABEL_KEY]
        container = _enter_again(builder, entry, tasks[entry.container_id]) if its and key not in found else None
        if container is not None:
            found[key] = (container, its)
        else:
            for _, pidfd in its:
                os.close(pidfd)
    return list(found.values())


def _is_plausible(entry: ContainerEntry) -> bool:
    return (
        _CONTAINER_ID.fullmatch(entry.container_id) is not None
        and entry.container_id.startswith(entry.labels.get(LABEL_KEY, "?") + "-")
        and entry.labels.get(LABEL_UID, "").isdecimal()
    )


def _enter_again(builder: NodeBuilder, entry: ContainerEntry, task: TaskState | None) -> NodeContainer | None:
    """The container of a record, when its namespace can still be had; a dead anchor means building anew."""
    if task is None or not task.is_created:
        return None
    with contextlib.suppress(HpcctrError, OSError):
        image_mount = builder.image_mount_of(entry.container_id)
        container = NodeContainer(
            container_id=entry.container_id,
            key=entry.labels[LABEL_KEY],
            uid=int(entry.labels[LABEL_UID]),
            image_digest=entry.labels.get(LABEL_DIGEST, ""),
            namespace=builder.open_namespace(entry.container_id, task.pid),
            image_mount=image_mount,
            created=entry.created,
        )
        try:
            # Last: counted off again it would be taken down, which another container may stand on.
            builder.images.adopt(image_mount)
        except BaseException:
            container.close()
            raise
        return container
    return None


def clear_after_direct_engines(builder: NodeBuilder, state: StateDirectory) -> None:
    """Remove what direct engines that were killed left: those whose state directory nobody has locked, or has gone.

    What containerd refuses to remove stays for the next engine that starts.
    """
    for path, owner in dead_siblings(state):
        entries = builder.containerd.list_containers(label=LABEL_OWNER, value=owner)
        if all([_is_taken_down(builder, entry) for entry in entries]):
            unmount_all(path)
    # Records outlive a reboot, the directory does not. A living engine has its directory before its first record.
    for entry in builder.containerd.list_containers(label=LABEL_OWNER):
        owner = entry.labels[LABEL_OWNER]
        if owner != builder.owner and state.is_gone(owner):
            _is_taken_down(builder, entry)


def places_of_direct_engines(containerd: Containerd, state: StateDirectory) -> dict[str, Place]:
    """Root's containers, by their upper layers: each launch of root's has an engine beside ``state``."""
    places = {}
    for entry in containerd.list_containers(label=LABEL_UID, value="0"):
        directory = state.sibling(entry.labels.get(LABEL_OWNER, ""))
        if directory is not None and _is_plausible(entry):
            places[upper_below(directory, entry.container_id)] = Place(
                container_id=entry.container_id,
                key=entry.labels[LABEL_KEY],
                uid=0,
                image_digest=entry.labels.get(LABEL_DIGEST, ""),
            )
    return places


def _is_taken_down(builder: NodeBuilder, entry: ContainerEntry) -> bool:
    try:
        builder.take_down_in_containerd(entry.container_id)
    except (ContainerdFailed, DeadlinePassed):
        return False
    return True
