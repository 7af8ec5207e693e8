"""A Slurm whose jobs have a /tmp of their own, in a mount namespace of their own (job_container/tmpfs)."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.support.engine import HPCCTR
from tests.support.node import equipped
from tests.support.slurm import slurm
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]


def test_the_jobs_own_tmp_is_the_tmp_inside(place: Path, alice: User, busybox_image: str) -> None:
    """The engine is outside the job's mount namespace and could not even see it."""
    with slurm(place, private_tmp=True) as cluster, equipped(cluster.login) as node:
        node.pull(busybox_image)
        inside = [str(HPCCTR), "run", busybox_image, "--", "sh", "-c", "cat /tmp/note; echo inside >> /tmp/note"]
        step = f"echo outside > /tmp/note; {shlex.join(inside)}; cat /tmp/note"
        output = cluster.run(["srun", "--ntasks=1", "sh", "-c", step], user=alice, env=node.environment()).stdout
        assert output.decode().split() == ["outside", "outside", "inside"]
        assert not cluster.login.path("/tmp/note").exists()
