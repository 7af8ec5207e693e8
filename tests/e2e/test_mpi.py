"""MPI through the host's own launchers: ranks in a container are the launcher's own processes.

The launchers are the host's, the MPI library is the image's, as on a cluster; nothing in hpcctr knows about either.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.engine import HPCCTR
from tests.support.mpi import (
    LAUNCHERS,
    Family,
    PingPong,
    Report,
    contained,
    cpus,
    mpirun,
    native,
    open_mpi_version,
    reports,
    require_one_job,
    script,
)
from tests.support.node import Node
from tests.support.polling import wait_until
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.network, pytest.mark.timeout(180, func_only=True)]

FAMILIES: tuple[Family, ...] = ("openmpi", "mpich")


@pytest.fixture(scope="module", params=["debian12_mpi_image", "debian13_mpi_image"])
def image(request: pytest.FixtureRequest, shared_node: Node) -> str:
    """The name of an image in the store."""
    name: str = request.getfixturevalue(request.param)
    shared_node.pull(name)
    return name


def _in_container(image: str, *command: str) -> list[str]:
    return [str(HPCCTR), "run", image, "--", *command]


def _job(node: Node, user: User, argv: list[str]) -> tuple[Report, ...]:
    return reports(node.host.run(argv, user=user, env=node.environment(), timeout=120).stdout)


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_in_a_container_form_one_job(shared_node: Node, alice: User, image: str, family: Family) -> None:
    job = LAUNCHERS[family](4, *_in_container(image, contained(family, "report")))
    found = _job(shared_node, alice, job)
    require_one_job(found, 4)
    assert {report.uid for report in found} == {alice.uid}
    assert {report.node_ranks for report in found} == {4}


def test_the_mpi_library_is_the_images(shared_node: Node, alice: User, image: str) -> None:
    """So an image with a newer Open MPI runs under the host's older mpirun, and the other way round."""
    wanted = {"bookworm": ("Open MPI v4.1", "4.0"), "trixie": ("Open MPI v5.0", "4.2")}
    suite = "bookworm" if "bookworm" in image else "trixie"
    for family, version in zip(FAMILIES, wanted[suite], strict=True):
        job = LAUNCHERS[family](2, *_in_container(image, contained(family, "report")))
        assert all(version in report.library for report in _job(shared_node, alice, job))


@pytest.mark.parametrize("family", FAMILIES)
def test_binding_to_cores_is_the_same_inside(shared_node: Node, alice: User, image: str, family: Family) -> None:
    ranks = len(cpus())
    flags = ["--bind-to", "core"] if family == "openmpi" else ["-bind-to", "core"]
    outside = _job(shared_node, alice, LAUNCHERS[family](ranks, native(family, "report"), flags=flags))
    inside = _job(
        shared_node, alice, LAUNCHERS[family](ranks, *_in_container(image, contained(family, "report")), flags=flags)
    )
    assert [report.affinity for report in inside] == [report.affinity for report in outside]
    # It proves something only where binding separates ranks.
    assert len({report.affinity for report in inside}) == ranks


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_keeps_the_pid_the_launcher_gave_it(
    shared_node: Node, alice: User, image: str, family: Family, place: Path
) -> None:
    noted = script(place, "noted", 'echo "started=$$"; exec "$@"')
    job = LAUNCHERS[family](2, str(noted), *_in_container(image, contained(family, "report")))
    output = shared_node.host.run(job, user=alice, env=shared_node.environment(), timeout=120).stdout
    started = {int(pid) for pid in re.findall(rb"started=(\d+)", output)}
    assert {report.pid for report in reports(output)} == started


@pytest.mark.parametrize("family", FAMILIES)
def test_all_ranks_of_a_node_share_one_node_container(
    own_node: Node, alice: User, debian12_mpi_image: str, family: Family
) -> None:
    own_node.pull(debian12_mpi_image)
    job = LAUNCHERS[family](4, *_in_container(debian12_mpi_image, contained(family, "report")))
    require_one_job(_job(own_node, alice, job), 4)
    wait_until(own_node.containerd.created, what="the event of the container's making")
    assert len(own_node.containerd.created()) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_read_each_others_memory_as_natively(shared_node: Node, alice: User, image: str, family: Family) -> None:
    """Single-copy transports (CMA) need ranks in one user namespace with equal credentials."""
    outside = _job(shared_node, alice, LAUNCHERS[family](2, native(family, "report")))
    inside = _job(shared_node, alice, LAUNCHERS[family](2, *_in_container(image, contained(family, "report"))))
    assert [report.cma for report in inside] == [report.cma for report in outside] == ["yes", "yes"]


def test_open_mpi_needs_no_other_transport_than_shared_memory(shared_node: Node, alice: User, image: str) -> None:
    """With nothing else allowed, a job ends well only if the shared-memory transport reached the other rank."""
    transport = "vader" if "bookworm" in image else "sm"
    # In the ranks' environment: mpirun's own --mca would have to be understood by the host's version as well.
    flags = ["-x", "OMPI_MCA_btl", "-x", "OMPI_MCA_pml"]
    job = mpirun(2, *_in_container(image, contained("openmpi", "report")), flags=flags)
    env = shared_node.environment({"OMPI_MCA_btl": f"{transport},self", "OMPI_MCA_pml": "ob1"})
    output = shared_node.host.run(job, user=alice, env=env, timeout=120)
    require_one_job(reports(output.stdout), 2)
    assert b"single-copy" not in output.stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_messages_are_measured_inside_and_natively(
    shared_node: Node, alice: User, image: str, family: Family, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers are printed, never judged: this machine's load is no property of hpcctr."""
    measured = {}
    for where, command in (
        ("native", [native(family, "pingpong")]),
        ("inside", _in_container(image, contained(family, "pingpong"))),
    ):
        job = LAUNCHERS[family](2, *command)
        output = shared_node.host.run(job, user=alice, env=shared_node.environment(), timeout=120).stdout
        measured[where] = PingPong.parse(output)
    host = f"Open MPI {'.'.join(map(str, open_mpi_version()))}" if family == "openmpi" else "Hydra"
    with capsys.disabled():
        compared = measured["inside"].compared_with(measured["native"])
        print(f"\n{family} of {Path(image).name[:12]} under the host's {host}: {compared}")
    assert all(value > 0 for value in vars(measured["inside"]).values())
