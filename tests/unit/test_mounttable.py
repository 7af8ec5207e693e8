"""The kernel's mount table, read."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from hpcctr import mounttable
from hpcctr.engine import mounts
from tests.support.mount_namespace import in_private_mounts


def test_every_line_of_the_mount_table_is_understood() -> None:
    entries = mounttable.read_mounts()
    lines = Path("/proc/self/mountinfo").read_bytes().count(b"\n")
    assert len(entries) == lines
    assert any(entry.target == "/" for entry in entries)


@pytest.mark.parametrize(
    ("line", "target", "propagation", "source"),
    [
        (
            "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue",
            "/mnt2",
            ("master:1",),
            "/dev/root",
        ),
        ("1 2 0:1 / /a\\040-\\040b ro shared:7 unbindable - tmpfs  rw", "/a - b", ("shared:7", "unbindable"), ""),
        ("1 2 0:1 / /x ro - tmpfs a\\134b rw", "/x", (), "a\\b"),
    ],
)
def test_a_line_is_read_as_proc_5_says(line: str, target: str, propagation: tuple[str, ...], source: str) -> None:
    entry = mounttable._entry(line)
    assert (entry.target, entry.propagation, entry.source) == (target, propagation, source)


def served_for_users(place: str) -> list[int | None]:
    found = []
    for number, data in enumerate(("user_id=61000", "user_id=0", "user_id=61000,allow_other")):
        point = f"{place}/{number}"
        os.mkdir(point)
        device = os.open("/dev/fuse", os.O_RDWR)
        # Nobody serves it: what is asked here needs no answer.
        mounts.mount("x", point, "fuse.x", flags=0, data=f"fd={device},rootmode=40000,group_id=0,{data}")
        held = os.open(point, os.O_PATH)
        found.append(mounttable.mounted_by(held))
        mounts.unmount(point)
        if number == 0:
            found.append(mounttable.mounted_by(held))
        os.close(device)
        os.close(held)
    plain = os.open(place, os.O_PATH)
    return [*found, mounttable.mounted_by(plain)]


@pytest.mark.root
def test_a_filesystem_that_is_served_for_a_user_is_told_apart_by_the_kernel(tmp_path: Path) -> None:
    assert in_private_mounts(served_for_users, tmp_path) == [61000, None, 0, 61000, 0]


def test_a_hierarchy_of_cgroups_that_something_is_mounted_over_is_none() -> None:
    table = mounttable.read_mounts()
    hidden = [replace(entry, target="/proc/self") for entry in table if entry.kind in ("cgroup", "cgroup2")]
    places = mounttable.cgroup_hierarchies([*hidden, *table])
    assert places
    assert places == mounttable.cgroup_hierarchies(table)
    assert all(os.path.exists(f"{top}/cgroup.procs") for top in places.values())
