"""Which MPI a program gets. The node's is a stand-in: small libraries with the names, links and texts of real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcctr.errors import FeatureUnusable, MpiUnfit
from hpcctr.host import mpi, node_mpi
from hpcctr.host.edits import HostEdits
from hpcctr.host.ldcache import HostCache
from hpcctr.host.profile_written import MpiSettings
from hpcctr.host.profiles import Profile
from hpcctr.image.record import ImageFacts, Library, MpiLibrary
from tests.support import stand_in_mpi


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("node")


@pytest.fixture(scope="module")
def mpich(root: Path) -> HostCache:
    return stand_in_mpi.mpich(root)


@pytest.fixture(scope="module")
def open_mpi(root: Path) -> HostCache:
    return stand_in_mpi.open_mpi(root)


#: Path, family, version, product.
Mpi = tuple[str, str, str, str]


def _facts(*mpis: Mpi, libraries: tuple[tuple[str, str], ...] = ()) -> ImageFacts:
    return ImageFacts(
        libc="glibc",
        libc_version="2.41",
        loader="/lib64/ld-linux-x86-64.so.2",
        libraries=tuple(Library(soname=soname, path=path) for soname, path in libraries),
        mpi=tuple(
            MpiLibrary(soname=Path(path).name, path=path, family=family, version=version, product=product)  # type: ignore[arg-type]
            for path, family, version, product in mpis
        ),
    )


WHEEL = ("/opt/mpi/lib/libmpi.so.12", "mpich", "4.3.2", "MPICH")
INTEL = ("/opt/intel/lib/libmpi.so.12", "mpich", "2021.16", "Intel MPI")
OLD_MPICH = ("/usr/lib/libmpich.so.10", "mpich", "3.0.4", "MPICH")
OPEN_MPI_4 = ("/opt/ompi/lib/libmpi.so.40", "openmpi", "4.1.8", "Open MPI")
OPEN_MPI_5 = ("/opt/ompi5/lib/libmpi.so.40", "openmpi", "5.0.8", "Open MPI")
OLD_OPEN_MPI = ("/usr/lib/libmpi.so.12", "openmpi", "1.10.7", "Open MPI")
STANDARD = ("/opt/mpi/lib/libmpi_abi.so.1", "mpi-abi", "5.0.2", "MPICH")


def _plan(choice: str, facts: ImageFacts | None, host: HostCache, profile: Profile | None = None) -> mpi.MpiPlan:
    return mpi.decide(choice, asked=True, facts=facts, profile=profile, host=host, root_owned=False)


def _targets(edits: HostEdits) -> dict[str, str]:
    """Name of the node's file by where it is inside."""
    return {mount.target: Path(mount.source).name for mount in edits.mounts}


def test_the_nodes_mpich_is_found_by_every_name_that_programs_ask_for(mpich: HostCache) -> None:
    targets = _targets(_plan("host", _facts(WHEEL), mpich).edits)
    names = ["libmpi.so.12", "libmpich.so.12"]
    assert all(targets[f"/.hpcctr-host/lib/{name}"] == "libmpich.so.12" for name in names)
    names = ["libmpifort.so.12", "libmpichfort.so.12", "libmpichf90.so.12"]
    assert all(targets[f"/.hpcctr-host/lib/{name}"] == "libmpichfort.so.12" for name in names)


def test_files_that_search_paths_of_the_image_lead_to_are_replaced(mpich: HostCache) -> None:
    debian = ("/usr/lib/libmpich.so.12.4.1", "mpich", "4.2.1", "MPICH")
    facts = _facts(
        WHEEL,
        INTEL,
        debian,
        libraries=(
            ("libmpich.so.12", "/usr/lib/libmpich.so.12.4.1"),
            ("libmpichfort.so.12", "/usr/lib/libmpichfort.so.12.4.1"),
        ),
    )
    targets = _targets(_plan("host", facts, mpich).edits)
    replaced = {path: name for path, name in targets.items() if not path.startswith("/.hpcctr-host") and "mpi" in name}
    assert replaced == {
        "/opt/mpi/lib/libmpi.so.12": "libmpich.so.12",
        "/opt/mpi/lib/libmpifort.so.12": "libmpichfort.so.12",
        "/opt/intel/lib/libmpi.so.12": "libmpich.so.12",
        "/opt/intel/lib/libmpifort.so.12": "libmpichfort.so.12",
        "/usr/lib/libmpich.so.12.4.1": "libmpich.so.12",
        "/usr/lib/libmpichfort.so.12.4.1": "libmpichfort.so.12",
    }


