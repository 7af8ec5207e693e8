"""What a CDI file says. The cases are those of the specification's own fixtures, as behaviour."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcctr.host.cdi_text import Wrong
from hpcctr.host.cdi_written import BYTES_MAX, DeviceNode, Document, Hook, Mount, NetDevice, parse, split_name
from tests.support.cdi import a_file


def read(document: object) -> Document:
    return parse(json.dumps(document).encode())


def edits(**words: Any) -> dict[str, Any]:
    return a_file(containerEdits=words)


def wrong(document: object) -> str:
    with pytest.raises(Wrong) as raised:
        read(document)
    assert len(str(raised.value)) < 400
    return str(raised.value)


def test_every_field_is_read() -> None:
    found = read(
        a_file(
            annotations={"a": "b", "n": 1},
            containerEdits={
                "env": ["A=1", "B=x=y", "C="],
                "deviceNodes": [
                    {"path": "/dev/a"},
                    {
                        "path": "/dev/b",
                        "hostPath": "/dev/c",
                        "type": "b",
                        "major": 8,
                        "minor": 1,
                        "fileMode": 432,
                        "permissions": "rw",
                        "uid": 0,
                        "gid": 44,
                    },
                ],
                "netDevices": [{"hostInterfaceName": "eth0", "name": "net0"}],
                "mounts": [{"hostPath": "/h", "containerPath": "/c", "type": "bind", "options": ["ro"]}],
                "hooks": [{"hookName": "prestart", "path": "/bin/h", "args": ["h", "1"], "env": ["K=V"], "timeout": 3}],
                "intelRdt": {"closID": "c", "l3CacheSchema": "L3", "memBwSchema": "MB", "schemata": ["x"]},
                "additionalGids": [0, 5, 5],
            },
        )
    ).edits
    assert found.env == (("A", "1"), ("B", "x=y"), ("C", ""))
    assert found.device_nodes == (
        DeviceNode(path="/dev/a", host_path="", type="", major=0, minor=0, permissions=""),
        DeviceNode(path="/dev/b", host_path="/dev/c", type="b", major=8, minor=1, permissions="rw"),
    )
    assert found.net_devices == (NetDevice(host_interface="eth0", name="net0"),)
    assert found.mounts == (Mount(host_path="/h", container_path="/c", type="bind", options=("ro",)),)
    assert found.hooks == (Hook(stage="prestart", path="/bin/h", args=("h", "1"), env=("K=V",), timeout=3),)
    assert found.has_intel_rdt and found.gids == (0, 5, 5)


_NODE, _MOUNT, _HOOK = (
    {"path": "/dev/a"},
    {"hostPath": "/h", "containerPath": "/c"},
    {"hookName": "prestart", "path": "/h"},
)
_NET = {"hostInterfaceName": "e", "name": "n"}


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"env": ["A=B"]},
        {"deviceNodes": [_NODE]},
        *({"deviceNodes": [_NODE | {"type": kind}]} for kind in "bcup"),
        *({"deviceNodes": [_NODE | {"permissions": words}]} for words in ("", "r", "rwm", "mwr", "none")),
        {"mounts": [_MOUNT]},
        *({"hooks": [_HOOK | {"hookName": stage}]} for stage in ("prestart", "createRuntime", "createContainer")),
        *({"hooks": [_HOOK | {"hookName": stage}]} for stage in ("startContainer", "poststart", "poststop")),
        {"intelRdt": {"closID": "foo"}},
        {"intelRdt": {"closID": "/"}},
        {"intelRdt": {}},
        {"netDevices": [_NET]},
        {"mounts": None, "env": None},
        {"ENV": ["A=B"], "additionalGIDs": [7]},
    ],
)
def test_what_the_specification_has_is_right(words: dict[str, Any]) -> None:
    read(edits(**words))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"env": [""]}, "containerEdits: '' is no variable"),
        ({"env": ["=foo"]}, "'=foo' is no variable"),
        ({"env": ["foo"]}, "'foo' is no variable"),
        ({"env": "A=B"}, "env is no list"),
        ({"env": [["A=B"]]}, "env[0] is no text"),
        ({"env": ["A=\0"]}, "env[0] has a character that cannot be"),
        ({"deviceNodes": [{"path": ""}]}, "containerEdits: deviceNodes[0] has no path"),
        ({"deviceNodes": [_NODE, {}]}, "deviceNodes[1] has no path"),
        ({"deviceNodes": [None]}, "deviceNodes[0] is no mapping"),
        ({"deviceNodes": [_NODE | {"type": "foo"}]}, "type 'foo' is none of b, c, u, p"),
        ({"deviceNodes": [_NODE | {"permissions": "to land"}]}, "permissions 'to land'"),
        ({"deviceNodes": [_NODE | {"major": "1"}]}, "major is no whole number"),
        ({"deviceNodes": [_NODE | {"major": 1.5}]}, "major is no whole number"),
        ({"deviceNodes": [_NODE | {"major": True}]}, "major is no whole number"),
        ({"deviceNodes": [_NODE | {"uid": -1}]}, "uid is not between 0 and 4294967295"),
        ({"mounts": [{"containerPath": "/c"}]}, "mounts[0] lacks hostPath or containerPath"),
        ({"mounts": [{"hostPath": "/h"}]}, "mounts[0] lacks hostPath or containerPath"),
        ({"mounts": [_MOUNT | {"propagation": "x"}]}, "mounts[0]: 'propagation' is no key of CDI"),
        ({"hooks": [{"hookName": "prestart"}]}, "hooks[0] has no path"),
        ({"hooks": [_HOOK | {"hookName": "misCreateRuntime"}]}, "hookName 'misCreateRuntime' is none of"),
        ({"hooks": [_HOOK | {"env": ["=foo"]}]}, "'=foo' is no variable"),
        *(({"intelRdt": {"closID": name}}, "closID") for name in ("/foo", ".", "..", "a\nb", "a" * 4096)),
        ({"intelRdt": {"enableCMT": True}}, "'enableCMT' is no key of CDI"),
        ({"intelRdt": {"enableMonitoring": "yes"}}, "neither true nor false"),
        ({"netDevices": [{"name": "n"}]}, "netDevices[0] lacks hostInterfaceName or name"),
        ({"netDevices": [{"hostInterfaceName": "e"}]}, "netDevices[0] lacks hostInterfaceName or name"),
        ({"netDevices": [_NET, _NET | {"name": "m"}]}, "name an interface twice"),
        ({"netDevices": [_NET, _NET | {"hostInterfaceName": "f"}]}, "name an interface twice"),
        ({"additionalGids": [2**32]}, "additionalGids[0] is not between"),
        ({"env": [], "Env": []}, "is there twice"),
        ({"environment": []}, "'environment' is no key of CDI"),
    ],
)
def test_wrong_edits_are_named(words: dict[str, Any], text: str) -> None:
    assert text in wrong(edits(**words))
    device = a_file(devices=[{"name": "a", "containerEdits": {"env": ["A=B"]} | words}])
    assert text.removeprefix("containerEdits: ") in wrong(device)
    assert "devices[0]" in wrong(device)


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({}, "cdiVersion '' is none of"),
        ([], "the file is no mapping"),
        (None, "the file is no mapping"),
        (a_file(cdiVersion="1.2.0"), "cdiVersion '1.2.0' is none of"),
        (a_file(cdiVersion="vv1.0.0"), "is none of"),
        (a_file(cdiVersion=1.1), "cdiVersion '1.1' is none of"),
        (a_file(kind="vendor.com"), "does not begin with a vendor's name and a slash"),
        (a_file(kind="/device"), "does not begin with a vendor"),
        (a_file(kind="vendor.com/"), "does not end with a class"),
        (a_file(kind="vendor.com/a/b"), "does not end with a class"),
        (a_file(devices=[]), "no devices"),
        (a_file(devices=None), "no devices"),
        (a_file(devices={}), "devices is no list"),
        (a_file(devices=[{"name": "a"}]), "device 'a' has no containerEdits"),
        (a_file(devices=[{"name": "a", "containerEdits": {}}]), "device 'a' has no containerEdits"),
        (a_file(devices=[{"containerEdits": {"env": ["A=B"]}}]), "'' is no name of a device"),
        (a_file(devices=[*a_file()["devices"], *a_file()["devices"]]), "device 'one' is there twice"),
        (a_file(more=1), "the file: 'more' is no key of CDI"),
        (a_file(annotations={"a": {}}), "annotations: a is no text"),
        (a_file(containerEdits=[]), "containerEdits is no mapping"),
    ],
)
def test_wrong_files_are_named(document: object, text: str) -> None:
    assert text in wrong(document)


def test_a_file_of_more_than_four_mebibytes_is_not_read() -> None:
    with pytest.raises(Wrong, match="longer than 4194304 bytes"):
        parse(b" " * (BYTES_MAX + 1))


@pytest.mark.parametrize("name", ["a", "A", "a1", "a.b-c_d", "vendor.com", "v1", "a--b"])
def test_names_of_vendors_and_classes(name: str) -> None:
    assert read(a_file(kind=f"{name}/{name}")).kind == f"{name}/{name}"


@pytest.mark.parametrize("name", ["", "1a", "_a", "a_", "a.", "-a", "a b", "a:b", "ä", "a\n", "a="])
def test_what_is_no_name_of_a_vendor_or_class(name: str) -> None:
    assert "kind" in wrong(a_file(kind=f"{name}/ok"))
    assert "kind" in wrong(a_file(kind=f"ok/{name}"))
    assert split_name(f"{name}/ok=dev") is None and split_name(f"ok/{name}=dev") is None


@pytest.mark.parametrize("name", ["a", "0", "0:1", "GPU-8a56-11", "0000-03-00-0-0x0bd5", "a_b.c", "all"])
def test_names_of_devices(name: str) -> None:
    devices = [{"name": name, "containerEdits": {"env": ["A=B"]}}]
    assert [device.name for device in read(a_file(devices=devices)).devices] == [name]
    assert split_name(f"vendor.com/gpu={name}") == ("vendor.com/gpu", name)


@pytest.mark.parametrize("name", ["", "_a", "a_", ":a", "a:", "a b", "a/b", "a=b", "ä", "a\n"])
def test_what_is_no_name_of_a_device(name: str) -> None:
    assert "no name of a device" in wrong(a_file(devices=[{"name": name, "containerEdits": {"env": ["A=B"]}}]))
    assert split_name(f"vendor.com/gpu={name}") is None


def test_a_number_is_a_name_in_yaml() -> None:
    written = "cdiVersion: 0.5.0\nkind: a/b\ndevices:\n- name: 0\n  containerEdits: {env: [A=B]}\n"
    assert parse(written.encode()).devices[0].name == "0"


_USES: list[tuple[str, dict[str, Any]]] = [
    ("0.3.0", a_file()),
    ("0.3.0", edits(mounts=[_MOUNT], hooks=[_HOOK], deviceNodes=[_NODE])),
    ("0.4.0", edits(mounts=[_MOUNT | {"type": "bind"}])),
    ("0.5.0", edits(deviceNodes=[_NODE | {"hostPath": "/dev/b"}])),
    ("0.5.0", a_file(devices=[{"name": "0", "containerEdits": {"env": ["A=B"]}}])),
    ("0.6.0", a_file(annotations={"a": "b"})),
    ("0.6.0", a_file(devices=[{"name": "a", "annotations": {"a": "b"}, "containerEdits": {"env": ["A=B"]}}])),
    ("0.6.0", a_file(kind="vendor.com/a.b")),
    ("0.7.0", edits(intelRdt={})),
    ("0.7.0", edits(additionalGids=[5])),
    ("1.1.0", edits(netDevices=[_NET])),
    ("1.1.0", edits(intelRdt={"schemata": []})),
    ("1.1.0", edits(intelRdt={"enableMonitoring": True})),
    # What is there and empty uses nothing.
    ("0.3.0", a_file(annotations={}, containerEdits={"netDevices": [], "additionalGids": [], "mounts": None})),
    ("0.7.0", edits(intelRdt={"enableMonitoring": False, "schemata": None})),
]
_KNOWN = ["0.1.0", "0.2.0", "0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0"]


@pytest.mark.parametrize(("least", "document"), _USES)
def test_a_file_declares_the_version_of_all_it_uses(least: str, document: dict[str, Any]) -> None:
    for version in _KNOWN:
        for prefix in ("", "v"):
            declared = document | {"cdiVersion": prefix + version}
            if _KNOWN.index(version) >= _KNOWN.index(least):
                assert read(declared).version == version
            else:
                assert f"that came with {least}" in wrong(declared)


def test_uses_of_a_device_count_as_those_of_the_file() -> None:
    for least, document in _USES:
        if own := document.get("containerEdits"):
            moved = a_file(cdiVersion=least, devices=[{"name": "a", "containerEdits": {"env": ["A=B"]} | own}])
            assert read(moved).devices


_words = st.text(st.characters(codec="utf-8"), max_size=8)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_words, inner, max_size=3),
    max_leaves=6,
)


@given(seed=st.integers(0, 2**32), value=_json)
def test_a_wrong_value_anywhere_raises_nothing_but_wrong(seed: int, value: object) -> None:
    document = json.loads(
        json.dumps(
            edits(env=["A=B"], deviceNodes=[_NODE], mounts=[_MOUNT], hooks=[_HOOK], netDevices=[_NET], intelRdt={})
        )
    )
    chance = random.Random(seed)
    place: Any = document
    while True:
        key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not place[key] or not isinstance(place[key], dict | list) or chance.random() < 0.3:
            place[key] = value
            break
        place = place[key]
    try:
        read(document)
    except Wrong as error:
        assert str(error)
