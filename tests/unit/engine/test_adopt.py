"""Which records of containerd an engine takes for its own; tests/containerd has the rest."""

from __future__ import annotations

import pytest

from hpcctr.containerd.client import ContainerEntry
from hpcctr.engine.adopt import _is_plausible

KEY = "0123456789abcdef" * 2
LABELS = {"hpcctr.key": KEY, "hpcctr.uid": "1000", "hpcctr.owner": "gateway"}


def test_a_record_as_the_engine_writes_it_is_its_own() -> None:
    assert _is_plausible(ContainerEntry(container_id=f"{KEY}-01234567", labels=LABELS, created=0.0))


@pytest.mark.parametrize(
    ("container_id", "labels"),
    [
        (f"../{KEY}-01234567", {}),
        (f"{KEY}-0123456/", {}),
        (f"{KEY}-01234567\n", {}),
        (KEY, {}),
        (f"{KEY}-01234567", {"hpcctr.key": "f" * 32}),
        (f"{KEY}-01234567", {"hpcctr.uid": "-1"}),
        (f"{KEY}-01234567", {"hpcctr.uid": ""}),
    ],
)
def test_a_record_that_says_anything_else_leads_to_no_path(container_id: str, labels: dict[str, str]) -> None:
    entry = ContainerEntry(container_id=container_id, labels={**LABELS, **labels}, created=0.0)
    assert not _is_plausible(entry)
