"""What a request asks of the node, put together; what is asked for is described by files made here."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from hpcctr.errors import FeatureUnknown, FeatureUnusable, MpiUnfit
from hpcctr.host import features as module
from hpcctr.host.features import features_of
from hpcctr.image.record import FactsSummary, ImageFacts, MpiLibrary, StoredImage
from hpcctr.request import LaunchRequest
from hpcctr.site import CdiSettings, Site
from tests.support.values import a_caller, a_stored_image

FACTS = ImageFacts(libc="glibc", libc_version="2.36", loader="/lib64/ld-linux-x86-64.so.2")
MPICH = MpiLibrary(soname="libmpi.so.12", path="/usr/lib/libmpi.so.12", family="mpich", version="4.0.2", pmi=("pmi1",))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site with a profile and two devices; the image's facts are given, no store has it."""
    for name in ("cdi", "profiles"):
        (tmp_path / name).mkdir(mode=0o755)
    monkeypatch.setattr(module, "facts_of", lambda _: FACTS)
    (tmp_path / "profiles/fuse.toml").write_text('devices = ["/dev/null"]\n[env]\nA = "profile"\n')
    devices = [
        {"name": name, "containerEdits": {"env": [f"A={name}", f"B={name}"], "deviceNodes": [{"path": "/dev/zero"}]}}
        for name in ("0", "1")
    ]
    document = {"cdiVersion": "0.5.0", "kind": "example.com/net", "devices": devices}
    (tmp_path / "cdi/net.json").write_text(json.dumps(document))
    return Site(
        env={"A": "site", "S": "site"},
        profile_directory=str(tmp_path / "profiles"),
        cdi=CdiSettings(directories=(str(tmp_path / "cdi"),)),
    )


def _image(*mpi: MpiLibrary) -> StoredImage:
    image = a_stored_image()
    record = msgspec.structs.replace(image.record, facts=FactsSummary(libc="glibc", mpi=mpi, pmix=""))
    return msgspec.structs.replace(image, record=record)


def _of(site: Site, image: StoredImage | None = None, **asked: object) -> module.Features:
    request = LaunchRequest(image="x", **asked)  # type: ignore[arg-type]
    return features_of(request, a_caller(), site, image or _image())


def test_a_launch_that_asks_for_nothing_reads_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cdi", "profiles", "mpi", "HostCache", "facts_of"):
        monkeypatch.setattr(module, name, None)
    found = _of(site)
    assert {edit.name: edit.value for edit in found.edits.env} == {"A": "site", "S": "site"}
    assert (found.names, found.devices) == ((), ())


def test_of_site_profile_and_device_the_later_counts(site: Site) -> None:
    found = _of(site, features=("fuse",), devices=("example.com/net=1",))
    assert {edit.name: edit.value for edit in found.edits.env} == {"A": "1", "S": "site", "B": "1"}
    assert [edit.path for edit in found.edits.devices] == ["/dev/null", "/dev/zero"]
    assert (found.names, found.devices) == (("fuse",), ("example.com/net=1",))


def test_a_default_feature_is_nobodys_wish(site: Site) -> None:
    found = _of(msgspec.structs.replace(site, features=("fuse",)))
    assert {edit.name: edit.value for edit in found.edits.env}["A"] == "profile"
    assert found.names == ()


def test_a_feature_without_a_profile_is_named_with_those_there_are(site: Site) -> None:
    with pytest.raises(FeatureUnknown, match="host feature ib: no profile") as raised:
        _of(site, features=("ib",))
    assert "fuse" in raised.value.hint
    with pytest.raises(FeatureUnknown, match=r"gone, which features of site\.toml names"):
        _of(msgspec.structs.replace(site, features=("gone",)))


def test_a_profile_of_what_the_node_lacks_is_unusable_when_it_is_asked_for(site: Site) -> None:
    Path(site.profile_directory, "ib.toml").write_text('devices = ["/dev/infiniband-of-nobody/*"]\n')
    with pytest.raises(FeatureUnusable, match="infiniband-of-nobody"):
        _of(site, features=("ib",))
    found = _of(msgspec.structs.replace(site, features=("ib",)))
    assert found.edits.devices == () and "left out" in found.edits.notes[0]


def test_the_nodes_mpi_is_a_feature_of_that_name_for_policy(site: Site) -> None:
    with pytest.raises(MpiUnfit):
        _of(site, mpi="host")
    assert _of(site, mpi="container").names == ()
    assert any(note.startswith("MPI: none in the image") for note in _of(site, mpi="auto").edits.notes)


def test_the_client_is_told_of_the_one_mpi_an_image_has(site: Site) -> None:
    assert _of(site, _image(MPICH)).edits.mpi == "mpich\t4.0.2\tpmi1\t\t"
    other = msgspec.structs.replace(MPICH, family="openmpi", version="4.1.4")
    assert _of(site, _image(MPICH, other)).edits.mpi == ""
    assert _of(site, a_stored_image()).edits.mpi == ""
