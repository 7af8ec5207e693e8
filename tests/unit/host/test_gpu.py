"""--gpu as CDI devices. No GPU is here: nodes are names in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpcctr.errors import FeatureUnknown
from hpcctr.host.cdi import Registry
from hpcctr.host.edits import DeviceEdit
from hpcctr.host.gpu import Gpu, gpu_of, gpus, names, used
from tests.support.cdi import a_file, write

A, B = "GPU-8a56a4bc-0184-a92b-35ab-3c1a4d2b9b04", "GPU-11111111-0184-a92b-35ab-3c1a4d2b9b04"
NVIDIA = [("0", ["nvidia0", "dri/card1", "dri/renderD128"]), ("1", ["nvidia1", "dri/card2", "dri/renderD129"])]
NVIDIA_UUIDS = [(A, NVIDIA[0][1]), (B, NVIDIA[1][1])]
ALL = [("all", ["nvidia0", "dri/card1", "dri/renderD128", "nvidia1", "dri/card2", "dri/renderD129"])]
AMD = [("0", ["dri/card1", "dri/renderD128", "kfd"]), ("1", ["dri/card2", "dri/renderD129", "kfd"])]
INTEL = [("card10", ["dri/card10", "dri/renderD130"]), ("card2", ["dri/card2", "dri/renderD129"])]


def of_kind(kind: str, devices: list[tuple[str, list[str]]]) -> dict[str, Any]:
    return a_file(
        kind=kind,
        devices=[
            {"name": name, "containerEdits": {"deviceNodes": [{"path": f"/dev/{node}"} for node in nodes]}}
            for name, nodes in devices
        ],
    )


def registry(place: Path, **vendors: list[tuple[str, list[str]]]) -> Registry:
    for vendor, devices in vendors.items():
        write(place, f"{vendor}.json", of_kind(f"{vendor}.com/gpu", devices))
    return Registry.load([str(place)], root_owned=False)


def edits(*paths: str) -> list[DeviceEdit]:
    return [
        DeviceEdit(path=f"/dev/{path}", kind="c", major=1, minor=1, permissions="rwm", device="d", origin="o")
        for path in paths
    ]


def test_all_is_the_vendors_own_name_where_there_is_one(tmp_path: Path) -> None:
    found = registry(tmp_path, nvidia=NVIDIA + ALL, intel=INTEL)
    assert names("all", found) == ("nvidia.com/gpu=all", "intel.com/gpu=card2", "intel.com/gpu=card10")


def test_all_names_a_gpu_once_where_it_has_two_names(tmp_path: Path) -> None:
    found = registry(tmp_path, nvidia=NVIDIA + NVIDIA_UUIDS)
    assert names("all", found) == ("nvidia.com/gpu=0", "nvidia.com/gpu=1")
    assert names("all", registry(tmp_path, nvidia=NVIDIA_UUIDS)) == (f"nvidia.com/gpu={A}", f"nvidia.com/gpu={B}")


def test_other_kinds_are_no_gpus(tmp_path: Path) -> None:
    write(tmp_path, "a.json", of_kind("management.nvidia.com/gpu", ALL))
    write(tmp_path, "b.json", of_kind("intel.com/gpu-mei", [("mei0", ["mei0"])]))
    with pytest.raises(FeatureUnknown, match="describes a GPU"):
        names("all", Registry.load([str(tmp_path)], root_owned=False))


def test_none_is_nothing_and_needs_no_gpu(tmp_path: Path) -> None:
    assert names("none", registry(tmp_path)) == ()


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        ("0", ("0",)),
        ("1,0", ("1", "0")),
        ("1, 1", ("1",)),
        (A, (A,)),
        (f"{A},1", (A, "1")),
        ("all", ("all",)),
    ],
)
def test_numbers_and_uuids_are_names(tmp_path: Path, selection: str, chosen: tuple[str, ...]) -> None:
    found = registry(tmp_path, nvidia=NVIDIA + NVIDIA_UUIDS + ALL)
    assert names(selection, found) == tuple(f"nvidia.com/gpu={name}" for name in chosen)


def test_a_number_finds_a_gpu_whose_name_only_contains_it(tmp_path: Path) -> None:
    write(
        tmp_path,
        "n.json",
        of_kind("nvidia.com/gpu", [("gpu0", ["nvidia0"]), ("mig1:2", ["nvidia1", "nvidia-caps/nvidia-cap3"])]),
    )
    found = registry(tmp_path)
    assert names("0,1:2", found) == ("nvidia.com/gpu=gpu0", "nvidia.com/gpu=mig1:2")
    (tmp_path / "n.json").unlink()
    assert names("0,1", registry(tmp_path, intel=INTEL)) == ("intel.com/gpu=card2", "intel.com/gpu=card10")


def test_a_number_of_two_vendors_wants_to_be_said_in_full(tmp_path: Path) -> None:
    found = registry(tmp_path, nvidia=[*NVIDIA, ("2", ["nvidia2"])], amd=AMD)
    assert names("2", found) == ("nvidia.com/gpu=2",)
    with pytest.raises(FeatureUnknown) as raised:
        names("0", found)
    assert raised.value.message == "GPU 0 is nvidia.com/gpu=0 as well as amd.com/gpu=0"
    assert raised.value.hint == "say which: --device nvidia.com/gpu=0; both: --gpu=all"


@pytest.mark.parametrize("selection", ["3", "0,3", "", "0,", "GPU-x", "nvidia.com/gpu=0", "a" * 5000])
def test_a_gpu_nobody_describes_is_an_error_that_says_which_there_are(tmp_path: Path, selection: str) -> None:
    with pytest.raises(FeatureUnknown, match="no CDI file of this node describes it") as raised:
        names(selection, registry(tmp_path, nvidia=NVIDIA))
    assert raised.value.hint == "known here: 0, 1" and len(raised.value.message) < 200


@pytest.mark.parametrize("selection", ["all", "0", A])
def test_a_node_without_gpus_in_files_says_how_to_describe_them(tmp_path: Path, selection: str) -> None:
    with pytest.raises(FeatureUnknown) as raised:
        names(selection, registry(tmp_path))
    assert raised.value.message == f"no CDI file in {tmp_path} describes a GPU"
    assert "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml" in str(raised.value.hint)
    write(tmp_path, "nvidia.yaml", "{")
    with pytest.raises(FeatureUnknown) as raised:
        names(selection, registry(tmp_path))
    assert f"{tmp_path}/nvidia.yaml is not used: line " in raised.value.message
    assert raised.value.hint == "hpcctr doctor"


def test_a_conflict_is_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path, "more.json", of_kind("nvidia.com/gpu", [("0", ["nvidia0"]), ("all", ["nvidia0"])]))
    found = registry(tmp_path, nvidia=NVIDIA + ALL)
    for selection in ("0", "all"):
        with pytest.raises(FeatureUnknown, match="is described twice"):
            found.inject(names(selection, found), allowed_hooks=(), caller_gids=())


def test_all_names_of_a_gpu_are_one_gpu(tmp_path: Path) -> None:
    assert gpus(registry(tmp_path, nvidia=NVIDIA + NVIDIA_UUIDS + ALL)) == (
        Gpu(kind="nvidia.com/gpu", names=("0", A), index="0", uuid=A, paths=("/dev/nvidia0",)),
        Gpu(kind="nvidia.com/gpu", names=("1", B), index="1", uuid=B, paths=("/dev/nvidia1",)),
    )


def test_a_gpu_that_has_only_a_uuid_has_the_number_of_its_node(tmp_path: Path) -> None:
    found = gpus(registry(tmp_path, nvidia=[(A, ["nvidia3"]), (B, ["nvidia2"])]))
    assert [(gpu.index, gpu.uuid) for gpu in found] == [("3", A), ("2", B)]


def test_the_nodes_of_a_gpu_are_those_that_jobs_are_given(tmp_path: Path) -> None:
    for vendor, devices in (("amd", AMD), ("intel", INTEL)):
        found = gpus(registry(tmp_path / vendor, **{vendor: devices}))
        assert [gpu.index for gpu in found] == ["0", "1"] and all(gpu.uuid == "" for gpu in found)
        assert [gpu.paths for gpu in found] == [
            ("/dev/dri/renderD128",) if vendor == "amd" else ("/dev/dri/renderD129",),
            ("/dev/dri/renderD129",) if vendor == "amd" else ("/dev/dri/renderD130",),
        ]


def test_instances_of_one_gpu_are_told_apart_by_their_capabilities(tmp_path: Path) -> None:
    def mig(number: int) -> list[str]:
        return ["nvidia0", f"nvidia-caps/nvidia-cap{number}", f"nvidia-caps/nvidia-cap{number + 1}"]

    found = gpus(registry(tmp_path, nvidia=[("0:0", mig(12)), ("0:1", mig(21)), ("MIG-aaaa", mig(12))]))
    assert [(gpu.index, gpu.uuid, gpu.names) for gpu in found] == [
        ("0:0", "MIG-aaaa", ("0:0", "MIG-aaaa")),
        ("0:1", "", ("0:1",)),
    ]
    assert gpu_of(edits("nvidia0")[0], found) == found
    assert gpu_of(edits("nvidia-caps/nvidia-cap21")[0], found) == found[1:]
    assert used(edits(*mig(21)), found) == found[1:]


def test_all_comes_to_the_same_gpus_as_one_by_one(tmp_path: Path) -> None:
    found = gpus(registry(tmp_path, nvidia=NVIDIA + ALL))
    assert used(edits(*ALL[0][1], "nvidiactl", "nvidia-uvm"), found) == found
    assert used(edits("nvidiactl", "nvidia1"), found) == found[1:]
    assert gpu_of(edits("nvidiactl")[0], found) == () and gpu_of(edits("nvidia1")[0], found) == found[1:]


def test_a_device_without_nodes_is_a_gpu_that_cannot_be_probed(tmp_path: Path) -> None:
    write(
        tmp_path, "n.json", a_file(kind="nvidia.com/gpu", devices=[{"name": "0", "containerEdits": {"env": ["A=B"]}}])
    )
    found = registry(tmp_path)
    assert names("all", found) == ("nvidia.com/gpu=0",)
    assert [gpu.paths for gpu in gpus(found)] == [()] and used([], gpus(found)) == ()
