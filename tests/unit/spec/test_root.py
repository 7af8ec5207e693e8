"""The section root."""

from __future__ import annotations

from hpcctr.spec.root import root


def test_the_root_is_the_bundles_and_read_only() -> None:
    assert root() == {"path": "rootfs", "readonly": True}
