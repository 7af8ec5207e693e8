"""The registry: directories, precedence, conflicts, errors."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpcctr.errors import FeatureUnknown, FeatureUnusable, HpcctrError
from hpcctr.host import cdi, cdi_written
from hpcctr.host.cdi import FILES_MAX, FileError, Registry
from hpcctr.host.cdi_written import BYTES_MAX
from tests.support.cdi import a_file, amd_like, nvidia_libraries, nvidia_like, stand_ins, write
from tests.support.scratch import scratch

pytestmark = pytest.mark.root


@pytest.fixture
def place() -> Iterator[Path]:
    with scratch("cdi") as made:
        yield made


def device(name: str, value: str = "1") -> dict[str, Any]:
    return {"name": name, "containerEdits": {"env": [f"FROM={value}"]}}


def load(*directories: Path, root_owned: bool = True) -> Registry:
    return Registry.load([str(directory) for directory in directories], root_owned=root_owned)


def value(registry: Registry, name: str) -> str:
    return registry.inject([name], allowed_hooks=(), caller_gids=()).env[0].value


def test_json_and_yaml_of_the_directories_are_read_and_nothing_below_them(place: Path) -> None:
    write(place, "a.json", a_file(devices=[device("a")]))
    write(
        place,
        "b.yaml",
        "cdiVersion: 0.5.0\nkind: vendor.com/device\ndevices:\n- name: 0\n  containerEdits: {env: [A=B]}\n",
    )
    for name in ("c.yml", "c.json.bak", "c.toml", "json", "c.JSON", "spec.1.tmp"):
        write(place, name, "not one of them")
    write(place / "below", "d.json", a_file(devices=[device("d")]))
    (place / "dir.json").mkdir()
    registry = load(place, place / "none")
    assert registry.names() == ("vendor.com/device=0", "vendor.com/device=a") and registry.errors == ()
    assert registry.by_file() == {
        str(place / "a.json"): ("vendor.com/device=a",),
        str(place / "b.yaml"): ("vendor.com/device=0",),
    }


def test_names_are_in_order_of_number(place: Path) -> None:
    write(place, "a.json", a_file(devices=[device(name) for name in ("10", "9", "all", "card10", "card9")]))
    assert [name.partition("=")[2] for name in load(place).names()] == ["9", "10", "all", "card9", "card10"]


def test_a_later_directory_replaces_devices_of_an_earlier_one_by_name(place: Path) -> None:
    write(place / "etc", "a.json", a_file(devices=[device("one", "etc"), device("two", "etc")]))
    write(place / "run", "z.json", a_file(devices=[device("one", "run")]))
    registry = load(place / "etc", place / "run")
    assert (value(registry, "vendor.com/device=one"), value(registry, "vendor.com/device=two")) == ("run", "etc")
    assert value(load(place / "run", place / "etc"), "vendor.com/device=one") == "etc"
    assert registry.conflicts == {} and registry.errors == ()


def test_a_device_in_two_files_of_a_directory_is_unusable_and_the_others_are_not(place: Path) -> None:
    paths = [write(place, f"{name}.json", a_file(devices=[device("one"), device(name)])) for name in ("a", "b", "c")]
    registry = load(place)
    assert registry.names() == ("vendor.com/device=a", "vendor.com/device=b", "vendor.com/device=c")
    assert registry.conflicts == {"vendor.com/device=one": tuple(map(str, paths))}
    assert [error.path for error in registry.errors] == list(map(str, paths))
    with pytest.raises(FeatureUnknown) as raised:
        registry.inject(["vendor.com/device=a", "vendor.com/device=one"], allowed_hooks=(), caller_gids=())
    assert raised.value.message == (
        f"device vendor.com/device=one is described twice, by {paths[0]} and {paths[1]} and {paths[2]}"
    )


def test_a_later_directory_settles_what_an_earlier_one_has_twice(place: Path) -> None:
    for name in ("a.json", "b.json"):
        write(place / "etc", name, a_file(devices=[device("one", "etc")]))
    write(place / "run", "a.json", a_file(devices=[device("one", "run")]))
    assert value(load(place / "etc", place / "run"), "vendor.com/device=one") == "run"


def test_the_same_name_in_another_class_is_another_device(place: Path) -> None:
    write(place, "a.json", a_file(devices=[device("one", "a")]))
    write(place, "b.json", a_file(kind="vendor.com/other", devices=[device("one", "b")]))
    registry = load(place)
    assert (value(registry, "vendor.com/device=one"), value(registry, "vendor.com/other=one")) == ("a", "b")


def test_a_broken_file_is_recorded_and_the_others_stay_usable(place: Path) -> None:
    write(place, "a.json", a_file())
    write(place, "b.json", "{")
    write(place, "c.yaml", "kind: vendor.com/device\nkind: vendor.com/device\n")
    write(place, "d.json", a_file(cdiVersion="0.3.0", annotations={"a": "b"}))
    registry = load(place)
    assert registry.names() == ("vendor.com/device=one",)
    assert [Path(error.path).name for error in registry.errors] == ["b.json", "c.yaml", "d.json"]
    assert registry.errors[1].reason == "line 2: 'kind' is there twice"
    assert registry.errors[2].reason == "cdiVersion 0.3.0 has no annotations: that came with 0.6.0"


def test_a_device_nobody_describes_is_an_error_that_says_what_there_is(place: Path) -> None:
    with pytest.raises(FeatureUnknown) as raised:
        load(place).inject(["nvidia.com/gpu=0"], allowed_hooks=(), caller_gids=())
    assert raised.value.message == "device nvidia.com/gpu=0: no CDI file of this node describes it"
    assert "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml" in str(raised.value.hint)
    write(place, "a.json", a_file(devices=[device("one"), device("two")]))
    write(place, "b.json", a_file(kind="acme.com/x", devices=[device("three")]))
    registry = load(place)
    for name, known in (("vendor.com/device=3", "one, vendor.com/device=two"), ("x.org/y=3", "acme.com/x=three, ")):
        with pytest.raises(FeatureUnknown) as raised:
            registry.inject(["vendor.com/device=one", name], allowed_hooks=(), caller_gids=())
        assert name in raised.value.message and known in str(raised.value.hint)
    write(place, "c.json", "{")
    with pytest.raises(FeatureUnknown, match=rf"describes it; {re.escape(str(place))}/c.json is not used: "):
        load(place).inject(["x.org/y=3"], allowed_hooks=(), caller_gids=())


@pytest.mark.parametrize(
    "name", ["", "gpu", "gpu=0", "vendor.com/gpu", "vendor.com/gpu=", "=0", "/dev/null", "a/b=c/d", "a/b=\ud800"]
)
def test_what_is_no_qualified_name_is_said(place: Path, name: str) -> None:
    with pytest.raises(FeatureUnknown, match="is no name of CDI"):
        load(place).inject([name], allowed_hooks=(), caller_gids=())


def test_asking_for_more_devices_than_a_launch_may_have_is_refused(place: Path) -> None:
    with pytest.raises(FeatureUnknown, match="200 devices asked for, 128 are possible"):
        load(place).inject([f"a/b={number}" for number in range(200)], allowed_hooks=(), caller_gids=())


def test_a_device_asked_for_twice_is_one(place: Path) -> None:
    write(place, "a.json", a_file())
    registry = load(place)
    once, twice = (
        registry.inject(["vendor.com/device=one"] * times, allowed_hooks=(), caller_gids=()) for times in (1, 2)
    )
    assert once == twice


def test_what_was_parsed_is_kept_by_content_and_every_edit_is_seen(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[bytes] = []
    real = cdi_written.parse

    def counting(raw: bytes) -> cdi_written.Document:
        parsed.append(raw)
        return real(raw)

    monkeypatch.setattr(cdi_written, "parse", counting)
    path = write(place, "a.json", a_file(devices=[device("kept", "1")]))
    broken = write(place, "b.json", "{kept}")
    times = path.stat().st_mtime_ns
    for _ in range(3):
        assert value(load(place), "vendor.com/device=kept") == "1"
    assert len(parsed) == 2
    path.write_text(path.read_text().replace("FROM=1", "FROM=2"))
    os.utime(path, ns=(times, times))
    assert value(load(place), "vendor.com/device=kept") == "2" and len(parsed) == 3
    broken.unlink()
    assert load(place).errors == ()


def test_few_parsed_files_are_kept(place: Path) -> None:
    for number in range(cdi._KEPT_MAX + 5):
        write(place, f"{number}.json", a_file(devices=[device(f"kept{number}")]))
    assert len(load(place).names()) == cdi._KEPT_MAX + 5 and len(cdi._kept) <= cdi._KEPT_MAX


def test_loads_at_once_agree(place: Path) -> None:
    for number in range(20):
        write(place, f"{number}.json", a_file(devices=[device(f"once{number}")]))
    found: list[Registry] = []
    threads = [threading.Thread(target=lambda: found.append(load(place))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(one == found[0] and len(one.names()) == 20 for one in found)


def test_more_files_than_a_directory_may_have_are_none(place: Path) -> None:
    for number in range(FILES_MAX + 1):
        write(place, f"{number}.json", "{}")
    assert load(place).errors == (FileError(path=str(place), reason="201 files, 200 are possible"),)


def test_a_file_that_is_too_long_is_not_read(place: Path) -> None:
    write(place, "a.json", "{}" + " " * BYTES_MAX)
    assert [error.reason for error in load(place).errors] == [f"longer than {BYTES_MAX} bytes"]


def test_links_of_roots_are_followed(place: Path) -> None:
    write(place / "real", "nvidia.yaml", a_file())
    (place / "etc").mkdir()
    (place / "etc/a.json").symlink_to("../real/nvidia.yaml")
    (place / "cdi").symlink_to("etc")
    assert load(place / "cdi").names() == ("vendor.com/device=one",)
    (place / "etc/b.json").symlink_to("nowhere")
    assert [error.reason for error in load(place / "cdi").errors] == ["no such file or directory"]


@pytest.mark.parametrize("what", ["uid", "mode", "fifo", "link", "sticky", "directory", "way"])
def test_only_what_nobody_but_root_can_write_is_believed(place: Path, what: str) -> None:
    path = write(place / "cdi", "a.json", a_file())
    assert load(place / "cdi").errors == ()
    if what == "mode":
        path.chmod(0o664)
    elif what == "fifo":
        path.unlink()
        os.mkfifo(path)
    elif what in ("link", "sticky"):
        path.rename(place / "real.json")
        path.symlink_to("../real.json")
        if what == "link":
            os.lchown(path, 61100, 61100)
        else:
            place.chmod(0o1777)
    else:
        os.chown({"uid": path, "directory": place / "cdi", "way": place}[what], 61100, 61100)
    registry = load(place / "cdi")
    (error,) = registry.errors
    assert registry.names() == () and error.path == str(place / "cdi" if what in ("directory", "way") else path)
    said = {"fifo": "not a regular file", "link": "not root's alone", "sticky": "whose directory others can write"}
    assert said.get(what, "only root can write") in error.reason


def test_a_path_that_is_no_directory_is_recorded(place: Path) -> None:
    path = write(place, "a.json", a_file())
    assert load(path, root_owned=False).errors == (FileError(path=str(path), reason="Not a directory"),)


def test_files_of_anybody_can_be_tried_out(place: Path) -> None:
    path = write(place, "a.json", a_file())
    os.chown(path, 61100, 61100)
    place.chmod(0o777)
    assert load(place, root_owned=False).names() == ("vendor.com/device=one",)
    assert load(place).names() == ()


def test_a_file_of_nvidias_shape_comes_to_its_edits(place: Path) -> None:
    libraries = nvidia_libraries(place / "lib")
    with stand_ins(4) as nodes:
        write(
            place, "nvidia.yaml", nvidia_like(libraries, gpus=[("0", nodes[:1]), ("1", nodes[1:2])], common=nodes[2:])
        )
        registry = load(place)
        assert registry.names() == ("nvidia.com/gpu=0", "nvidia.com/gpu=1", "nvidia.com/gpu=all")
        found = registry.inject(["nvidia.com/gpu=1"], allowed_hooks=(), caller_gids=())
        every = registry.inject(["nvidia.com/gpu=all"], allowed_hooks=(), caller_gids=())
    assert [edit.path for edit in found.devices] == [nodes[2], nodes[3], nodes[1]]
    assert [edit.path for edit in every.devices] == [nodes[2], nodes[3], nodes[0], nodes[1]]
    assert {edit.name: edit.value for edit in found.env} == {
        "NVIDIA_CTK_LIBCUDA_DIR": "/usr/lib/x86_64-linux-gnu",
        "NVIDIA_VISIBLE_DEVICES": "void",
    }
    assert [(edit.source, edit.target, edit.is_read_only) for edit in found.mounts] == [
        (f"{libraries}/{name}.550.54.15", f"/usr/lib/x86_64-linux-gnu/{name}.550.54.15", True)
        for name in ("libcuda.so", "libnvidia-ml.so")
    ]
    assert [(edit.path, edit.target) for edit in found.links] == [
        ("/usr/lib/x86_64-linux-gnu/libcuda.so", "libcuda.so.1")
    ]
    assert found.library_folders == ("/usr/lib/x86_64-linux-gnu",)
    assert found.hooks == () == found.warnings and found.files == ()


def test_a_file_of_amds_shape_comes_to_its_device_nodes(place: Path) -> None:
    with stand_ins(3) as nodes:
        write(place, "amd.json", amd_like([nodes[:1], nodes[1:2]], nodes[2:]))
        found = load(place).inject(["amd.com/gpu=all"], allowed_hooks=(), caller_gids=[44])
    assert [(edit.path, edit.minor) for edit in found.devices] == [(nodes[0], 3), (nodes[1], 4), (nodes[2], 5)]
    assert found.mounts == () == found.env


def test_a_doctor_is_told_every_problem_once(place: Path) -> None:
    libraries = nvidia_libraries(place / "lib", "550.54.15")
    nvidia = write(place, "nvidia.yaml", nvidia_like(libraries))
    write(place, "broken.json", "{")
    hook = {"hookName": "createRuntime", "path": "/opt/hook"}
    wants = {"name": "h", "containerEdits": {"hooks": [hook]}}
    gone = {"name": "g", "containerEdits": {"deviceNodes": [{"path": "/dev/hpcctr-none"}]}}
    write(place, "acme.json", a_file(kind="acme.com/x", devices=[wants, gone, device("fine")]))
    registry = load(place)
    assert [(Path(found.path).name, found.device) for found in registry.problems()] == [
        ("broken.json", ""),
        ("acme.json", "acme.com/x=g"),
        ("acme.json", "acme.com/x=h"),
    ]
    nvidia_libraries(libraries, "570.86.10")
    (out_of_date,) = (found for found in registry.problems() if found.path == str(nvidia))
    assert "is of driver 570.86.10" in out_of_date.text and out_of_date.device == ""
    assert out_of_date.hint == f"nvidia-ctk cdi generate --output={nvidia}"


_names = st.sampled_from(["0", "1", "all", "a.b"])
_kinds = st.sampled_from(["nvidia.com/gpu", "vendor.com/device"])
_documents = st.builds(
    lambda kind, names: a_file(kind=kind, devices=[device(name) for name in names]),
    _kinds,
    st.lists(_names, max_size=3),
)
_set_up = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(documents=st.lists(st.tuples(st.booleans(), _documents), max_size=5), data=st.data())
@_set_up
def test_which_device_counts_does_not_depend_on_the_files_names(
    tmp_path: Path, documents: list[tuple[bool, dict[str, Any]]], data: st.DataObject
) -> None:
    names = [f"{index}.json" for index in range(len(documents))]
    found = []
    for round_, order in enumerate((names, data.draw(st.permutations(names)))):
        for directory in ("etc", "run"):
            (tmp_path / f"{round_}" / directory).mkdir(parents=True, exist_ok=True)
            for old in (tmp_path / f"{round_}" / directory).iterdir():
                old.unlink()
        for name, (is_later, document) in zip(order, documents, strict=True):
            write(tmp_path / f"{round_}" / ("run" if is_later else "etc"), name, document)
        registry = load(tmp_path / f"{round_}/etc", tmp_path / f"{round_}/run", root_owned=False)
        found.append((registry.names(), set(registry.conflicts), len(registry.errors)))
        for name in registry.names():
            where = registry.devices[name].file
            higher = [
                document for is_later, document in documents if is_later and document["kind"] == name.split("=")[0]
            ]
            is_in_later = any(
                entry["name"] == name.split("=")[1] for document in higher for entry in document["devices"]
            )
            assert (where.priority == 1) is (is_in_later and _is_right(higher, name))
    assert found[0] == found[1]


def _is_right(documents: list[dict[str, Any]], name: str) -> bool:
    """Whether one of the documents has the device and no other twice."""
    good = [[entry["name"] for entry in document["devices"]] for document in documents]
    return any(name.split("=")[1] in names for names in good if len(set(names)) == len(names))


@given(
    raw=st.binary(max_size=200)
    | st.recursive(
        st.text(max_size=5),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(
                    ["cdiVersion", "kind", "devices", "name", "containerEdits", "env", "mounts", "hostPath", "path"]
                ),
                inner,
            )
        ),
        max_leaves=8,
    ).map(lambda document: json.dumps(document).encode())
)
@_set_up
def test_a_file_of_any_content_raises_nothing_that_is_not_ours(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.yaml").write_bytes(raw)
    registry = load(tmp_path, root_owned=False)
    assert registry.errors or registry.names()
    for name in registry.names():
        try:
            registry.inject([name], allowed_hooks=(), caller_gids=())
        except FeatureUnusable as error:
            assert isinstance(error, HpcctrError) and str(tmp_path) in error.message
    registry.problems()
