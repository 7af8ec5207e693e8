"""Steps and jobs of Slurm: a program in a container is the step's own task. A cluster of two nodes with one store."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.engine import HPCCTR
from tests.support.leftovers import Leftovers, require_nothing_new
from tests.support.mpi import contained, reports, require_one_job, script
from tests.support.node import Node, equipped
from tests.support.polling import wait_until
from tests.support.scratch import scratch
from tests.support.slurm import Slurm, slurm
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.network, pytest.mark.timeout(180, func_only=True)]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Slurm, and hpcctr on each of its nodes with the same store; the site file has one path everywhere."""

    slurm: Slurm
    nodes: tuple[Node, ...]
    site_file: Path

    def srun(
        self,
        *arguments: str,
        user: User,
        check: bool | int = True,
        timeout: float = 90,
        env: dict[str, str] | None = None,
    ) -> tuple[int, bytes, bytes]:
        done = self.slurm.run(
            ["srun", "--quiet", *arguments],
            user=user,
            env={"HPCCTR_SITE": str(self.site_file), **(env or {})},
            check=check,
            timeout=timeout,
        )
        return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(scratch("cluster"))
        (root / "store").mkdir(mode=0o755)
        (root / "site").mkdir(mode=0o755)
        started = stack.enter_context(slurm(root, nodes=2))
        nodes = []
        for host in started.nodes.values():
            nodes.append(stack.enter_context(equipped(host, store=root / "store", carry=[str(root / "slurm")])))
            host.run(["mount", "--bind", str(host.root), str(root / "site")])
        before = Leftovers.of(*started.nodes.values(), *(node.containerd for node in nodes), below=[root])
        yield Cluster(slurm=started, nodes=tuple(nodes), site_file=root / "site/site.toml")
        started.wait_until_idle()
        require_nothing_new(before)


@pytest.fixture(scope="module", params=["debian12_mpi_image", "debian13_mpi_image"])
def image(request: pytest.FixtureRequest, cluster: Cluster) -> str:
    """Brought into the store on one node; the other has not seen it."""
    name: str = request.getfixturevalue(request.param)
    cluster.nodes[0].pull(name)
    return name


@pytest.fixture(scope="module")
def small_image(cluster: Cluster, busybox_image: str) -> str:
    cluster.nodes[0].pull(busybox_image)
    return busybox_image


def _inside(image: str, *command: str) -> Sequence[str]:
    return [str(HPCCTR), "run", image, "--", *command]


def _require_one_job_of_a_step(cluster: Cluster, user: User, image: str, *, plugin: str, names: list[str]) -> None:
    ranks = 2 * len(names)
    program = contained("openmpi" if plugin == "pmix" else "mpich", "report")
    layout = [f"--nodelist={','.join(names)}", f"--ntasks={ranks}", "--ntasks-per-node=2", f"--mpi={plugin}"]
    _, output, _ = cluster.srun(*layout, *_inside(image, program), user=user)
    found = reports(output)
    require_one_job(found, ranks)
    assert {report.host for report in found} == set(names)
    assert {report.cma for report in found} == {"yes"}


@pytest.mark.parametrize("plugin", ["pmix", "pmi2"])
def test_tasks_of_a_step_form_one_mpi_job(cluster: Cluster, alice: User, image: str, plugin: str) -> None:
    """pmix with the image's Open MPI, pmi2 with its MPICH; the host's plug-ins are older or newer than either."""
    _require_one_job_of_a_step(cluster, alice, image, plugin=plugin, names=["n1"])


@pytest.mark.parametrize("plugin", ["pmix", "pmi2"])
def test_tasks_on_several_nodes_form_one_mpi_job(
    cluster: Cluster, alice: User, debian12_mpi_image: str, plugin: str
) -> None:
    """With Open MPI 4: between nodes over TCP, MPI_Init of 5.0.7 crashes now and then without any container as well."""
    cluster.nodes[1].pull(debian12_mpi_image)
    _require_one_job_of_a_step(cluster, alice, debian12_mpi_image, plugin=plugin, names=["n1", "n2"])