@pytest.mark.parametrize("place", ["/proc/lib", "/dev/shm", "/run/hpcctr", "/.hpcctr-host/lib"])
def test_what_an_image_has_where_nothing_of_its_may_be_is_no_place_for_a_mount(mpich: HostCache, place: str) -> None:
    facts = _facts(
        WHEEL,
        (f"{place}/libmpi.so.12", "mpich", "4.3.2", "MPICH"),
        libraries=(("libmpich.so.12", f"{place}/libmpich.so.12.9"),),
    )
    without = _targets(_plan("host", _facts(WHEEL), mpich).edits)
    assert _targets(_plan("host", facts, mpich).edits) == without


def test_the_fabrics_libraries_are_the_nodes_and_others_the_images_where_it_has_them(
    mpich: HostCache, root: Path
) -> None:
    facts = _facts(WHEEL, libraries=(("libucs.so.0", "/usr/lib/libucs.so.0"), ("libhwloc.so.15", "/usr/lib/hwloc")))
    targets = _targets(_plan("host", facts, mpich).edits)
    assert targets["/.hpcctr-host/lib/libucs.so.0"] == targets["/usr/lib/libucs.so.0"] == "libucs.so.0"
    assert targets[str(root / "usr/lib/ucx")] == "ucx"
    assert "/.hpcctr-host/lib/libgfortran.so.5" in targets
    assert "/.hpcctr-host/lib/libhwloc.so.15" not in targets


def test_open_mpi_comes_with_its_parts_plug_ins_and_what_these_need(open_mpi: HostCache, root: Path) -> None:
    plan = _plan("host", _facts(OPEN_MPI_4), open_mpi)
    targets = _targets(plan.edits)
    for name in ("libmpi.so.40", "libopen-pal.so.40", "libevent_core-2.1.so.7"):
        assert f"/.hpcctr-host/lib/{name}" in targets
    for name in ("libmpi.so.40", "libopen-pal.so.40"):
        assert targets[f"/opt/ompi/lib/{name}"] == name
    for name in ("lib/openmpi", "share/openmpi", "etc/openmpi"):
        assert str(root / "opt" / name) in targets
    assert {edit.name: edit.value for edit in plan.edits.env} == {
        "OPAL_PKGLIBDIR": str(root / "opt/lib/openmpi"),
        "OPAL_PKGDATADIR": str(root / "opt/share/openmpi"),
        "OPAL_SYSCONFDIR": str(root / "opt/etc/openmpi"),
    }


@pytest.mark.parametrize(
    ("node", "image"),
    [
        ("mpich", OLD_MPICH), ("mpich", OPEN_MPI_4), ("mpich", OLD_OPEN_MPI), ("mpich", STANDARD),
        ("open_mpi", WHEEL), ("open_mpi", OPEN_MPI_5), ("open_mpi", OLD_OPEN_MPI), ("open_mpi", INTEL),
    ],
)  # fmt: skip
def test_a_pair_without_a_common_binary_interface_is_refused_with_both_versions(
    node: str, image: Mpi, request: pytest.FixtureRequest
) -> None:
    host: HostCache = request.getfixturevalue(node)
    with pytest.raises(MpiUnfit) as raised:
        _plan("host", _facts(image), host)
    _, _, version, product = image
    ours = "MPICH 4.0.2" if node == "mpich" else "Open MPI 4.1.4"
    assert f"the image has {product} {version}" in raised.value.message and ours in raised.value.message
    assert "--mpi=container" in raised.value.hint
    plan = _plan("auto", _facts(image), host, _profile(host))
    assert not plan.is_host and plan.edits == HostEdits() and version in plan.text


