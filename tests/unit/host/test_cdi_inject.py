"""Devices as HostEdits. Device nodes here have the numbers of /dev/null and on: they stand in for GPUs."""

from __future__ import annotations

import grp
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from hpcctr.errors import FeatureUnusable
from hpcctr.host.cdi_inject import CdiFile, Described, Injection
from hpcctr.host.cdi_written import parse
from hpcctr.host.edits import MOUNTS_MAX, DeviceEdit, EnvEdit, HostEdits
from tests.support.cdi import a_file, stand_ins

FILE = "/etc/cdi/vendor.json"


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[str]]:
    with stand_ins(3) as made:
        yield made


def described(document: dict[str, Any], path: str = FILE) -> list[Described]:
    file = CdiFile(path=path, priority=0, document=parse(json.dumps(document).encode()))
    return [Described(file=file, device=device) for device in file.document.devices]


def inject(several: Sequence[Described], *, gids: Sequence[int] = ()) -> HostEdits:
    injection = Injection(allowed_hooks=(), caller_gids=gids, root_owned=False)
    injection.add(several)
    return injection.edits()


def device(name: str = "one", **edits: Any) -> dict[str, Any]:
    return {"name": name, "containerEdits": edits}


def of_devices(*devices: dict[str, Any], **edits: Any) -> HostEdits:
    return inject(described(a_file(devices=list(devices), containerEdits=edits)))


def refusal(**edits: Any) -> FeatureUnusable:
    with pytest.raises(FeatureUnusable) as raised:
        of_devices(device(env=["A=B"], **edits))
    assert FILE in raised.value.message and raised.value.hint
    return raised.value


def test_edits_of_a_file_come_once_before_those_of_its_first_device() -> None:
    first = described(
        a_file(devices=[device("a", env=["X=a"]), device("b", env=["X=b"])], containerEdits={"env": ["X=file"]})
    )
    other = described(
        a_file(kind="acme.com/x", devices=[device("c", env=["X=c"])], containerEdits={"env": ["X=other"]}), "/o.json"
    )
    assert [edit.value for edit in inject([first[0]]).env] == ["a"]
    assert [edit.value for edit in inject([first[0], other[0]]).env] == ["c"]
    assert [edit.value for edit in inject([other[0], first[1]]).env] == ["b"]
    # Were the file's own edits to come again, the last device would not have the last word on what it does not say.
    later = described(
        a_file(devices=[device("a", env=["X=a"]), device("b", env=["Y=b"])], containerEdits={"env": ["X=file"]})
    )
    assert [(edit.name, edit.value) for edit in inject(later).env] == [("X", "a"), ("Y", "b")]


def test_a_variable_keeps_its_place_and_takes_the_last_value() -> None:
    found = of_devices(device(env=["B=3", "C=4", "C=5"]), env=["A=1", "B=2"])
    assert [(edit.name, edit.value) for edit in found.env] == [("A", "1"), ("B", "3"), ("C", "5")]
    assert found.env[0] == EnvEdit(name="A", value="1", origin=FILE)
    assert found.env[1].origin == f"{FILE} (vendor.com/device=one)"


@pytest.mark.root
def test_a_node_is_filled_from_the_host(nodes: list[str]) -> None:
    found = of_devices(device(deviceNodes=[{"path": nodes[1]}]), deviceNodes=[{"path": nodes[0], "hostPath": nodes[0]}])
    assert found.devices == (
        DeviceEdit(
            path=nodes[0], kind="c", major=1, minor=3, permissions="rwm", device="vendor.com/device", origin=FILE
        ),
        DeviceEdit(
            path=nodes[1],
            kind="c",
            major=1,
            minor=4,
            permissions="rwm",
            device="vendor.com/device=one",
            origin=f"{FILE} (vendor.com/device=one)",
        ),
    )


@pytest.mark.root
@pytest.mark.parametrize(
    ("words", "permissions"),
    [
        ({}, "rwm"),
        ({"permissions": "r"}, "r"),
        ({"permissions": "none"}, ""),
        ({"type": "c"}, "rwm"),
        ({"type": "u"}, "rwm"),
        ({"type": "c", "major": 1, "minor": 3, "fileMode": 0o600, "uid": 7, "gid": 7}, "rwm"),
        # A minor number alone, or numbers without a type, do not count as given.
        ({"minor": 9}, "rwm"),
        ({"major": 9, "minor": 9}, "rwm"),
    ],
)
def test_what_a_node_says_of_itself_is_compared(nodes: list[str], words: dict[str, Any], permissions: str) -> None:
    (found,) = of_devices(device(deviceNodes=[{"path": nodes[0]} | words])).devices
    assert (found.kind, found.major, found.minor, found.permissions) == ("c", 1, 3, permissions)


@pytest.mark.root
def test_a_node_replaces_an_earlier_one_of_its_path(nodes: list[str]) -> None:
    found = of_devices(
        device("a", deviceNodes=[{"path": nodes[0]}, {"path": nodes[1]}]),
        device("b", deviceNodes=[{"path": nodes[0], "permissions": "r"}]),
    )
    assert [(edit.path, edit.permissions) for edit in found.devices] == [(nodes[1], "rwm"), (nodes[0], "r")]


