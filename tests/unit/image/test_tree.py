"""The tree in memory: paths are resolved below the root, and a layer's own names are told from those of lower ones."""

from __future__ import annotations

import sys

import pytest

from hpcctr.errors import ImageBroken
from hpcctr.image.tarstream import REGULAR, SYMLINK, Entry
from hpcctr.image.tree import Directory, Leaf, Tree, split


def entry(name: bytes, kind: bytes = REGULAR, link: bytes = b"") -> Entry:
    return Entry(
        name=name, type=kind, mode=0o644, size=0, mtime=0, link=link, offset=0, kept_xattrs=None, other_xattrs=0
    )


def put(tree: Tree, path: bytes, kind: bytes = REGULAR, link: bytes = b"") -> Leaf:
    *parts, name = split(path, "layer 1")
    leaf = Leaf(entry(path, kind, link), tree.layer)
    tree.put(tree.parent_for(path, parts, 5), name, leaf)
    return leaf


def test_a_path_is_found_through_links_inside_the_root() -> None:
    tree = Tree()
    leaf = put(tree, b"usr/lib/x")
    put(tree, b"lib", SYMLINK, b"usr/lib")
    put(tree, b"a/up", SYMLINK, b"../../../../usr")
    put(tree, b"abs", SYMLINK, b"/lib/")
    for path in (b"usr/lib/x", b"lib/x", b"/lib/./x", b"a/up/lib/x", b"abs/x"):
        assert tree.find(path) is leaf
    link = tree.find(b"lib")
    assert isinstance(link, Leaf)
    assert link.kind == SYMLINK


def test_what_is_not_there_is_not_found_and_not_made() -> None:
    tree = Tree()
    put(tree, b"f")
    before = tree.made
    for path in (b"x", b"x/y", b"f/y"):
        assert tree.find(path) is None
    assert tree.made == before


def test_made_parents_carry_the_time_of_what_needed_them() -> None:
    tree = Tree()
    put(tree, b"a/b/c")
    a = tree.find(b"a")
    assert isinstance(a, Directory)
    assert (a.mode, a.mtime) == (0o755, 5)


def test_a_remembered_parent_is_forgotten_when_the_link_to_it_is_hidden() -> None:
    tree = Tree()
    put(tree, b"one/x")
    put(tree, b"l", SYMLINK, b"one")
    tree.begin_layer(1)
    put(tree, b"l/a")
    tree.hide(tree.root, b"l")
    put(tree, b"l/b")
    assert tree.find(b"one/a") is not None
    assert tree.find(b"one/b") is None
    assert isinstance(tree.find(b"l"), Directory)


def test_a_remembered_parent_is_forgotten_when_its_own_entry_cuts_the_way_to_it() -> None:
    tree = Tree()
    put(tree, b"d/sub/f")
    put(tree, b"d/x", SYMLINK, b"sub")
    put(tree, b"l", SYMLINK, b"d/x/..")
    put(tree, b"l/a")
    assert tree.find(b"d/a") is not None
    put(tree, b"l/x")
    with pytest.raises(ImageBroken, match="not a directory"):
        put(tree, b"l/b")


def test_a_remembered_parent_is_forgotten_when_a_link_on_the_way_changes() -> None:
    tree = Tree()
    put(tree, b"one/x")
    put(tree, b"two/x")
    put(tree, b"l", SYMLINK, b"one")
    put(tree, b"l/a")
    put(tree, b"l", SYMLINK, b"two")
    put(tree, b"l/b")
    assert tree.find(b"one/a") is not None
    assert tree.find(b"two/b") is not None
    assert tree.find(b"one/b") is None


@pytest.mark.parametrize("path", [b"..", b"a/..", b"../x", b"a/../b"])
def test_paths_that_climb_are_refused(path: bytes) -> None:
    with pytest.raises(ImageBroken, match="layer 1"):
        split(path, "layer 1")


def test_a_million_entries_take_less_than_a_kibibyte_each() -> None:
    tree = Tree()
    leaf = put(tree, b"some/directory/of/usual/depth/and-a-name-of-usual-length")
    parts = sum(
        sys.getsizeof(value)
        for value in (leaf, leaf.name, leaf.offset, leaf.size, leaf.mtime, b"and-a-name-of-usual-length")
    )
    # A dictionary slot takes about 100 bytes with its spare room; above the lowest layer a set slot comes to it.
    assert parts + 200 < 1024


def test_following_links_has_a_limit_for_the_whole_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcctr.image.tree.STEPS_MAX", 1000)
    tree = Tree()
    put(tree, b"d/x")
    put(tree, b"l", SYMLINK, b"./" * 100 + b"d")
    with pytest.raises(ImageBroken, match="more steps"):
        for _ in range(20):
            tree.find(b"l/x")


def test_what_a_layer_has_cleared_is_not_gone_through_again() -> None:
    tree = Tree()
    put(tree, b"d/e/old")
    tree.begin_layer(1)
    put(tree, b"d/e/new")
    tree.hide_below(tree.root)
    assert tree.find(b"d/e/old") is None
    before = tree.root.children
    put(tree, b"d/e/newer")
    tree.hide_below(tree.root)
    tree.hide(tree.root, b"d")
    # Rebuilt it would be another one.
    assert tree.root.children is before
    assert tree.find(b"d/e/new")
    assert tree.find(b"d/e/newer")
    tree.begin_layer(2)
    tree.hide_below(tree.root)
    assert not tree.root.children
