"""The stream that becomes the image file: order, modes, counts, and what it contains, read back by Python's tarfile."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcctr.errors import ImageBroken
from hpcctr.image.layers import LayerMerge
from hpcctr.image.record import Changed
from hpcctr.image.treestream import MergeFacts, write_tree
from tests.support.oci import (
    Member,
    character_device,
    directory,
    fifo,
    file,
    hardlink,
    symlink,
    tar,
    whiteout,
)

T = TypeVar("T")


def written(*layers: bytes, second: tuple[bytes, ...] | None = None) -> tuple[bytes, MergeFacts]:
    """The stream of some layers; ``second`` is what they turn out to be when they are read again."""
    merge = LayerMerge()
    for number, layer in enumerate(layers):
        merge.apply(iter([layer]), f"layer {number + 1}")

    def again(number: int) -> Iterator[bytes]:
        layer = (second or layers)[number]
        return (layer[at : at + 1000] for at in range(0, len(layer), 1000))

    out = io.BytesIO()
    facts = write_tree(merge.tree, len(layers), again, out.write, lambda done, total: None)
    return out.getvalue(), facts


def members(*layers: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(written(*layers)[0]), mode="r:") as archive:
        return archive.getmembers()


def test_contents_come_unchanged_from_their_layers() -> None:
    layers = tar(file("a", b"1" * 5000), file("b", b"old")), tar(file("d/c", b"3" * 700), file("b", b"new"))
    with tarfile.open(fileobj=io.BytesIO(written(*layers)[0]), mode="r:") as archive:
        contents = {info.name: archive.extractfile(info) for info in archive if info.isreg()}
        assert {name: opened.read() for name, opened in contents.items() if opened} == {
            "a": b"1" * 5000,
            "b": b"new",
            "d/c": b"3" * 700,
        }


def test_parents_come_before_children_and_hard_links_after_their_targets() -> None:
    found = members(
        tar(file("z/y/x", b"1"), hardlink("a", "z/y/x"), symlink("l", "z"), file("z/empty"), hardlink("b", "z/empty")),
        tar(hardlink("m/n", "a"), directory("m", mode=0o700)),
    )
    seen: set[str] = set()
    for info in found:
        parent = info.name.rpartition("/")[0]
        assert parent in seen or parent in ("", ".")
        assert not info.islnk() or info.linkname in seen
        assert info.name not in seen
        seen.add(info.name)
    assert {(info.name, info.linkname) for info in found if info.islnk()} == {
        ("m/n", "a"),
        ("z/y/x", "a"),
        ("z/empty", "b"),
    }


def test_the_same_layers_give_the_same_bytes_however_they_are_ordered_inside() -> None:
    first = [directory("d"), file("d/a", b"1"), file("d/b"), symlink("l", "d")]
    assert written(tar(*first))[0] == written(tar(*first))[0]
    names = [info.name for info in members(tar(file("b"), file("a"), file("c")))]
    assert names == [".", "a", "b", "c"] or names == ["", "a", "b", "c"]


@pytest.mark.parametrize(
    ("member", "mode"),
    [
        (file("x", mode=0o644), 0o644),
        (file("x", mode=0o600), 0o644),
        (file("x", mode=0o700), 0o755),
        (file("x", mode=0o610), 0o755),
        (file("x", mode=0o000), 0o444),
        (file("x", mode=0o666), 0o644),
        (file("x", mode=0o777), 0o755),
        (file("x", mode=0o4755), 0o755),
        (file("x", mode=0o6711), 0o755),
        (file("x", mode=0o1644), 0o644),
        (directory("x", mode=0o755), 0o755),
        (directory("x", mode=0o700), 0o755),
        (directory("x", mode=0o000), 0o555),
        (directory("x", mode=0o777), 0o755),
        (directory("x", mode=0o2775), 0o755),
        (directory("x", mode=0o1777), 0o1777),
        (directory("x", mode=0o3770), 0o1775),
    ],
)
def test_everybody_may_read_and_nobody_gains_a_right(member: Member, mode: int) -> None:
    info = members(tar(member))[-1]
    assert oct(info.mode) == oct(mode)
    assert (info.uid, info.gid) == (0, 0)


def test_what_is_changed_is_counted() -> None:
    _, facts = written(
        tar(
            file("plain", b"1"),
            file("gone", b"1", mode=0o4777),
            file("setuid", b"1", mode=0o4755),
            file("secret", mode=0o600),
            file("open", mode=0o666),
            directory("tmp", mode=0o1777),
            character_device("null", 1, 3),
            fifo("fifo"),
            file("attributes", pax={"SCHILY.xattr.security.a": b"1", "SCHILY.xattr.trusted.b": b"1"}),
            directory("d", pax={"SCHILY.xattr.security.a": b"1"}),
        ),
        tar(whiteout("gone")),
    )
    assert facts.changed == Changed(setuid_bits=1, device_nodes=2, xattrs=3, made_readable=1, write_bits=1)


def test_sizes_and_numbers_are_of_the_tree() -> None:
    _, facts = written(
        tar(file("d/a", b"12345"), hardlink("b", "d/a"), symlink("l", "b"), file("gone", b"1")), tar(whiteout("gone"))
    )
    # The root, d, d/a, b, l; one inode less.
    assert (facts.content_size, facts.entries, facts.inodes) == (5, 5, 4)


def test_accounts_are_noted() -> None:
    _, facts = written(tar(file("etc/passwd", b"old"), file("etc/group", b"group")), tar(file("etc/passwd", b"new")))
    assert (facts.passwd, facts.group) == (b"new", b"group")
    _, facts = written(tar(file("etc/passwd", b"same"), hardlink("etc/group", "etc/passwd")))
    assert (facts.passwd, facts.group) == (b"same", b"same")


@pytest.mark.parametrize(
    "member",
    [
        symlink("etc/passwd", "/etc/shadow"),
        directory("etc/passwd"),
        file("etc/passwd", bytes(2**20 + 1)),
        file("etc/passwd"),
    ],
)
def test_accounts_that_are_no_plain_file_are_not_noted(member: Member) -> None:
    assert written(tar(file("etc/shadow", b"secret"), member))[1].passwd == b""


def test_progress_counts_content_up_to_its_sum() -> None:
    merge = LayerMerge()
    layer = tar(file("a", b"1" * 100), file("b", b"2" * 50))
    merge.apply(iter([layer]), "layer 1")
    seen: list[tuple[int, int]] = []
    write_tree(merge.tree, 1, lambda _: iter([layer]), lambda _: None, lambda done, total: seen.append((done, total)))
    assert seen == [(100, 150), (150, 150)]


@pytest.mark.parametrize("second", [b"", tar(file("a", b"1" * 5000))[:3000]])
def test_a_layer_that_has_become_shorter_is_noticed(second: bytes) -> None:
    with pytest.raises(ImageBroken, match="layer 1 is not what it was"):
        written(tar(file("a", b"1" * 5000)), second=(second,))


def test_a_layer_of_which_nothing_is_left_is_still_read_to_its_end() -> None:
    merge = LayerMerge()
    layers = tar(file("a", b"1" * 5000)), tar(whiteout("a"))
    for number, layer in enumerate(layers):
        merge.apply(iter([layer]), f"layer {number + 1}")
    ended: list[int] = []

    def again(number: int) -> Iterator[bytes]:
        yield layers[number]
        ended.append(number)

    write_tree(merge.tree, 2, again, lambda _: None, lambda done, total: None)
    assert ended == [0, 1]


def test_links_that_make_a_path_too_long_are_refused() -> None:
    long = "/".join(["d" * 200] * 19)
    with pytest.raises(ImageBroken, match="path of"):
        written(tar(symlink("l", long), file(f"l/{'x' * 200}/{'y' * 200}")))


# whatever the layers are

_NAMES = (b"a", b"b", b"d", b"d/a", b"d/e", b"d/e/b", b"l", b"l/x", b"/abs", b"./d//e/")
_ODD_NAMES = (
    b"../up",
    b"d/../../up",
    b"",
    b".",
    b"x" * 300,
    b"n/" * 2100,
    b"\xff\n",
    b"d/.wh.a",
    b".wh..wh..opq",
    b".wh.d",
)
_LINKS = (b"a", b"d", b"d/a", b"/", b"../../..", b"d/e", b"l")
_ODD_LINKS = (b"", b"/etc/passwd", b"t/" * 2500)
_PAX: tuple[dict[str, bytes], ...] = (
    {},
    {"size": b"3"},
    {"size": b"-1"},
    {"size": b"99999999999999999999"},
    {"path": b"../../etc/passwd"},
    {"path": b"d/a\0b"},
    {"linkpath": b"/etc/shadow"},
    {"mtime": b"-99999999999.5"},
    {"GNU.sparse.map": b"0,1"},
)


def _mostly(good: Sequence[T], odd: Sequence[T]) -> st.SearchStrategy[T]:
    return st.sampled_from([*good] * (9 * len(odd) // len(good) + 1) + [*odd])


_member = st.builds(
    Member,
    name=_mostly(_NAMES, _ODD_NAMES),
    type=_mostly([b"0", b"1", b"2", b"5"], [b"3", b"4", b"6", b"7", b"S", b"\0", b"Z"]),
    content=st.sampled_from([b"", b"1", b"content" * 100]),
    link=_mostly(_LINKS, _ODD_LINKS),
    mode=st.sampled_from([0, 0o7777, 0o4755, 0o1777, 0o600]),
    mtime=st.sampled_from([0, -5, 2**40, 1_700_000_000]),
    size=_mostly([None], [0, -1, 700, 2**63, 2**80]),
    pax=_mostly([{}, {"SCHILY.xattr.user.x": b"\0\xff", "SCHILY.xattr.security.capability": b"\1"}], _PAX),
    long_names=st.sampled_from(["gnu", "pax"]),
).map(lambda member: member if member.type in (b"0", b"7", b"\0", b"S") else replace(member, content=b""))


def mutated(layer: bytes, changes: list[tuple[int, int]]) -> bytes:
    """With some bytes changed; headers have right checksums afterwards, so that more than those is tested."""
    changed = bytearray(layer)
    for at, value in changes:
        changed[at % len(changed)] = value
    for at in range(0, len(changed) - 511, 512):
        if layer[at + 257 : at + 262] == b"ustar":
            changed[at + 148 : at + 156] = b" " * 8
            changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + 512])
    return bytes(changed)


_layer = st.builds(
    lambda members, changes: mutated(tar(*members), changes),
    st.lists(_member, max_size=6),
    st.one_of(st.just([]), st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=4)),
)


@settings(max_examples=1500, deadline=None)
@given(st.lists(_layer, min_size=1, max_size=3))
def test_whatever_the_layers_are_the_stream_is_harmless_or_there_is_none(layers: list[bytes]) -> None:
    try:
        stream, facts = written(*layers)
    except ImageBroken:
        return
    with tarfile.open(fileobj=io.BytesIO(stream), mode="r:", errorlevel=2) as archive:
        found = archive.getmembers()
    names = [info.name for info in found]
    assert len(set(names)) == len(names) == facts.entries
    assert found[0].isdir()
    directories = {info.name for info in found if info.isdir()}
    for info in found[1:]:
        parts = info.name.split("/")
        assert not {"", ".", ".."} & set(parts)
        assert len(parts) == 1 or info.name.rpartition("/")[0] in directories
        assert info.isreg() or info.isdir() or info.issym() or info.islnk()
        assert (info.uid, info.gid, info.mode & 0o6000) == (0, 0, 0)
        assert info.issym() or not info.mode & 0o022 or (info.isdir() and info.mode & 0o1000)
        assert {key for key in info.pax_headers if "xattr" in key} <= {"SCHILY.xattr.user.x"}
        if info.islnk():
            assert found[names.index(info.linkname)].isreg()
