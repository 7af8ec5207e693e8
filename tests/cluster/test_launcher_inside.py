"""MPI launchers in a real allocation: refused as the command of a container, and the remedies of the refusal run it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.cluster.cluster import Cluster
from tests.support.mpi import contained, reports, require_one_job
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.network, pytest.mark.timeout(180, func_only=True)]

ONE_NODE = ("-e", "OMPI_MCA_plm=^slurm", "-e", "PRTE_MCA_plm=^slurm", "-e", "HYDRA_LAUNCHER=fork")
JOBS = {
    "openmpi": (["mpirun.openmpi", "-n", "2"], contained("openmpi", "report")),
    "mpich": (["mpiexec.hydra", "-n", "2"], contained("mpich", "report")),
}


def _salloc(cluster: Cluster, user: User, command: Sequence[str], *, check: bool | int = True) -> tuple[bytes, str]:
    done = cluster.salloc("-w", "n1", "--ntasks=2", *command, user=user, check=check)
    return done.stdout, done.stderr.decode()


@pytest.mark.parametrize("launcher", ["mpirun", "mpiexec", "mpiexec.hydra"])
def test_a_launcher_as_the_command_is_refused(
    shared_cluster: Cluster, alice: User, like_the_host: str, launcher: str
) -> None:
    """The plain names may be Hydra's, which would wait for ever for the srun it cannot start."""
    words = shared_cluster.inside(like_the_host, launcher, "-n", "2", "true")
    output, text = _salloc(shared_cluster, alice, words, check=126)
    assert output == b"" and text.startswith("hpcctr: error[launcher-inside]: "), text


def test_open_mpis_launcher_by_its_own_name_runs_on_one_node(
    shared_cluster: Cluster, alice: User, like_the_host: str
) -> None:
    launcher, program = JOBS["openmpi"]
    output, _ = _salloc(shared_cluster, alice, shared_cluster.inside(like_the_host, *launcher, program))
    require_one_job(reports(output), 2)


@pytest.mark.parametrize("family", JOBS)
def test_on_one_node_it_runs_when_told_to_start_processes_itself(
    shared_cluster: Cluster, alice: User, like_the_host: str, family: str
) -> None:
    launcher, program = JOBS[family]
    output, _ = _salloc(shared_cluster, alice, shared_cluster.inside(like_the_host, *launcher, program, flags=ONE_NODE))
    require_one_job(reports(output), 2)


@pytest.mark.parametrize("family", JOBS)
def test_outside_it_runs(shared_cluster: Cluster, alice: User, like_the_host: str, family: str) -> None:
    launcher, program = JOBS[family]
    output, _ = _salloc(shared_cluster, alice, [*launcher, *shared_cluster.inside(like_the_host, program)])
    require_one_job(reports(output), 2)
