"""The section ``linux``: a mount namespace, and nothing else of its own."""

from __future__ import annotations


def linux(container_id: str) -> dict[str, object]:
    """The section.

    Namespaces that are not named stay the host's. The cgroup is for the anchor alone, since programs stay in their
    job's; it is flat because runtimes remove the last directory of the path and leave its parents.
    """
    return {
        "namespaces": [{"type": "mount"}],
        "rootfsPropagation": "private",
        "cgroupsPath": cgroup_of(container_id),
        # Empty, not absent: runtimes and tools take an absent list for "choose something".
        "maskedPaths": [],
        "readonlyPaths": [],
    }


def cgroup_of(container_id: str) -> str:
    """The cgroup of a container's anchor, in every hierarchy."""
    return f"/hpcctr-{container_id}"
