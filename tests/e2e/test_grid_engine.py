"""Jobs of Grid Engine: no plug-in, the process is the scheduler's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.engine import HPCCTR
from tests.support.grid_engine import GridEngine, grid_engine
from tests.support.mpi import contained, open_mpi_version, reports, require_one_job
from tests.support.node import Node, equipped
from tests.support.scratch import scratch
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.network]


@pytest.fixture(scope="module")
def site() -> Iterator[tuple[GridEngine, Node]]:
    with scratch("sge") as root, grid_engine(root) as started, equipped(started.host) as node:
        yield started, node


def test_a_job_may_be_hpcctr_itself(site: tuple[GridEngine, Node], alice: User, busybox_image: str) -> None:
    scheduler, node = site
    node.pull(busybox_image)
    words = ["sh", "-c", "id -u; cat /proc/$PPID/comm; echo $JOB_NAME; echo $TMPDIR; touch $TMPDIR/made && exit 3"]
    job = ["-b", "y", "-N", "contained", "-shell", "n", "-cwd", str(HPCCTR), "run", busybox_image, "--", *words]
    printed = scheduler.submit(*job, user=alice, env=node.environment(), status=3).split()
    assert printed[:3] == [str(alice.uid), "sge_shepherd", "contained"]
    # The job's own directory, which is the scheduler's to make and to remove.
    assert printed[3].startswith("/tmp/")


@pytest.fixture(scope="module")
def mpi_image(request: pytest.FixtureRequest, site: tuple[GridEngine, Node]) -> str:
    """With the host's version of Open MPI."""
    name: str = request.getfixturevalue("debian13_mpi_image" if open_mpi_version() >= (5,) else "debian12_mpi_image")
    site[1].pull(name)
    return name


def _parallel(site: tuple[GridEngine, Node], user: User, *words: str, status: int = 0) -> str:
    scheduler, node = site
    job = ["-b", "y", "-pe", "mpi", "2", "-shell", "n", "-cwd", *words]
    return scheduler.submit(*job, user=user, env=node.environment(), status=status)


def test_ranks_of_a_parallel_job_form_one_mpi_job(site: tuple[GridEngine, Node], alice: User, mpi_image: str) -> None:
    program = [str(HPCCTR), "run", mpi_image, "--", contained("openmpi", "report")]
    require_one_job(reports(_parallel(site, alice, "mpirun.openmpi", "-n", "2", *program).encode()), 2)


def test_the_images_launcher_in_an_allocation_is_refused(
    site: tuple[GridEngine, Node], alice: User, mpi_image: str
) -> None:
    printed = _parallel(site, alice, str(HPCCTR), "run", mpi_image, "--", "mpirun", "true", status=126)
    assert "error[launcher-inside]" in printed and "Grid Engine" in printed
