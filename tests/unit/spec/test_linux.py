"""The section linux."""

from __future__ import annotations

from hpcctr.spec.linux import linux


def test_the_mount_namespace_is_the_only_one_of_its_own() -> None:
    assert linux("k-1")["namespaces"] == [{"type": "mount"}]


def test_the_cgroup_has_no_parent_that_would_stay_behind() -> None:
    path = linux("k-1")["cgroupsPath"]
    assert path == "/hpcctr-k-1"


def test_mounts_do_not_propagate() -> None:
    assert linux("k-1")["rootfsPropagation"] == "private"


def test_nothing_is_limited_or_filtered_by_the_container() -> None:
    assert linux("k-1").keys() == {"namespaces", "rootfsPropagation", "cgroupsPath", "maskedPaths", "readonlyPaths"}
