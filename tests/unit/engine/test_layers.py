"""Upper layers that something holds, as the kernel tells of them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from hpcctr.engine import layers
from hpcctr.engine.layers import Layers
from hpcctr.engine.mounts import MS_NODEV, MS_NOSUID, mount, unmount
from hpcctr.errors import EngineBusy
from tests.support.mount_namespace import in_private_mounts

pytestmark = pytest.mark.root


def _mounted(place: str, name: str) -> str:
    path = f"{place}/{name}"
    os.mkdir(path)
    mount("test", path, "tmpfs", flags=MS_NOSUID | MS_NODEV, data="size=1m")
    return path


def by_descriptor(place: str) -> list[int]:
    made = Layers()
    path = _mounted(place, "a")
    made.watch("k-a", uid=1000, directory=path)
    holder = os.open(path, os.O_PATH)
    counts = [made.held(1000)]
    unmount(path)
    made.leave("k-a")
    counts += [made.held(1000), made.held(1001)]
    os.close(holder)
    counts.append(made.held(1000))
    return counts


def test_a_layer_counts_from_its_containers_end_until_nothing_holds_it(tmp_path: Path) -> None:
    assert in_private_mounts(by_descriptor, tmp_path) == [0, 1, 0, 0]


def at_the_limit(place: str) -> list[object]:
    layers.HELD_MAX, layers._PATIENCE = 3, 0.2
    made, holders = Layers(), []
    for number in range(3):
        made.require_room(1000)
        path = _mounted(place, str(number))
        made.watch(path, uid=1000, directory=path)
        holders.append(os.open(path, os.O_PATH))
        unmount(path)
        made.leave(path)
    made.require_room(1001)
    before = time.monotonic()
    try:
        made.require_room(1000)
    except EngineBusy as error:
        refused = error.message
    waited = time.monotonic() - before
    os.close(holders.pop())
    made.require_room(1000)
    return [refused, waited]


def test_at_the_limit_a_user_waits_is_refused_and_may_go_on_when_one_has_gone(tmp_path: Path) -> None:
    refused, waited = in_private_mounts(at_the_limit, tmp_path)
    assert refused == "programs of uid 1000 hold 3 node containers that have been removed"
    assert 0.2 <= waited < 5


def unknown(place: str) -> list[object]:
    made = Layers()
    made.leave("nobody")
    made.watch("root", uid=0, directory=_mounted(place, "root"))
    made.leave("root")
    try:
        made.watch("k", uid=1, directory=f"{place}/missing")
    except FileNotFoundError as error:
        missing = error.filename
    return [made.held(0), made.held(1), missing == f"{place}/missing"]


def test_roots_layers_and_unknown_ones_count_for_nothing_and_a_missing_one_is_an_os_error(tmp_path: Path) -> None:
    assert in_private_mounts(unknown, tmp_path) == [0, 0, True]


def descriptors_of_many(place: str) -> list[int]:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        made = Layers()
        made.watch("k", uid=1, directory=_mounted(place, str(number)))
        del made
    return [before, len(os.listdir("/proc/self/fd"))]


def test_the_watch_is_closed_with_what_has_it(tmp_path: Path) -> None:
    before, after = in_private_mounts(descriptors_of_many, tmp_path)
    assert before == after
