"""Launchers, spawned processes and hpcctr itself inside a container, and jobs made of several images.

What cannot work is refused before it starts; what works is what `docs/mpi.md` says.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.e2e.conftest import Profile
from tests.support.engine import HPCCTR
from tests.support.mpi import (
    LAUNCHERS,
    Family,
    contained,
    mpirun,
    native,
    open_mpi_version,
    reports,
    require_one_job,
    script,
)
from tests.support.node import Node
from tests.support.spawning import Spawned, compiled
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.network, pytest.mark.timeout(180, func_only=True)]

FAMILIES: tuple[Family, ...] = ("openmpi", "mpich")
INSIDE: dict[Family, list[str]] = {
    "openmpi": ["mpirun.openmpi", "--oversubscribe", "-n", "2"],
    "mpich": ["mpiexec.hydra", "-n", "2"],
}
"""The images' own launchers, as one types them inside."""

ONE_NODE = ("-e", "OMPI_MCA_plm=^slurm", "-e", "PRTE_MCA_plm=^slurm", "-e", "HYDRA_LAUNCHER=fork")
"""The remedy of the error's hint for a job of one node."""

BY_LOOPBACK = {"OMPI_MCA_btl_tcp_if_include": "lo"}
"""Open MPI 5: a job and those it spawned meet by TCP, which leaves out the loopback device unless told."""


@pytest.fixture(scope="module", params=["debian12_mpi_image", "debian13_mpi_image"])
def image(request: pytest.FixtureRequest, shared_node: Node) -> str:
    """The name of an image with Open MPI 4 or 5 and MPICH in the store."""
    name: str = request.getfixturevalue(request.param)
    shared_node.pull(name)
    return name


@pytest.fixture(scope="module")
def alike(request: pytest.FixtureRequest, shared_node: Node) -> str:
    """The image whose MPI libraries are of the host's versions: only such processes form a job natively as well."""
    name: str = request.getfixturevalue("debian13_mpi_image" if open_mpi_version() >= (5,) else "debian12_mpi_image")
    shared_node.pull(name)
    return name


@pytest.fixture
def spawn(place: Path) -> Path:
    """The program that starts others by MPI_Comm_spawn; it comes along as the working directory."""
    directory = place / "work"
    directory.mkdir(mode=0o755)
    return compiled(directory)


def _allocation(host: str) -> dict[str, str]:
    """What salloc sets for two tasks on one node."""
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_JOBID": "7",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NODELIST": host,
        "SLURM_JOB_NODELIST": host,
        "SLURM_NTASKS": "2",
        "SLURM_TASKS_PER_NODE": "2",
        "SLURM_CPUS_ON_NODE": "2",
        "SLURM_JOB_CPUS_PER_NODE": "2",
    }


def _agent(words: Sequence[str]) -> list[str]:
    """The host mpirun's options that make it start every process through WORDS."""
    option = ["--prtemca", "odls_base_exec_agent"] if open_mpi_version() >= (5,) else ["--mca", "orte_fork_agent"]
    return [*option, " ".join(words)]


# launchers inside


@pytest.mark.parametrize("family", FAMILIES)
def test_the_images_launcher_runs_a_job_on_this_node(
    shared_node: Node, alice: User, image: str, family: Family
) -> None:
    done = shared_node.run(image, *INSIDE[family], contained(family, "report"), user=alice, timeout=120)
    found = reports(done.stdout)
    require_one_job(found, 2)
    assert {report.uid for report in found} == {alice.uid}
    assert {report.cma for report in found} == {"yes"}


