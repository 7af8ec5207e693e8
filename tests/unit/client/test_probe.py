"""What a caller may open decides what a launch shows; device nodes made here stand in for GPUs."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcctr.client import probe
from hpcctr.errors import FeatureUnusable
from hpcctr.wire import Frame

NODE_NULL = os.makedev(1, 3)
#: No driver has it: opening fails with ENXIO, as it does for a GPU whose driver is not loaded.
NODE_NOBODYS = os.makedev(240, 77)

Node = Callable[[str, bool], str]


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """Makes a character device that can be opened, or one that cannot."""

    def make(name: str, works: bool) -> str:
        path = tmp_path / name
        os.mknod(path, stat.S_IFCHR | 0o666, NODE_NULL if works else NODE_NOBODYS)
        return str(path)

    return make


def _granted(gpus: list[tuple[str, str, str, str]], others: list[tuple[str, str]] = []) -> Frame:  # noqa: B006
    fields = [("device", f"rw {vendor}.com/gpu=all {path}".encode()) for vendor, _, _, path in gpus]
    fields += [("device", f"rw {name} {path}".encode()) for name, path in others]
    fields += [("gpu", f"{vendor} {index} {uuid} {index},{uuid} {path}".encode()) for vendor, index, uuid, path in gpus]
    return Frame("granted", fields)


def _settled(granted: Frame, gpu: str = "", asked: tuple[str, ...] = ()) -> dict[bytes, bytes]:
    devices = probe.devices_of(granted)
    gpus = probe.gpus_of(granted, devices)
    probe.require_usable(devices, gpus, gpu=gpu, asked=asked)
    return probe.visible(gpus, gpu)


def test_all_gpus_are_those_that_can_be_opened(node: Node) -> None:
    granted = _granted([("nvidia", "0", "-", node("g0", False)), ("nvidia", "1", "-", node("g1", True))])
    assert _settled(granted, "all") == {}
    assert [gpu.is_usable for gpu in probe.gpus_of(granted, probe.devices_of(granted))] == [False, True]


def test_a_node_whose_gpus_all_refuse_is_no_node_with_gpus(node: Node) -> None:
    granted = _granted([("nvidia", "0", "-", node("g0", False))])
    with pytest.raises(FeatureUnusable, match="none of the node's GPUs can be opened: .*/g0: no such device"):
        _settled(granted, "all")


def test_a_gpu_the_job_lacks_is_refused_and_those_it_has_are_named(node: Node) -> None:
    granted = _granted([("nvidia", "0", "-", node("g0", False)), ("nvidia", "3", "-", node("g3", True))])
    with pytest.raises(FeatureUnusable, match="GPU 0 cannot be opened") as told:
        _settled(granted, "0")
    assert told.value.hint == "your job has: --gpu=3"


def test_a_chosen_gpu_is_named_by_its_place_among_those_the_process_has(node: Node) -> None:
    gpus = [("nvidia", str(n), "-", node(f"g{n}", n != 0)) for n in (0, 1, 2, 10)]
    variables = _settled(_granted(gpus), "2,10")
    assert variables == {b"CUDA_VISIBLE_DEVICES": b"1,2", b"CUDA_DEVICE_ORDER": b"PCI_BUS_ID"}


def test_a_chosen_gpu_with_a_uuid_is_named_by_it(node: Node) -> None:
    gpus = [("nvidia", "0", "GPU-a", node("g0", True)), ("nvidia", "1", "GPU-b", node("g1", True))]
    assert _settled(_granted(gpus), "1") == {b"CUDA_VISIBLE_DEVICES": b"GPU-b"}
    assert _settled(_granted(gpus), "GPU-a") == {b"CUDA_VISIBLE_DEVICES": b"GPU-a"}


def test_each_vendor_is_told_in_its_own_variable(node: Node) -> None:
    gpus = [("amd", "0", "-", node("a0", True)), ("amd", "1", "-", node("a1", True))]
    gpus += [("intel", "0", "U", node("i0", True)), ("intel", "1", "V", node("i1", True))]
    assert _settled(_granted(gpus), "1") == {b"ROCR_VISIBLE_DEVICES": b"1", b"ZE_AFFINITY_MASK": b"1"}


def test_a_device_asked_by_name_that_cannot_be_opened_is_refused(node: Node) -> None:
    granted = _granted([], [("example.com/net=0", node("good", True)), ("example.com/net=1", node("bad", False))])
    assert _settled(granted, asked=("example.com/net=0",)) == {}
    with pytest.raises(FeatureUnusable, match=r"--device example.com/net=1: it cannot be opened: .*/bad"):
        _settled(granted, asked=("example.com/net=1",))


def test_a_device_of_a_profile_that_cannot_be_opened_is_no_reason_to_refuse(node: Node) -> None:
    assert _settled(_granted([], [("ib", node("umad0", False))])) == {}


def test_display_nodes_do_not_decide_whether_a_gpu_is_the_jobs() -> None:
    card, render, own = (
        probe.Device("x", path, error)
        for path, error in (("/dev/dri/card0", 13), ("/dev/dri/renderD128", 0), ("/d", 1))
    )
    gpu = probe.Gpu("amd", "0", "", ["card0"])
    gpu.nodes = [card, render]
    assert gpu.is_usable
    gpu.nodes = [card, render, own]
    assert not gpu.is_usable


def test_limits_below_a_features_need_are_told_and_others_are_not() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, hard))
    try:
        told = probe.lacking(Frame("granted", [("need", b"memlock -1 ib"), ("need", b"memlock 65536 ucx")]))
        assert [text.partition(":")[0] for text in told] == ["ib"]
        assert "65536 bytes" in told[0]
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))
    has = os.statvfs("/dev/shm")
    size = has.f_blocks * has.f_frsize
    assert probe.lacking(Frame("granted", [("need", b"shm %d x" % size)])) == []
    assert f"has {size} bytes" in probe.lacking(Frame("granted", [("need", b"shm %d x" % (size + 1))]))[0]
