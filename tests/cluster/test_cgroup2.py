"""Slurm with its cgroup/v2 plug-in, on nodes that see nothing else: the program is in the step's cgroup there too.

The machine's controllers may be in version 1, and then nothing is constrained; what is shown is that a container needs
no version 1, that the step's processes are found in its cgroup, and that they end with the step.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster, cluster
from tests.support.leftovers import require_nothing_new
from tests.support.scratch import scratch
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.timeout(120, func_only=True)]


@pytest.fixture(scope="module")
def modern(busybox_image: str) -> Iterator[Cluster]:
    with scratch("modern") as root, cluster(root, prefix="v", cgroup2_only=True, runtime="crun") as started:
        before = started.leftovers()
        started.pull(busybox_image)
        yield started
        started.wait_until_idle()
        require_nothing_new(before)


def test_a_task_is_in_the_steps_cgroup_of_version_2(modern: Cluster, alice: User, busybox_image: str) -> None:
    show = "grep ^0:: /proc/self/cgroup"
    mounted = "grep ' /sys/fs/cgroup ' /proc/self/mounts"
    inside = shlex.join(modern.inside(busybox_image, "sh", "-c", f"{show}; {mounted}"))
    lines = modern.srun("-N2", "-n2", "--label", "sh", "-c", f"{show}; exec {inside}", user=alice).stdout.decode()
    for task, node in enumerate(("v1", "v2")):
        found = [line.partition(": ")[2] for line in lines.splitlines() if line.startswith(f"{task}: ")]
        assert found[0] == found[1]
        assert re.search(rf"{node}_slurmstepd\.scope/job_\d+/step_0/user/task_", found[1]), found
        assert found[-1].startswith("cgroup2 /sys/fs/cgroup cgroup2 ")


def test_what_shows_slurm_only_version_2_is_not_shown_to_programs(
    modern: Cluster, alice: User, busybox_image: str
) -> None:
    outside = modern.srun("-n1", "env", user=alice).stdout.decode()
    inside = modern.srun("-n1", *modern.inside(busybox_image, "env"), user=alice).stdout.decode()
    assert "LD_PRELOAD" not in outside + inside


def test_a_cancelled_job_ends_what_its_program_has_left_behind(
    modern: Cluster, alice: User, busybox_image: str
) -> None:
    """A child in a session of its own is in the step's cgroup."""
    before = modern.leftovers()
    program = modern.inside(busybox_image, "sh", "-c", "setsid sleep 600 & echo start; wait")
    job = modern.submit(f"srun --quiet {shlex.join(program)}", "-n1", user=alice)
    modern.wait_for_output(job, "start\n", user=alice)
    modern.run(["scancel", str(job)], user=alice)
    assert modern.wait(job, user=alice).states == ("CANCELLED",)
    modern.wait_until_idle()
    require_nothing_new(before)
