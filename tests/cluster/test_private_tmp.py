"""A Slurm whose jobs have a /tmp of their own, in a mount namespace of their own (job_container/tmpfs)."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster, cluster
from tests.support.leftovers import require_nothing_new
from tests.support.scratch import scratch
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.timeout(120, func_only=True)]


@pytest.fixture(scope="module")
def private(busybox_image: str) -> Iterator[Cluster]:
    with scratch("private") as root, cluster(root, prefix="p", private_tmp=True) as started:
        before = started.leftovers()
        started.pull(busybox_image)
        yield started
        started.wait_until_idle()
        started.slurm.remove_empty_job_cgroups()
        require_nothing_new(before)


def test_the_jobs_own_tmp_is_the_tmp_inside(private: Cluster, alice: User, busybox_image: str) -> None:
    """The engine is outside the job's mount namespace and could not even see it."""
    inside = private.inside(busybox_image, "sh", "-c", "cat /tmp/note; echo inside >> /tmp/note")
    step = f"echo outside > /tmp/note; {shlex.join(inside)}; cat /tmp/note"
    output = private.srun("-N2", "-n2", "--label", "sh", "-c", step, user=alice).stdout.decode()
    for task in ("0", "1"):
        lines = [line.partition(": ")[2] for line in output.splitlines() if line.startswith(f"{task}: ")]
        assert lines == ["outside", "outside", "inside"]
    for host in private.slurm.hosts.values():
        assert not host.path("/tmp/note").exists()


def test_steps_of_a_job_share_its_tmp(private: Cluster, alice: User, busybox_image: str) -> None:
    write = shlex.join(private.inside(busybox_image, "sh", "-c", "echo $SLURM_JOB_ID > /tmp/note"))
    read = shlex.join(private.inside(busybox_image, "cat", "/tmp/note"))
    job = private.sbatch(f"srun --quiet -n1 {write}\nsrun --quiet -n1 {read}\n{read}", "-n1", user=alice)
    assert job.require_completed().output == f"{job.number}\n" * 2


def test_two_jobs_in_one_node_container_have_a_tmp_each(private: Cluster, alice: User, busybox_image: str) -> None:
    """The node container is the user's and the image's; what is carried in is the caller's."""
    created = len(private.nodes["p1"].containerd.created())
    words = private.inside(busybox_image, "sh", "-c", "echo mine > /tmp/note; echo ready; cat; ls /tmp")
    jobs = [
        private.popen(
            ["srun", "--quiet", "-w", "p1", "-n1", "--mem=100", *words],
            user=alice,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    for job in jobs:
        assert job.stdout is not None and job.stdout.readline() == b"ready\n"
    assert len(private.nodes["p1"].containerd.created()) - created <= 1
    look = private.inside(busybox_image, "ls", "/tmp")
    assert private.srun("-w", "p1", "-n1", "--mem=100", *look, user=alice).stdout == b""
    for job in jobs:
        assert job.communicate(timeout=30)[0] == b"note\n"