def test_a_task_in_a_container_is_in_the_steps_cgroups(cluster: Cluster, alice: User, small_image: str) -> None:
    one = ["--nodelist=n1", "--ntasks=1"]
    show = ["cat", "/proc/self/cgroup"]

    def without_numbers(output: bytes) -> bytes:
        return re.sub(rb"job_\d+|step_\d+", b"", output)

    _, outside, _ = cluster.srun(*one, *show, user=alice)
    _, inside, _ = cluster.srun(*one, *_inside(small_image, *show), user=alice)
    assert b"/slurm" in inside
    assert without_numbers(inside) == without_numbers(outside)


def test_tasks_are_bound_to_the_cores_slurm_gave_them(cluster: Cluster, alice: User, small_image: str) -> None:
    flags = ["--nodelist=n1", "--ntasks=2", "--cpu-bind=cores"]
    show = ["sh", "-c", "grep Cpus_allowed_list /proc/self/status"]
    _, outside, _ = cluster.srun(*flags, *show, user=alice)
    _, inside, _ = cluster.srun(*flags, *_inside(small_image, *show), user=alice)
    assert sorted(inside.splitlines()) == sorted(outside.splitlines())
    assert len(set(inside.splitlines())) == 2


def test_exit_status_of_a_task_is_the_commands(cluster: Cluster, alice: User, small_image: str) -> None:
    status, _, _ = cluster.srun("--ntasks=1", *_inside(small_image, "sh", "-c", "exit 7"), user=alice, check=False)
    assert status == 7


def test_memory_beyond_the_jobs_ends_the_task_and_nothing_else(cluster: Cluster, alice: User, small_image: str) -> None:
    hungry = ["sh", "-c", "head -c 400000000 /dev/zero | tail > /dev/null"]
    flags = ["--nodelist=n1", "--ntasks=1", "--mem=100"]
    outside, _, _ = cluster.srun(*flags, *hungry, user=alice, check=False)
    inside, _, _ = cluster.srun(*flags, *_inside(small_image, *hungry), user=alice, check=False)
    assert inside == outside != 0
    cluster.slurm.wait_until_idle()
    assert cluster.nodes[0].engine.process.poll() is None


def test_cancelling_a_job_ends_the_program(cluster: Cluster, alice: User, small_image: str) -> None:
    job = cluster.slurm.login.popen(
        ["srun", "--quiet", "--nodelist=n1", "--ntasks=1", *_inside(small_image, "sleep", "600")],
        user=alice,
        env={**cluster.slurm.environment, "HPCCTR_SITE": str(cluster.site_file)},
    )
    node = cluster.nodes[0].host

    def sleeps() -> bool:
        return any(process.command == "sleep 600" for process in node.processes())

    wait_until(sleeps, seconds=30, what="the program's start")
    cluster.slurm.run(["scancel", f"--user={alice.name}"], user=alice)
    assert job.wait(30) != 0
    wait_until(lambda: not sleeps(), what="the program's end")
    cluster.slurm.wait_until_idle()


def test_a_batch_job_runs_its_steps_in_containers(cluster: Cluster, alice: User, small_image: str, place: Path) -> None:
    output = alice.home / "batch.out"
    steps = f'"{HPCCTR}" run {small_image} -- sh -c \'echo "step of job $SLURM_JOB_ID on $SLURMD_NODENAME"\''
    job = script(place, "job", f"#SBATCH --nodes=2 --ntasks=2 --output={output}\nsrun --quiet {steps}\n{steps}")
    cluster.slurm.run(
        ["sbatch", "--wait", str(job)], user=alice, env={"HPCCTR_SITE": str(cluster.site_file)}, timeout=90
    )
    lines = cluster.slurm.login.run(["cat", str(output)], user=alice).stdout.decode().splitlines()
    assert sorted(line.split()[-1] for line in lines) == ["n1", "n1", "n2"]
    assert len({line.split()[3] for line in lines}) == 1


def test_the_next_step_of_a_job_walks_into_the_same_node_container(
    cluster: Cluster, alice: User, small_image: str, place: Path
) -> None:
    containerd = cluster.nodes[0].containerd
    before = len(containerd.created())
    step = f'srun --quiet --ntasks=1 "{HPCCTR}" run {small_image} -- true'
    job = script(place, "job", f"#SBATCH --nodelist=n1 --output=/dev/null\nset -e\n{step}\n{step}\n{step}")
    environment = {"HPCCTR_SITE": str(cluster.site_file)}
    cluster.slurm.run(["sbatch", "--wait", str(job)], user=alice, env=environment, timeout=90)
    # One, unless an earlier test's of the same kind was still there.
    assert len(containerd.created()) - before <= 1
