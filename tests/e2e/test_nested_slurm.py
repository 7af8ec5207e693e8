"""MPI launchers in a real allocation: refused as the command of a container, and the remedies of the refusal run it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.engine import HPCCTR
from tests.support.mpi import contained, open_mpi_version, reports, require_one_job, script
from tests.support.node import Node, equipped
from tests.support.scratch import scratch
from tests.support.slurm import Slurm, slurm
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.network, pytest.mark.timeout(180, func_only=True)]

ONE_NODE = ("-e", "OMPI_MCA_plm=^slurm", "-e", "PRTE_MCA_plm=^slurm", "-e", "HYDRA_LAUNCHER=fork")


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Slurm, Node]]:
    """Slurm with one node, which has hpcctr."""
    with (
        scratch("nested") as root,
        slurm(root) as started,
        equipped(started.login, carry=[str(root / "slurm")]) as node,
    ):
        yield started, node


@pytest.fixture(scope="module")
def image(request: pytest.FixtureRequest, cluster: tuple[Slurm, Node]) -> str:
    """With the host's version of Open MPI."""
    name: str = request.getfixturevalue("debian13_mpi_image" if open_mpi_version() >= (5,) else "debian12_mpi_image")
    cluster[1].pull(name)
    return name


def _salloc(
    cluster: tuple[Slurm, Node], user: User, command: Sequence[str], *, check: bool | int = True
) -> tuple[bytes, str]:
    started, node = cluster
    done = started.run(
        ["salloc", "--quiet", "--ntasks=2", *command], user=user, env=node.environment(), check=check, timeout=90
    )
    return done.stdout, done.stderr.decode()


def _inside(image: str, *command: str, flags: Sequence[str] = ()) -> list[str]:
    return [str(HPCCTR), "run", *flags, image, "--", *command]


JOBS = {
    "openmpi": (["mpirun.openmpi", "-n", "2"], contained("openmpi", "report")),
    "mpich": (["mpiexec.hydra", "-n", "2"], contained("mpich", "report")),
}


@pytest.mark.parametrize("launcher", ["mpirun", "mpiexec", "mpiexec.hydra"])
def test_a_launcher_as_the_command_is_refused(
    cluster: tuple[Slurm, Node], alice: User, image: str, launcher: str
) -> None:
    """The plain names may be Hydra's, which would wait for ever for the srun it cannot start."""
    output, text = _salloc(cluster, alice, _inside(image, launcher, "-n", "2", "true"), check=126)
    assert output == b"" and text.startswith("hpcctr: error[launcher-inside]: "), text


def test_open_mpis_launcher_by_its_own_name_runs_on_one_node(
    cluster: tuple[Slurm, Node], alice: User, image: str
) -> None:
    launcher, program = JOBS["openmpi"]
    output, _ = _salloc(cluster, alice, _inside(image, *launcher, program))
    require_one_job(reports(output), 2)


@pytest.mark.parametrize("family", JOBS)
def test_on_one_node_it_runs_when_told_to_start_processes_itself(
    cluster: tuple[Slurm, Node], alice: User, image: str, family: str
) -> None:
    launcher, program = JOBS[family]
    output, _ = _salloc(cluster, alice, _inside(image, *launcher, program, flags=ONE_NODE))
    require_one_job(reports(output), 2)


@pytest.mark.parametrize("family", JOBS)
def test_outside_it_runs(cluster: tuple[Slurm, Node], alice: User, image: str, family: str) -> None:
    launcher, program = JOBS[family]
    output, _ = _salloc(cluster, alice, [*launcher, *_inside(image, program)])
    require_one_job(reports(output), 2)


def test_a_batch_script_may_use_a_launcher_outside(
    cluster: tuple[Slurm, Node], alice: User, image: str, place: Path
) -> None:
    launcher, program = JOBS["openmpi"]
    output = alice.home / "nested.out"
    job = script(
        place, "job", f"#SBATCH --ntasks=2 --output={output}\n{' '.join([*launcher, *_inside(image, program)])}"
    )
    started, node = cluster
    started.run(["sbatch", "--wait", str(job)], user=alice, env=node.environment(), timeout=90)
    require_one_job(reports(started.login.run(["cat", str(output)], user=alice).stdout), 2)