@pytest.mark.parametrize(
    ("launcher", "nodes"), [("mpirun", "1"), ("mpiexec.hydra", "1"), ("mpirun.openmpi", "2"), ("/usr/bin/mpiexec", "2")]
)
def test_the_images_launcher_in_an_allocation_is_refused_before_it_starts(
    shared_node: Node, alice: User, alike: str, launcher: str, nodes: str
) -> None:
    env = {**_allocation("n1"), "SLURM_JOB_NUM_NODES": nodes, "SLURM_NNODES": nodes}
    done = shared_node.run(alike, launcher, "-n", "2", "true", user=alice, env=env, check=126)
    text = done.stderr.decode()
    assert done.stdout == b""
    assert text.startswith(f"hpcctr: error[launcher-inside]: {Path(launcher).name} would run inside "), text
    for words in ("Slurm", "SLURM_JOB_ID", "srun", "put it outside", *ONE_NODE, "HPCCTR_ALLOW_NESTED_MPI=1"):
        assert words in text, text


def test_open_mpi_in_an_allocation_of_one_node_needs_no_remedy(shared_node: Node, alice: User, image: str) -> None:
    host = shared_node.host.run(["hostname"]).stdout.decode().strip()
    command = [*INSIDE["openmpi"], contained("openmpi", "report")]
    done = shared_node.run(image, *command, user=alice, env=_allocation(host), timeout=120)
    require_one_job(reports(done.stdout), 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_remedy_for_one_node_runs_the_job(shared_node: Node, alice: User, image: str, family: Family) -> None:
    host = shared_node.host.run(["hostname"]).stdout.decode().strip()
    done = shared_node.run(
        image,
        *INSIDE[family],
        contained(family, "report"),
        user=alice,
        flags=ONE_NODE,
        env=_allocation(host),
        timeout=120,
    )
    require_one_job(reports(done.stdout), 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_remedy_for_one_node_is_also_an_option_of_the_launcher(
    shared_node: Node, alice: User, image: str, family: Family
) -> None:
    host = shared_node.host.run(["hostname"]).stdout.decode().strip()
    plm = ["--mca", "plm", "^slurm"] if "bookworm" in image else ["--prtemca", "plm", "^slurm"]
    launcher, *rest = INSIDE[family]
    option = plm if family == "openmpi" else ["-launcher", "fork"]
    command = [launcher, *option, *rest, contained(family, "report")]
    done = shared_node.run(image, *command, user=alice, env=_allocation(host), timeout=120)
    require_one_job(reports(done.stdout), 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_remedy_of_the_launcher_outside_runs_the_job(
    shared_node: Node, alice: User, image: str, family: Family
) -> None:
    job = LAUNCHERS[family](2, str(HPCCTR), "run", image, "--", contained(family, "report"))
    # The launcher outside would ask srun, which is another test's (test_slurm.py).
    env = shared_node.environment({**_allocation("n1"), "OMPI_MCA_plm": "^slurm", "PRTE_MCA_plm": "^slurm"})
    env |= {"OMPI_MCA_ras": "^slurm", "PRTE_MCA_ras": "^slurm"}
    require_one_job(reports(shared_node.host.run(job, user=alice, env=env, timeout=120).stdout), 2)


@pytest.mark.parametrize(
    ("flags", "command", "extra"),
    [
        (["-e", "HPCCTR_ALLOW_NESTED_MPI=1"], ["mpirun", "--version"], {}),
        ([], ["mpirun", "--version"], {"HPCCTR_ALLOW_NESTED_MPI": "1"}),
        ([], ["mpirun", "--mca", "plm", "rsh", "--version"], {}),
        ([], ["mpirun.openmpi", "--version"], {"OMPI_MCA_plm": "^slurm"}),
        ([], ["mpiexec.hydra", "-bootstrap", "fork", "-version"], {}),
        (["-e", "SLURM_JOB_ID"], ["hostname"], {}),
    ],
    ids=["-e", "variable", "option", "open-mpi", "hydra", "other-command"],
)
def test_who_knows_what_they_do_is_not_refused(
    shared_node: Node, alice: User, alike: str, flags: list[str], command: list[str], extra: Mapping[str, str]
) -> None:
    shared_node.run(alike, *command, user=alice, flags=flags, env={"SLURM_JOB_ID": "7", **extra})


def test_explain_says_that_a_launch_would_be_refused(shared_node: Node, alice: User, alike: str) -> None:
    done = shared_node.run(alike, "mpirun", "x", user=alice, flags=["--explain"], env={"SLURM_JOB_ID": "7"}, check=126)
    assert b"error[launcher-inside]" in done.stderr


# agents: what a launcher starts processes through


def test_an_agent_puts_every_process_into_the_image(shared_node: Node, alice: User, alike: str, spawn: Path) -> None:
    """mpirun looks for the program on the host first, so this is for programs on a directory both see."""
    job = mpirun(1, str(spawn), str(spawn), flags=_agent([str(HPCCTR), "run", alike, "--"]))
    done = shared_node.host.run(
        job, user=alice, env=shared_node.environment(BY_LOOPBACK), cwd=spawn.parent, timeout=120
    )
    assert Spawned.parse(done.stdout) == Spawned(parent="container", children=("container",) * 2, sum=3)


def test_the_agents_of_both_open_mpis_are_called_so(shared_node: Node, alice: User, image: str, place: Path) -> None:
    """In the images' own Open MPI 4 and 5, where the names of the parameters can be proven on any host."""
    option = ["--mca", "orte_fork_agent"] if "bookworm" in image else ["--prtemca", "odls_base_exec_agent"]
    agent = script(place, "agent", 'echo "through the agent: $1"; exec "$@"')
    done = shared_node.run(
        image, "mpirun.openmpi", *option, str(agent), "-n", "2", "--oversubscribe", "hostname", user=alice, cwd=place
    )
    assert done.stdout.count(b"through the agent: ") == 2, done


# MPI_Comm_spawn


def test_children_and_parent_compute_together_without_a_container(shared_node: Node, alice: User, spawn: Path) -> None:
    """What the tests below may expect of this host's Open MPI."""
    job = mpirun(1, str(spawn), str(spawn))
    done = shared_node.host.run(job, user=alice, env=BY_LOOPBACK, cwd=spawn.parent, timeout=120)
    assert Spawned.parse(done.stdout) == Spawned(parent="host", children=("host",) * 2, sum=3)


def test_children_of_a_contained_program_are_the_launchers_and_run_on_the_bare_host(
    shared_node: Node, alice: User, alike: str, spawn: Path
) -> None:
    """MPI_Comm_spawn asks mpirun, which is outside; docs/mpi.md warns of it and names the remedies tested here."""
    job = mpirun(1, str(HPCCTR), "run", alike, "--", str(spawn), str(spawn))
    done = shared_node.host.run(
        job, user=alice, env=shared_node.environment(BY_LOOPBACK), cwd=spawn.parent, timeout=120
    )
    assert Spawned.parse(done.stdout) == Spawned(parent="container", children=("host",) * 2, sum=3)


def test_children_run_in_the_image_when_the_command_spawned_is_hpcctr(
    shared_node: Node, alice: User, alike: str, spawn: Path
) -> None:
    words = [str(HPCCTR), "run", alike, "--", str(spawn)]
    done = shared_node.host.run(
        mpirun(1, *words, *words), user=alice, env=shared_node.environment(BY_LOOPBACK), cwd=spawn.parent, timeout=120
    )
    assert Spawned.parse(done.stdout) == Spawned(parent="container", children=("container",) * 2, sum=3)


def test_children_run_in_the_image_when_the_launcher_is_inside(
    shared_node: Node, alice: User, alike: str, spawn: Path
) -> None:
    done = shared_node.run(
        alike,
        *["mpirun.openmpi", "--oversubscribe", "-n", "1", str(spawn), str(spawn)],
        user=alice,
        env=BY_LOOPBACK,
        cwd=spawn.parent,
        timeout=120,
    )
    assert Spawned.parse(done.stdout) == Spawned(parent="container", children=("container",) * 2, sum=3)


# several programs, one job


@pytest.fixture(scope="module")
def twin(shared_node: Node, alike: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another image with the same MPI: another digest, so another container. It says that its launcher knows the
    scheduler, as one would say who has put srun into it.
    """
    layout = tmp_path_factory.mktemp("twin") / "layout"
    subprocess.run(["skopeo", "--insecure-policy", "copy", "--quiet", alike, f"oci:{layout}:latest"], check=True)
    subprocess.run(
        ["umoci", "config", "--image", f"{layout}:latest", "--config.env", "HPCCTR_ALLOW_NESTED_MPI=1"], check=True
    )
    shared_node.pull(f"oci:{layout}:latest")
    return f"oci:{layout}:latest"


def _launcher_of_several(family: Family) -> list[str]:
    """Debian 13's mpirun (5.0.7) dies of a segmentation fault of its own when given several programs, be it `mpirun
    hostname : hostname`; prterun, which it is made of, does not.
    """
    if family == "mpich":
        return ["mpiexec.hydra", "-bootstrap", "fork"]
    if open_mpi_version() >= (5,):
        return ["prterun", "--map-by", ":oversubscribe"]
    return ["mpirun.openmpi", "--oversubscribe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_job_of_two_images_and_the_bare_host(
    shared_node: Node, alice: User, alike: str, twin: str, family: Family
) -> None:
    program = contained(family, "report")
    job = [
        *_launcher_of_several(family),
        *["-n", "1", str(HPCCTR), "run", alike, "--", program],
        *[":", "-n", "1", str(HPCCTR), "run", twin, "--", program],
        *[":", "-n", "1", native(family, "report")],
    ]
    done = shared_node.host.run(job, user=alice, env=shared_node.environment(), timeout=120)
    found = reports(done.stdout)
    require_one_job(found, 3)
    assert {report.node_ranks for report in found} == {3}
    assert {report.cma for report in found} == {"yes"}


def test_an_image_may_say_that_its_launcher_knows_the_scheduler(shared_node: Node, alice: User, twin: str) -> None:
    shared_node.run(twin, "mpirun", "--version", user=alice, env={"SLURM_JOB_ID": "7"})


# hpcctr inside hpcctr


@pytest.mark.parametrize("with_socket", [False, True], ids=["client", "client-and-socket"])
@pytest.mark.parametrize("who", ["user", "root"])
def test_hpcctr_inside_a_container_says_why_it_cannot(
    shared_node: Node, alice: User, alike: str, who: str, with_socket: bool
) -> None:
    flags = ["-v", "/usr:/usr", "-v", "/opt/hpcctr:/opt/hpcctr", *(["-v", "/run:/run"] if with_socket else [])]
    done = shared_node.run(
        alike,
        *[str(HPCCTR), "run", alike, "--", "true"],
        user=alice if who == "user" else None,
        flags=flags,
        check=126,
    )
    text = done.stderr.decode()
    assert text.startswith("hpcctr: error[inside-container]: "), text
    assert "no_new_privs" in text and "hint: start both from outside" in text
    done = shared_node.run(
        alike, str(HPCCTR), "exec", "1", "--", "true", user=alice if who == "user" else None, flags=flags, check=126
    )
    assert done.stderr.decode() == text


def test_the_engine_refuses_a_client_inside_a_container_whatever_it_is(gateway: Profile) -> None:
    """A client that does not look for itself: the socket answers, and nothing is handed out."""
    request = "hpcctr/1 run\\0image=x\\0"
    code = (
        "import socket; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); "
        f"s.connect('/run/hpcctr/engine.sock'); s.sendall(b'{request}'); print(s.recv(9999))"
    )
    flags = ["-v", "/usr:/usr", "-v", "/lib64:/lib64", "-v", "/lib:/lib", "-v", "/run:/run"]
    text = gateway.output("/usr/bin/python3", "-c", code, flags=flags)
    assert "slug=caller-refused" in text and "another root directory" in text
