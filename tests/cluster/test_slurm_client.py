"""The shipped profile slurm-client: the node's Slurm commands run inside, and reach the controller through munge."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.hosts import SITE_DIRECTORY
from tests.support.host import CommandFailed
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.timeout(180, func_only=True)]

SHIPPED = Path(__file__).parents[2] / "etc/profiles/slurm-client.toml"
FLAGS = ["--feature", "slurm-client"]


@pytest.fixture(scope="module")
def outfitted(shared_cluster: Cluster) -> Iterator[Cluster]:
    """Every node has the profile."""
    hosts = [node.host for node in shared_cluster.nodes.values()]
    directory = SITE_DIRECTORY / "profiles.d"
    for host in hosts:
        host.run(["install", "-D", "-m", "644", str(SHIPPED), str(directory / SHIPPED.name)])
    yield shared_cluster
    for host in hosts:
        host.run(["rm", str(directory / SHIPPED.name)])


def _glibc() -> tuple[int, ...]:
    """The node's."""
    return tuple(map(int, os.confstr("CS_GNU_LIBC_VERSION").split()[1].split(".")))  # type: ignore[union-attr]


@pytest.mark.parametrize("image", ["debian12", "debian13"])
def test_squeue_inside_lists_the_job_it_runs_in(
    outfitted: Cluster, request: pytest.FixtureRequest, alice: User, image: str
) -> None:
    name = request.getfixturevalue(image)
    plain = outfitted.inside(name, "sh", "-c", "command -v squeue || echo none")
    assert outfitted.srun("-n1", *plain, user=alice).stdout == b"none\n"
    program = outfitted.inside(name, "sh", "-c", "squeue --noheader --format='%i %u'; echo $SLURM_JOB_ID", flags=FLAGS)
    if image == "debian12" and _glibc() > (2, 36):
        # The node is the newer Debian: its commands would not load.
        with pytest.raises(CommandFailed, match=r"error\[libraries-unfit\]: .* needs GLIBC_2\.[0-9]+ of libc\.so\.6"):
            outfitted.srun("-n1", *program, user=alice)
        return
    listed, number = outfitted.srun("-n1", *program, user=alice).stdout.decode().splitlines()
    assert listed == f"{number} {alice.name}"


def test_srun_inside_starts_tasks_of_the_same_job_on_every_node(outfitted: Cluster, debian13: str, alice: User) -> None:
    program = outfitted.inside(debian13, "srun", "--quiet", "-N2", "-n2", "hostname", flags=FLAGS)
    done = outfitted.salloc("-N2", *program, user=alice)
    assert sorted(done.stdout.split()) == [b"n1", b"n2"]
