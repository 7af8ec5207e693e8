"""MPI jobs in containers on several nodes: started by srun, by mpirun and mpiexec in an allocation, hybrid, MPMD."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.support.mpi import Family, Report, contained, mpirun, native, reports, require_one_job, script
from tests.support.polling import wait_until
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.network, pytest.mark.timeout(180, func_only=True)]

PLUGINS: dict[str, Family] = {"pmix": "openmpi", "pmi2": "mpich"}


@pytest.fixture(scope="module", params=["debian12", "debian13"])
def image(request: pytest.FixtureRequest) -> str:
    name: str = request.getfixturevalue(request.param)
    return name


def _require_spread(found: Sequence[Report], ranks: int, nodes: int = 2) -> None:
    require_one_job(found, ranks)
    hosts = [report.host for report in found]
    assert set(hosts) == {f"n{number}" for number in range(1, nodes + 1)}
    for report in found:
        assert report.node_ranks == hosts.count(report.host), found


def _wait_until_no_containers(cluster: Cluster) -> None:
    wait_until(
        lambda: not any(node.containerd.containers() for node in cluster.nodes.values()),
        what="the end of earlier tests' node containers",
    )


def _created(cluster: Cluster) -> dict[str, int]:
    return {name: len(node.containerd.created()) for name, node in cluster.nodes.items()}


@pytest.mark.parametrize("plugin", PLUGINS)
def test_eight_tasks_on_two_nodes_form_one_job_and_need_one_container_a_node(
    shared_cluster: Cluster, alice: User, image: str, plugin: str
) -> None:
    program = shared_cluster.inside(image, contained(PLUGINS[plugin], "report"))
    _wait_until_no_containers(shared_cluster)
    before = _created(shared_cluster)
    done = shared_cluster.srun("-N2", "-n8", "--overcommit", f"--mpi={plugin}", *program, user=alice)
    found = reports(done.stdout)
    _require_spread(found, 8)
    assert {report.cma for report in found} == {"yes"}
    assert _created(shared_cluster) == {name: count + 1 for name, count in before.items()}


@pytest.mark.parametrize("launch", ["salloc", "sbatch"])
@pytest.mark.parametrize("family", ["openmpi", "mpich"])
def test_a_launcher_in_an_allocation_starts_ranks_on_all_its_nodes(
    shared_cluster: Cluster, alice: User, image: str, family: Family, launch: str
) -> None:
    """Its daemons (orted or prted, hydra_pmi_proxy) are steps of Slurm's; each starts its node's ranks."""
    launchers = {
        "openmpi": mpirun(4, flags=["--map-by", "node"]),
        "mpich": ["mpiexec.hydra", "-bootstrap", "slurm", "-ppn", "2", "-n", "4"],
    }
    words = [*launchers[family], *shared_cluster.inside(image, contained(family, "report"))]
    allocation = ["-N2", "-n4", "--ntasks-per-node=2"]
    if launch == "salloc":
        output = shared_cluster.salloc(*allocation, *words, user=alice).stdout
    else:
        output = shared_cluster.sbatch(shlex.join(words), *allocation, user=alice).require_completed().output.encode()
    _require_spread(reports(output), 4)


def test_threads_of_a_hybrid_task_have_the_cores_the_native_task_has(
    shared_cluster: Cluster, alice: User, debian12: str
) -> None:
    layout = ["-N2", "-n2", "-c2", "--mpi=pmix"]
    show = 'echo "threads $OMP_NUM_THREADS of $SLURM_CPUS_PER_TASK"; exec "$0"'
    env = {"OMP_NUM_THREADS": "2"}
    inside = shared_cluster.inside(debian12, "sh", "-c", show, contained("openmpi", "report"))
    outside = ["sh", "-c", show, native("openmpi", "report")]
    contained_step = shared_cluster.srun(*layout, *inside, user=alice, env=env).stdout
    native_step = shared_cluster.srun(*layout, *outside, user=alice, env=env).stdout
    for output in (contained_step, native_step):
        assert output.decode().count("threads 2 of 2\n") == 2
        _require_spread(reports(output), 2)
    assert [(report.host, report.affinity) for report in reports(contained_step)] == [
        (report.host, report.affinity) for report in reports(native_step)
    ]


def test_programs_of_one_mpmd_job_may_run_in_and_outside_of_containers(
    shared_cluster: Cluster, alice: User, like_the_host: str, place: Path
) -> None:
    """With one MPI family and version on both sides. `--multi-prog` takes a file of ranks and programs."""
    inside = shlex.join(shared_cluster.inside(like_the_host, contained("openmpi", "report")))
    programs = script(place, "programs", f"0,2 {native('openmpi', 'report')}\n1,3 {inside}")
    programs.write_text("".join(programs.read_text().splitlines(keepends=True)[1:]))
    done = shared_cluster.srun(
        "-N2", "-n4", "--ntasks-per-node=2", "--mpi=pmix", "--multi-prog", str(programs), user=alice
    )
    _require_spread(reports(done.stdout), 4)


def test_components_of_a_heterogeneous_job_form_one_mpi_job(
    shared_cluster: Cluster, alice: User, debian12: str
) -> None:
    words = shared_cluster.inside(debian12, contained("mpich", "report"))
    done = shared_cluster.srun(
        "--mpi=pmi2", "-w", "n1", "-n2", *words, ":", "--mpi=pmi2", "-w", "n2", "-n1", *words, user=alice
    )
    found = reports(done.stdout)
    require_one_job(found, 3)
    assert [report.host for report in found] == ["n1", "n1", "n2"]


def test_several_images_on_one_node_have_a_container_each(
    shared_cluster: Cluster, alice: User, debian12: str, debian13: str, busybox: str, place: Path
) -> None:
    show = "head -1 /etc/os-release; exec sleep 1"
    lines = [
        f"{rank} {shlex.join(shared_cluster.inside(name, 'sh', '-c'))} '{show}'"
        for rank, name in enumerate((debian12, debian13, debian12))
    ]
    file = script(place, "programs", "")
    file.write_text("\n".join([*lines, ""]))
    _wait_until_no_containers(shared_cluster)
    before = _created(shared_cluster)
    done = shared_cluster.srun("-w", "n1", "-n3", "--overcommit", "--multi-prog", str(file), user=alice)
    versions = re.findall(r"GNU/Linux (\d+)", done.stdout.decode())
    assert sorted(versions) == ["12", "12", "13"]
    assert _created(shared_cluster)["n1"] == before["n1"] + 2


def test_tasks_of_a_job_array_run_in_containers(shared_cluster: Cluster, alice: User, busybox: str) -> None:
    words = shared_cluster.inside(busybox, "sh", "-c", 'echo "task $SLURM_ARRAY_TASK_ID of $SLURM_ARRAY_JOB_ID"')
    job = shared_cluster.sbatch(f"srun --quiet {shlex.join(words)}", "--array=1-8", "-n1", user=alice)
    job.require_completed()
    assert len(job.states) == 8
    assert sorted(job.output.splitlines()) == [f"task {task} of {job.number}" for task in range(1, 9)]
