"""The section ``root``: the overlay that containerd's shim mounts on the bundle's ``rootfs``, read-only."""

from __future__ import annotations


def root() -> dict[str, object]:
    """The section. The path must be ``rootfs``: that is where the shim puts the mounts of Tasks.Create."""
    return {"path": "rootfs", "readonly": True}