@pytest.mark.root
def test_a_node_that_is_not_what_the_file_says_is_out_of_date(nodes: list[str]) -> None:
    for words, text in (
        ({"path": "/dev/hpcctr-none"}, "it names /dev/hpcctr-none, which is not there"),
        ({"path": "/dev/fd"}, "it names /dev/fd, which is no device node"),
        ({"path": "/dev/stdin"}, "it names /dev/stdin, which is no device node"),
        ({"path": nodes[0], "type": "b", "major": 8}, f"{nodes[0]} is of type c and not b"),
        ({"path": nodes[0], "type": "p"}, f"{nodes[0]} is of type c and not p"),
        ({"path": nodes[0], "type": "c", "major": 1, "minor": 7}, f"{nodes[0]} is device 1:3, and the file has 1:7"),
        (
            {"path": nodes[0], "type": "c", "major": 235, "minor": 3},
            f"{nodes[0]} is device 1:3, and the file has 235:3",
        ),
    ):
        error = refusal(deviceNodes=[words])
        assert error.message == f"{FILE} is out of date: {text}"
        assert error.hint == f"have vendor.com's tool write {FILE} again"


@pytest.mark.root
def test_a_node_has_the_place_it_has_on_the_host(nodes: list[str]) -> None:
    assert "devices inside are those of the node's /dev" in refusal(deviceNodes=[{"path": "/vendor0"}]).message
    error = refusal(deviceNodes=[{"path": "/dev/vendor0", "hostPath": nodes[0]}])
    assert f"{nodes[0]} cannot be given as /dev/vendor0" in error.message
    assert "cannot be given as" in refusal(deviceNodes=[{"path": nodes[1], "hostPath": nodes[0]}]).message
    for path in ("dev/null", "/dev/../dev/null", "/dev//null", "/dev/null/"):
        assert "is not a plain absolute path" in refusal(deviceNodes=[{"path": path}]).message


@pytest.mark.root
def test_a_node_of_a_drivers_own_root_is_the_one_in_dev(tmp_path: Path) -> None:
    os.mknod(tmp_path / "null", 0o20600, os.makedev(1, 3))
    (found,) = of_devices(device(deviceNodes=[{"path": "/dev/null", "hostPath": str(tmp_path / "null")}])).devices
    assert (found.path, found.major, found.minor) == ("/dev/null", 1, 3)


@pytest.mark.root
@pytest.mark.parametrize("path", ["/dev/fuse", "/dev/kvm"])
def test_real_devices_are_found_with_their_numbers(path: str) -> None:
    if not os.path.exists(path):
        pytest.skip(f"this machine has no {path}")
    (found,) = of_devices(device(deviceNodes=[{"path": path}])).devices
    assert (found.kind, found.major, found.minor) == ("c", 10, {"/dev/fuse": 229, "/dev/kvm": 232}[path])


def test_mounts_are_made_from_the_outside_in_and_the_last_at_a_place_counts(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / name).mkdir()

    def mount(name: str, target: str) -> dict[str, Any]:
        return {"hostPath": str(tmp_path / name), "containerPath": target}

    found = of_devices(
        device(mounts=[mount("c", "/x"), mount("d", "/usr/lib/a/b"), mount("d", "/usr/lib/")]),
        mounts=[mount("a", "/usr/lib/a"), mount("a", "/z/y"), mount("b", "/usr/lib")],
    )
    assert [(edit.target, edit.source[-1]) for edit in found.mounts] == [
        ("/x", "c"),
        ("/z/y", "a"),
        ("/usr/lib", "d"),
        ("/usr/lib/a", "a"),
        ("/usr/lib/a/b", "d"),
    ]


def test_more_mounts_than_a_launch_may_have_are_refused(tmp_path: Path) -> None:
    mounts = [{"hostPath": str(tmp_path), "containerPath": f"/m/{number}"} for number in range(MOUNTS_MAX + 1)]
    with pytest.raises(FeatureUnusable, match="513 mounts together, 512 are possible"):
        of_devices(device(mounts=mounts))
    assert len(of_devices(device(mounts=mounts[1:])).mounts) == MOUNTS_MAX


def test_nobody_gains_a_group() -> None:
    one = described(
        a_file(devices=[device(additionalGids=[0, 5, 5, 61101, 4294967295])], containerEdits={"additionalGids": [5]})
    )
    tty = grp.getgrgid(5).gr_name
    assert inject(one, gids=[5, 61101, 4294967295]).warnings == ()
    assert inject(one).warnings == tuple(
        f"vendor.com/device=one wants group {group}, which you are not in; nobody gains a group"
        for group in (f"{tty} (5)", "61101", "4294967295")
    )


def test_programs_have_the_nodes_own_network() -> None:
    assert of_devices(device(netDevices=[{"hostInterfaceName": "lo", "name": "lo"}])) == HostEdits()
    error = refusal(netDevices=[{"hostInterfaceName": "lo", "name": "net0"}])
    assert "renames interface lo to net0: programs have the node's own network" in error.message
    error = refusal(netDevices=[{"hostInterfaceName": "hpcctr-none", "name": "hpcctr-none"}])
    assert "this node has no interface hpcctr-none" in error.message


def test_programs_stay_in_their_jobs_resctrl_group() -> None:
    assert "wants a resctrl group (intelRdt)" in refusal(intelRdt={"closID": "x"}).message


def test_warnings_and_links_are_told_once(tmp_path: Path) -> None:
    mount = {"hostPath": str(tmp_path / "none"), "containerPath": "/run/s", "options": ["noexec"]}
    hook = {
        "hookName": "createContainer",
        "path": "/usr/bin/nvidia-cdi-hook",
        "args": ["nvidia-cdi-hook", "create-symlinks", "--link", "a::/usr/lib/b"],
    }
    found = of_devices(device("a", mounts=[mount], hooks=[hook]), device("b", mounts=[mount], hooks=[hook]))
    assert len(found.warnings) == 1 and "left out" in found.warnings[0] and not found.mounts
    assert [(link.path, link.target) for link in found.links] == [("/usr/lib/b", "a")]
