"""Where a caller is: cgroups, niceness, processors."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from hpcctr.errors import CallerRefused
from hpcctr.storekeeper.job import Place, _procs_files


def test_a_place_is_that_of_the_process() -> None:
    place = Place.of_process(os.getpid())
    assert place.niceness == os.getpriority(os.PRIO_PROCESS, 0)
    assert place.processors == tuple(sorted(os.sched_getaffinity(0)))
    # Every file named exists and lists this process.
    for file in place.cgroups:
        assert str(os.getpid()) in Path(file).read_text().split(), file


def test_a_process_that_is_gone_has_no_place() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(CallerRefused, match="has ended"):
        Place.of_process(process.pid)


def test_a_cgroup_outside_of_what_the_engine_sees_is_refused() -> None:
    hierarchy = Path("/proc/self/cgroup").read_text().splitlines()[0].split(":")[1]
    with pytest.raises(CallerRefused, match="cannot see"):
        list(_procs_files(7, [f"1:{hierarchy}:/../elsewhere"]))


def test_a_hierarchy_nobody_has_mounted_is_left_out() -> None:
    assert list(_procs_files(7, ["99:name=nobodys:/x"])) == []
