"""Grant in, document out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcctr.host.edits import EnvEdit, HostEdits
from hpcctr.image.record import ImageConfig, Platform
from hpcctr.policy.grant import Grant
from hpcctr.request import Target
from hpcctr.spec.build import build_spec
from tests.support.values import a_caller, a_stored_image, the_document

HOSTILE = ImageConfig(
    env=("LD_PRELOAD=/evil.so",),
    entrypoint=("/evil",),
    cmd=("/evil",),
    working_dir="/proc/self/fd/8",
    user="0:0",
    labels={"containerd.io/restart.loguri": "binary:///evil", "io.containerd.runc.v2.group": "others"},
)


def _grant(**changes: object) -> Grant:
    values: dict[str, object] = {
        "caller": a_caller(uid=1000, gid=100, groups=(100, 200)),
        "image": a_stored_image(),
        "edits": HostEdits(),
        "targets": (Target("d", b"/home/u"),),
        "rule": "built in",
    }
    return Grant(**{**values, **changes})  # type: ignore[arg-type]


def test_the_document_is_this_and_nothing_more() -> None:
    only = the_document(uid=1000, gid=100, gids=[100, 200], container_id="0123-ab")
    assert build_spec(_grant(), container_id="0123-ab") == only


@pytest.mark.parametrize(
    "changes",
    [
        {"image": a_stored_image(config=HOSTILE)},
        {"targets": (Target("d", b"/x,upperdir=/etc"), Target("f", b"/etc/passwd"))},
        {"edits": HostEdits(env=(EnvEdit(name="A", value="evil", origin="site"),))},
    ],
)
def test_neither_image_nor_targets_nor_environment_reach_the_document(changes: dict[str, object]) -> None:
    assert build_spec(_grant(**changes), container_id="c") == build_spec(_grant(), container_id="c")


def test_the_document_has_no_hooks_annotations_or_seccomp() -> None:
    text = json.dumps(build_spec(_grant(), container_id="c"))
    assert not any(word in text for word in ("hooks", "annotations", "seccomp", "binary:"))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key and every plain value of a document, with the place it is at; positions in lists are one place."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{path}.{key} (key)", key
            yield from _leaves(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, f"{path}[]")
    else:
        yield path, value


#: Where a grant is to be seen in the document: who the caller is. The cgroup is named after the engine's own random id.
PLACES = {".process.user.uid", ".process.user.gid", ".process.user.additionalGids[]"}
ids = st.integers(1, 2**31 - 1)
words = st.lists(st.text(max_size=20), max_size=4).map(tuple)
configs = st.builds(
    ImageConfig,
    env=words,
    entrypoint=words,
    cmd=words,
    working_dir=st.text(max_size=20),
    user=st.one_of(st.text(max_size=20), ids.map(str)),
    labels=st.dictionaries(st.sampled_from([*HOSTILE.labels, "run.oci.handler", "x"]), st.text(max_size=20)),
)
names = st.binary(min_size=1, max_size=20).filter(lambda name: not {*b"/\0"} & {*name} and name not in (b".", b".."))
targets = st.lists(st.builds(Target, st.sampled_from("df"), names.map(lambda name: b"/" + name)), max_size=5).map(tuple)
edits = st.builds(EnvEdit, name=st.text(max_size=20), value=st.text(max_size=20), origin=st.text(max_size=20))


@given(
    caller=st.tuples(ids, ids, st.lists(ids, max_size=5).map(tuple)),
    image=st.tuples(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40), configs, st.binary(max_size=20)),
    targets=targets,
    edits=st.lists(edits, max_size=3).map(tuple),
    rule=st.text(max_size=20),
)
def test_whatever_is_granted_only_the_callers_numbers_are_in_the_document(
    caller: tuple[int, int, tuple[int, ...]],
    image: tuple[str, str, str, ImageConfig, bytes],
    targets: tuple[Target, ...],
    edits: tuple[EnvEdit, ...],
    rule: str,
) -> None:
    uid, gid, groups = caller
    name, path, source, config, passwd = image
    stored = a_stored_image(name=name, config=config)
    record = msgspec.structs.replace(
        stored.record, source=source, passwd=passwd, group=passwd, platform=Platform(os=name, architecture=path)
    )
    hostile = msgspec.structs.replace(stored, record=record, path=path, because=source, is_private=True)
    grant = _grant(
        caller=a_caller(uid=uid, gid=gid, groups=groups),
        image=hostile,
        targets=targets,
        edits=HostEdits(env=edits),
        rule=rule,
    )
    made, plain = _in_places(grant), _in_places(_grant(caller=a_caller(uid=1, gid=1)))
    numbers = {place: made.pop(place) for place in PLACES}
    assert numbers == {
        ".process.user.uid": [uid],
        ".process.user.gid": [gid],
        ".process.user.additionalGids[]": sorted({gid, *groups}),
    }
    assert made == {place: values for place, values in plain.items() if place not in PLACES}


def _in_places(grant: Grant) -> dict[str, list[Any]]:
    places: dict[str, list[Any]] = {}
    for place, value in _leaves(build_spec(grant, container_id="c")):
        places.setdefault(place, []).append(value)
    return places
