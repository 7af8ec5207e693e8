"""A job's names mean what they meant when it started: told by Slurm, or by the task-prolog of etc/slurm."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.site_files import FIRST, cluster_of_a_site
from tests.support.oci import busybox, file, tar, write_oci_archive
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.timeout(180, func_only=True)]

NAME = "localhost/app:1"


@pytest.fixture(scope="module")
def site() -> Iterator[Cluster]:
    with cluster_of_a_site("jobstart") as made:
        yield made


def _bring(site: Cluster, edition: bytes) -> None:
    archive = write_oci_archive(site.root / "app.tar", busybox(layers=[tar(file("etc/edition", edition + b"\n"))]))
    site.nodes[FIRST].hpcctr("pull", "--name", NAME, f"oci-archive:{archive}")


def test_a_later_step_of_a_job_runs_what_its_first_one_did(site: Cluster, alice: User) -> None:
    _bring(site, b"first")
    sign, inner = alice.home / "go", alice.home / "inner.sh"
    step = f"srun --quiet --nodes=2 --ntasks=2 {shlex.join(site.inside(NAME, 'cat', '/etc/edition'))}"
    # A job that another hands in begins later than that, whatever it has in its environment.
    site.login.run(["sh", "-c", 'cat > "$1"', "sh", str(inner)], user=alice, input=f"#!/bin/sh\n{step}\n".encode())
    submit = f"sbatch --parsable --output={alice.home}/slurm-%A_%a.out --nodes=2 --ntasks=2 {inner}"
    script = f"sleep 1; {step}; until [ -e {sign} ]; do sleep 0.2; done; {step}; HPCCTR_AS_OF=now {step}; {submit}"
    job = site.submit(script, "--nodes=2", "--ntasks=2", user=alice)
    site.wait_for_output(job, "first\nfirst\n", user=alice)
    _bring(site, b"second")
    site.login.run(["touch", str(sign)], user=alice)
    *printed, another = site.wait(job, user=alice).require_completed().output.split()
    assert printed == ["first"] * 4 + ["second"] * 2
    assert site.wait(int(another), user=alice).require_completed().output.split() == ["second"] * 2
