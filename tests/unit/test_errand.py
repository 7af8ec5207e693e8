"""Errands: what crosses the socket, and what storekeepers say."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcctr.errand import Ended, Errand, Failed, Granted, Listed, Progressed, Pulled, Removed, Said
from hpcctr.errors import HpcctrError, ImageNotInStore, PolicyDenied, ProtocolBroken
from hpcctr.wire import Frame

words = st.text(st.characters(exclude_categories=("C", "Z")), max_size=200)


@given(image=words, platform=words, name=words, source=words, grantees=words)
def test_an_errand_crosses_unchanged(image: str, platform: str, name: str, source: str, grantees: str) -> None:
    errand = Errand(task="import", image=image, platform=platform, name=name, source=source, grantees=grantees)
    assert Errand.of_frame(Frame.unpack(errand.frame().pack())) == errand


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [("task", b"format")],
        [("task", b"pull"), ("task", b"pull")],
        [("task", b"pull"), ("uid", b"0")],
        [("task", b"pull"), ("image", b"a\x1b[2J")],
        [("task", b"pull"), ("image", b"a\nb")],
        [("task", b"pull"), ("image", b"x" * 8193)],
        [("task", b"pull"), ("image", b"\xff")],
    ],
)
def test_what_is_no_errand_is_refused(fields: list[tuple[str, bytes]]) -> None:
    with pytest.raises(ProtocolBroken):
        Errand.of_frame(Frame("store", fields))


def test_what_a_storekeeper_says_is_read_back_as_what_it_was() -> None:
    said = (
        Progressed(stage="download", done=1, total=2, who="pid 7 on n1"),
        Pulled(name="a:1", digest="sha256:0", file_size=3, was_stored=False),
        Listed(name="a:1", platform="linux/amd64", digest="sha256:0", since="now"),
        Listed(name="a:1", platform="linux/amd64", digest="sha256:0", since="now", owner=4711),
        Granted(image="a:1", grantee="uid-7", since="now"),
        Removed(names=("a:1",), digests=(), freed=0),
        Failed(slug="store", message="m", hint="h"),
        Ended(),
    )
    for one in said:
        assert msgspec.json.decode(msgspec.json.encode(one), type=Said) == one


def test_an_error_arrives_as_the_class_it_was() -> None:
    error = Failed.of(ImageNotInStore("none", hint="pull")).error()
    assert (type(error), error.message, error.hint) == (ImageNotInStore, "none", "pull")
    assert len(Failed.of(PolicyDenied("x" * 9999)).message) == 4000
    assert type(Failed(slug="of-the-future", message="m").error()) is HpcctrError
