"""The prolog, the epilog and the job scripts of etc/slurm, as they are, on the cluster."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterator

import pytest

from tests.cluster import site_files
from tests.cluster.cluster import Cluster, Job, cluster
from tests.cluster.site_files import (
    FIRST,
    SECOND,
    cluster_of_a_site,
    hide_engine,
    known,
    shipped,
    show_engine,
    takes_names,
)
from tests.support.mpi import contained, reports, require_one_job
from tests.support.polling import wait_until
from tests.support.scratch import scratch
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.network, pytest.mark.timeout(180, func_only=True)]


@pytest.fixture(scope="module")
def site() -> Iterator[Cluster]:
    with cluster_of_a_site("epilog") as made:
        yield made


@pytest.fixture(scope="module")
def image(site: Cluster, busybox_image: str) -> str:
    return known(site, busybox_image)


@pytest.fixture(scope="module")
def mpi_image(site: Cluster, debian12_mpi_image: str) -> str:
    return known(site, debian12_mpi_image)


def submitted(site: Cluster, script: str, user: User, *flags: str, image: str, program: str) -> Job:
    """The end of a job script of etc/slurm/jobs; only what it takes from the environment is ours."""
    argv = [
        "sbatch",
        "--parsable",
        f"--output={user.home}/slurm-%A_%a.out",
        *flags,
        str(shipped(site.root) / "jobs" / script),
    ]
    done = site.run(argv, user=user, env={"IMAGE": image, "PROGRAM": program})
    return site.wait(int(done.stdout), user=user).require_completed()


@pytest.mark.parametrize("script", ["openmpi", "mpich"])
def test_the_mpi_scripts_run_one_job_on_two_nodes(site: Cluster, mpi_image: str, alice: User, script: str) -> None:
    job = submitted(site, f"{script}.sbatch", alice, image=mpi_image, program=contained(script, "report"))  # type: ignore[arg-type]
    found = reports(job.output.encode())
    require_one_job(found, 4)
    assert {report.host for report in found} == {FIRST, SECOND}


def test_the_hybrid_script_gives_each_rank_its_cores(site: Cluster, image: str, alice: User) -> None:
    job = submitted(site, "hybrid.sbatch", alice, image=image, program="nproc")
    assert job.output.split() == ["2", "2"]
    threads = submitted(site, "hybrid.sbatch", alice, image=image, program="env").output.splitlines()
    assert threads.count("OMP_NUM_THREADS=2") == 2


def test_the_gpu_script_gives_the_device_and_its_number(shared_cluster: Cluster, alice: User, busybox: str) -> None:
    """Slurm's gres/gpu hands out a device that is no GPU."""
    for node in shared_cluster.nodes.values():
        site_files.install(node.host)
    try:
        shown = submitted(shared_cluster, "gpu.sbatch", alice, image=busybox, program="env").output.splitlines()
        assert "CUDA_VISIBLE_DEVICES=0" in shown, shown
    finally:
        for node in shared_cluster.nodes.values():
            site_files.hide(node.host)


def test_the_array_script_runs_each_of_its_tasks(site: Cluster, image: str, alice: User) -> None:
    job = submitted(site, "array.sbatch", alice, image=image, program="echo")
    assert sorted(job.output.split()) == ["0", "1", "2", "3"]


def test_the_epilog_removes_what_the_job_was_the_last_to_use(site: Cluster, image: str, alice: User) -> None:
    node = site.nodes[FIRST]
    before = len(node.engine.log())
    site.srun(f"--nodelist={FIRST}", "--ntasks=1", *site.inside(image, "true"), user=alice)
    site.wait_until_idle()
    assert node.containerd.containers() == ()
    wait_until(lambda: "removed 1 idle containers" in node.engine.log()[before:], what="the engine's word of it")


def test_cleanup_of_a_job_ends_its_programs_and_not_those_of_another(site: Cluster, image: str, alice: User) -> None:
    """While Slurm still has both: what is told by Slurm's own cgroups."""
    _require_one_of_two_jobs_ended(site, FIRST, image, alice)


def test_cleanup_of_a_job_goes_by_cgroups_of_version_2_as_well(alice: User, busybox_image: str) -> None:
    if not takes_names():
        pytest.skip("Slurm 22.05 has version 2 only under systemd")
    with scratch("epilog2") as root, cluster(root, nodes=1, prefix="w", cgroup2_only=True) as modern:
        modern.pull(busybox_image)
        _require_one_of_two_jobs_ended(modern, "w1", busybox_image, alice)
        modern.wait_until_idle()


def _require_one_of_two_jobs_ended(made: Cluster, name: str, image: str, user: User) -> None:
    steps = []
    for seconds in ("6001", "6002"):
        words = [f"--nodelist={name}", "--ntasks=1", "--overcommit", "--mem=100", f"--job-name={seconds}"]
        step = made.popen(
            ["srun", "--quiet", *words, *made.inside(image, "sleep", seconds)], user=user, stderr=subprocess.PIPE
        )
        steps.append(step)
        wait_until(functools.partial(_runs, made, name, seconds), seconds=60, what=f"sleep {seconds}")
    first = made.slurm.text("squeue", "--noheader", "--name=6001", "--format=%A").strip()
    done = made.nodes[name].hpcctr("cleanup", "--job", first)
    assert b"killed pid" in done.stdout
    assert not _runs(made, name, "6001") and _runs(made, name, "6002")
    steps[0].communicate(timeout=30)
    assert steps[0].returncode == 137
    made.run(["scancel", "--name=6002", f"--user={user.name}"])
    steps[1].communicate(timeout=30)


def _runs(made: Cluster, name: str, seconds: str) -> bool:
    return any(process.command == f"sleep {seconds}" for process in made.nodes[name].host.processes())


def test_a_node_whose_engine_is_gone_gets_no_job(site: Cluster, image: str, alice: User) -> None:
    site.wait_until_idle()
    hide_engine(site.nodes[FIRST].host)
    try:
        number = site.submit("echo ran", f"--nodelist={FIRST}", user=alice)
        wait_until(lambda: "drain" in site.slurm.states()[FIRST], seconds=30, what=lambda: f"{site.slurm.states()}")
    finally:
        show_engine(site.nodes[FIRST].host)
    site.run(["scancel", str(number)])
    site.run(["scontrol", "update", f"nodename={FIRST}", "state=resume"])
    site.wait_until_idle()
