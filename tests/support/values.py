"""Plain values for unit tests of pure code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpcctr.context import Caller
from hpcctr.image.publish import publish, set_name, workspace
from hpcctr.image.record import ImageConfig, ImageRecord, Platform, StoredImage
from hpcctr.image.reference import ImageRef
from hpcctr.image.store import Store


def a_caller(*, uid: int = 1000, gid: int = 1000, groups: tuple[int, ...] = (), pid: int = 4242) -> Caller:
    """A caller that is nobody: its pidfd is no descriptor."""
    return Caller(pid=pid, pidfd=-1, uid=uid, gid=gid, groups=groups)


def a_stored_image(
    *, name: str = "docker.io/library/debian:12", digest: str = "sha256:" + "a" * 64, config: ImageConfig | None = None
) -> StoredImage:
    """An image that is in no store."""
    record = ImageRecord(
        schema=1,
        digest=digest,
        platform=Platform(os="linux", architecture="amd64"),
        config=config or ImageConfig(),
        file="root.squashfs",
        file_size=4096,
        file_digest="sha256:" + "f" * 64,
        content_size=10,
        entries=3,
        created="2026-01-01T00:00:00Z",
        source=name,
    )
    return StoredImage(record=record, path="/nowhere/root.squashfs", name=name)


def publish_for_test(store_path: str, image: StoredImage) -> None:
    """Put an image whose file is empty into a store, under its name."""
    store = Store.open(store_path, writable=True)
    with workspace(store) as place:
        file = Path(place) / "made"
        file.write_bytes(b"")
        publish(store, image.record, str(file))
    set_name(store, ImageRef.parse(image.name), image.record.platform, image.record.digest)


def the_document(*, uid: int, gid: int, gids: list[int], container_id: str) -> dict[str, Any]:
    """The whole OCI spec of a container, for whatever image and targets: written out, and not taken from the code."""
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": uid, "gid": gid, "additionalGids": gids},
            "args": ["/.hpcctr-anchor"],
            "env": [],
            "cwd": "/",
            "capabilities": {name: [] for name in ("bounding", "effective", "inheritable", "permitted", "ambient")},
            "noNewPrivileges": True,
            "oomScoreAdj": 0,
        },
        "root": {"path": "rootfs", "readonly": True},
        "mounts": [
            {
                "destination": "/proc",
                "type": "proc",
                "source": "proc",
                "options": ["nosuid", "nodev", "noexec", "hidepid=2", "subset=pid"],
            },
            {
                "destination": "/dev",
                "type": "tmpfs",
                "source": "tmpfs",
                "options": ["nosuid", "noexec", "ro", "mode=755", "size=64k"],
            },
        ],
        "linux": {
            "namespaces": [{"type": "mount"}],
            "rootfsPropagation": "private",
            "cgroupsPath": f"/hpcctr-{container_id}",
            "maskedPaths": [],
            "readonlyPaths": [],
        },
    }