def _profile(host: HostCache, prefer: str = "host") -> Profile:
    words = tuple(path for _, path in host.matching("libmpi*"))
    settings = MpiSettings(prefer="host" if prefer == "host" else "container")
    return Profile(name="mpi", path="/etc/mpi.toml", libraries=words, mpi=settings, root_owned=False)


@pytest.mark.parametrize(("prefer", "is_host"), [("host", True), ("container", False)])
def test_auto_takes_the_nodes_only_where_its_profile_prefers_it(mpich: HostCache, prefer: str, is_host: bool) -> None:
    assert _plan("auto", _facts(WHEEL), mpich, _profile(mpich, prefer)).is_host == is_host
    assert not _plan("auto", _facts(WHEEL), mpich).is_host


def test_what_the_container_speaks_is_that_of_the_library_programs_load(mpich: HostCache) -> None:
    plan = _plan("host", _facts(WHEEL), mpich)
    assert plan.library is not None and (plan.library.version, plan.library.pmi) == ("4.0.2", ("pmi1",))
    plan = _plan("container", _facts(WHEEL), mpich)
    assert plan.library is not None and plan.library.version == "4.3.2"


def test_what_does_not_fit_beside_what_does_stays_and_is_named(mpich: HostCache) -> None:
    plan = _plan("host", _facts(WHEEL, OPEN_MPI_5), mpich)
    assert plan.is_host and plan.library is None
    assert any("Open MPI 5.0.8 stays the image's" in text for text in plan.edits.warnings)
    assert not any(target.startswith("/opt/ompi5") for target in _targets(plan.edits))


@pytest.mark.parametrize(
    ("node", "fits", "stays"), [("open_mpi", OPEN_MPI_4, OPEN_MPI_5), ("mpich", WHEEL, OLD_OPEN_MPI)]
)
def test_two_mpis_of_one_name_cannot_be_told_apart_and_are_refused(
    node: str, fits: Mpi, stays: Mpi, request: pytest.FixtureRequest
) -> None:
    """Open MPI 1.10 and MPICH are libmpi.so.12; Open MPI 4 and 5 are libmpi.so.40."""
    with pytest.raises(MpiUnfit, match="by the name libmpi.so"):
        _plan("host", _facts(fits, stays), request.getfixturevalue(node))


def test_an_image_without_mpi_gets_nothing_and_a_launch_that_asked_is_refused(mpich: HostCache) -> None:
    with pytest.raises(MpiUnfit, match="no MPI library was found in the image"):
        _plan("host", _facts(), mpich)
    plan = mpi.decide("host", asked=False, facts=_facts(), profile=None, host=mpich, root_owned=False)
    assert plan == mpi.MpiPlan(is_host=False, text=plan.text)
    assert _plan("container", _facts(), mpich).library is None


def test_a_node_without_mpi_or_an_image_nobody_looked_into_is_refused(mpich: HostCache) -> None:
    with pytest.raises(MpiUnfit, match="this node has no MPI library"):
        _plan("host", _facts(WHEEL), HostCache(()))
    with pytest.raises(MpiUnfit, match="stored before its MPI was noted"):
        _plan("host", None, mpich)
    assert _plan("container", None, mpich).edits == HostEdits()


def test_a_library_that_a_user_could_write_is_not_taken(tmp_path: Path) -> None:
    host = stand_in_mpi.mpich(tmp_path)
    (found,) = node_mpi.host_mpis(None, host)
    Path(found.library.path).chmod(0o777)
    with pytest.raises(FeatureUnusable):
        mpi.decide("host", asked=True, facts=_facts(WHEEL), profile=None, host=host)


def test_a_profile_names_an_mpi_that_ld_so_does_not_find(mpich: HostCache, open_mpi: HostCache) -> None:
    profile = _profile(open_mpi)
    plan = _plan("host", _facts(OPEN_MPI_4), HostCache(()), profile)
    assert plan.is_host and all(edit.origin == "/etc/mpi.toml" for edit in plan.edits.mounts)


def test_the_node_is_told_in_one_line(mpich: HostCache) -> None:
    line = mpi.on_node(None, mpich)
    assert line.startswith("MPICH 4.0.2 (/") and "; launchers: " in line and "\n" not in line
    assert mpi.on_node(None, HostCache(())).startswith("no MPI library; ")
