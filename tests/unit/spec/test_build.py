"""Grant in, document out."""

from __future__ import annotations

import json

import pytest

from hpcctr.host.edits import EnvEdit, HostEdits
from hpcctr.image.record import ImageConfig
from hpcctr.policy.grant import Grant
from hpcctr.request import Target
from hpcctr.spec.build import build_spec
from tests.support.values import a_caller, a_stored_image

HOSTILE = ImageConfig(
    env=("LD_PRELOAD=/evil.so",),
    entrypoint=("/evil",),
    cmd=("/evil",),
    working_dir="/proc/self/fd/8",
    user="0:0",
    labels={"containerd.io/restart.loguri": "binary:///evil", "io.containerd.runc.v2.group": "others"},
)


def _grant(**changes: object) -> Grant:
    values: dict[str, object] = {
        "caller": a_caller(uid=1000, gid=100, groups=(100, 200)),
        "image": a_stored_image(),
        "edits": HostEdits(),
        "targets": (Target("d", b"/home/u"),),
        "rule": "built in",
    }
    return Grant(**{**values, **changes})  # type: ignore[arg-type]


def test_the_document_is_this_and_nothing_more() -> None:
    assert build_spec(_grant(), container_id="0123-ab") == {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 1000, "gid": 100, "additionalGids": [100, 200]},
            "args": ["/.hpcctr-anchor"],
            "env": [],
            "cwd": "/",
            "capabilities": {"bounding": [], "effective": [], "inheritable": [], "permitted": [], "ambient": []},
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
            "cgroupsPath": "/hpcctr-0123-ab",
            "maskedPaths": [],
            "readonlyPaths": [],
        },
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"image": a_stored_image(config=HOSTILE)},
        {"targets": (Target("d", b"/x,upperdir=/etc"), Target("f", b"/etc/passwd"))},
        {"edits": HostEdits(env=(EnvEdit(name="A", value="evil", origin="site"),))},
    ],
)
def test_neither_image_nor_targets_nor_environment_reach_the_document(changes: dict[str, object]) -> None:
    assert build_spec(_grant(**changes), container_id="c") == build_spec(_grant(), container_id="c")


def test_the_document_has_no_hooks_annotations_or_seccomp() -> None:
    text = json.dumps(build_spec(_grant(), container_id="c"))
    assert not any(word in text for word in ("hooks", "annotations", "seccomp", "binary:"))
