"""The stream that becomes the image file: order, modes, counts, and what it contains, read back by Python's tarfile."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator

import pytest

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
