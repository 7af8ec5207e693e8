"""Merging layers, against a model that knows nothing but a dictionary of paths, and against hand-made stacks."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcctr.errors import ImageBroken
from hpcctr.image import layers as layers_module
from hpcctr.image.layers import LayerMerge
from hpcctr.image.tarstream import REGULAR, SYMLINK
from hpcctr.image.tree import Directory, Leaf
from tests.support.oci import (
    Image,
    Member,
    character_device,
    directory,
    fifo,
    file,
    hardlink,
    opaque,
    symlink,
    tar,
    whiteout,
    write_layout,
)

Parts = tuple[bytes, ...]


def merged(*layers: bytes) -> LayerMerge:
    merge = LayerMerge()
    for number, layer in enumerate(layers):
        # Odd pieces: headers and contents end anywhere in a chunk.
        merge.apply((layer[at : at + 777] for at in range(0, len(layer), 777)), f"layer {number + 1}")
    return merge


def listing(merge: LayerMerge, layers: tuple[bytes, ...]) -> dict[str, object]:
    """Path → ``dir``, ``-> target``, or content; special files are left out as they are in the image file."""
    found: dict[str, object] = {}
    todo: list[tuple[str, Directory]] = [("", merge.tree.root)]
    while todo:
        prefix, where = todo.pop()
        for name, node in where.children.items():
            path = prefix + name.decode()
            if isinstance(node, Directory):
                found[path] = "dir"
                todo.append((path + "/", node))
            elif node.kind == SYMLINK:
                found[path] = f"-> {node.link.decode()}"
            elif node.kind == REGULAR:
                found[path] = layers[node.layer][node.offset : node.offset + node.size]
    return found


def tree_of(*layers: bytes) -> dict[str, object]:
    return listing(merged(*layers), layers)


# by hand


def test_later_layers_replace_files() -> None:
    assert tree_of(tar(file("a", b"1"), file("b", b"1")), tar(file("a", b"2"))) == {"a": b"2", "b": b"1"}


def test_a_whiteout_hides_what_lower_layers_have() -> None:
    lower = tar(directory("d"), file("d/x", b"1"), file("d/y", b"1"))
    assert tree_of(lower, tar(whiteout("d/x"))) == {"d": "dir", "d/y": b"1"}
    assert tree_of(lower, tar(whiteout("d"))) == {}


@pytest.mark.parametrize("first", [True, False])
def test_a_whiteout_spares_its_own_layer_wherever_it_stands(first: bool) -> None:
    lower = tar(directory("d"), file("d/old", b"1"))
    members = [directory("d"), file("d/new", b"2")]
    upper = tar(whiteout("d"), *members) if first else tar(*members, whiteout("d"))
    assert tree_of(lower, upper) == {"d": "dir", "d/new": b"2"}


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_opaque_mark_hides_lower_layers_only_wherever_it_stands(place: int) -> None:
    lower = tar(directory("d"), file("d/old", b"1"), directory("d/e"), file("d/e/old", b"1"))
    members = [directory("d"), file("d/e/new", b"2")]
    members.insert(place, opaque("d"))
    assert tree_of(lower, tar(*members)) == {"d": "dir", "d/e": "dir", "d/e/new": b"2"}


def test_whiteouts_of_the_lowest_layer_hide_nothing() -> None:
    assert tree_of(tar(file("a", b"1"), whiteout("a"), directory("d"), file("d/x", b"1"), opaque("d"), opaque(""))) == {
        "a": b"1",
        "d": "dir",
        "d/x": b"1",
    }


def test_an_opaque_root_hides_everything_below() -> None:
    assert tree_of(tar(file("a", b"1"), file("d/x", b"1")), tar(opaque(""), file("b", b"2"))) == {"b": b"2"}


def test_what_aufs_kept_for_itself_is_ignored() -> None:
    assert tree_of(
        tar(file(".wh..wh.aufs"), directory(".wh..wh.plnk"), file(".wh..wh.plnk/1.2", b"x"), file("a", b"1"))
    ) == {"a": b"1"}


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh...", "d/.wh.."])
def test_a_whiteout_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ImageBroken):
        tree_of(tar(directory("d")), tar(file(name)))


def test_whiteouts_below_missing_or_odd_parents_hide_nothing() -> None:
    lower = tar(file("f", b"1"))
    assert tree_of(lower, tar(whiteout("no/such/x"), whiteout("f/x"), opaque("no"))) == {"f": b"1"}


def test_a_hard_link_keeps_its_content_when_the_other_name_is_replaced_or_removed() -> None:
    lower = tar(file("a", b"1"), hardlink("b", "a"))
    assert tree_of(lower, tar(file("a", b"2"))) == {"a": b"2", "b": b"1"}
    assert tree_of(lower, tar(whiteout("a"))) == {"b": b"1"}


def test_a_hard_link_reaches_into_lower_layers() -> None:
    assert tree_of(tar(file("d/a", b"1")), tar(hardlink("./b", "/d/a")), tar(whiteout("d"))) == {"b": b"1"}


def test_names_of_a_hard_link_are_one_file() -> None:
    merge = merged(tar(file("a", b"1"), hardlink("b", "a")), tar(hardlink("c", "b")))
    children = merge.tree.root.children
    assert children[b"a"] is children[b"b"] is children[b"c"]


@pytest.mark.parametrize("target", ["missing", "d", "d/missing", "a/b"])
def test_a_hard_link_to_no_file_is_refused(target: str) -> None:
    with pytest.raises(ImageBroken, match="hard link"):
        tree_of(tar(file("a", b"1"), directory("d"), hardlink("l", target)))


def test_a_hard_link_to_itself_changes_nothing() -> None:
    assert tree_of(tar(file("a", b"1"), hardlink("a", "a"))) == {"a": b"1"}


@pytest.mark.parametrize("target", ["usr/lib", "/usr/lib", "../../usr/lib", "usr/../usr/./lib/"])
def test_an_entry_below_a_symlink_of_a_lower_layer_goes_where_it_leads_inside_the_image(target: str) -> None:
    lower = tar(directory("usr"), directory("usr/lib"), symlink("lib", target))
    found = tree_of(lower, tar(file("lib/x", b"1"), whiteout("lib/y"), hardlink("y", "lib/x")))
    assert found["usr/lib/x"] == b"1"
    assert found["lib"] == f"-> {target}"
    assert found["y"] == b"1"


def test_a_whiteout_goes_through_a_symlink_as_well() -> None:
    lower = tar(file("usr/lib/x", b"1"), file("usr/lib/y", b"1"), symlink("lib", "usr/lib"))
    assert tree_of(lower, tar(whiteout("lib/x"))).keys() == {"usr", "usr/lib", "usr/lib/y", "lib"}


def test_what_a_dangling_symlink_leads_to_is_made() -> None:
    assert tree_of(tar(symlink("lib", "usr/lib"), file("lib/x", b"1"))) == {
        "lib": "-> usr/lib",
        "usr": "dir",
        "usr/lib": "dir",
        "usr/lib/x": b"1",
    }


@pytest.mark.parametrize("links", [[("a", "a")], [("a", "b"), ("b", "a")], [("a", "b/c"), ("b", "/a")]])
def test_loops_of_symlinks_are_refused(links: list[tuple[str, str]]) -> None:
    with pytest.raises(ImageBroken, match="loop"):
        tree_of(tar(*(symlink(*link) for link in links), file("a/x", b"1")))


def test_a_directory_entry_replaces_a_symlink_and_leaves_its_target_alone() -> None:
    found = tree_of(tar(file("usr/lib/x", b"1"), symlink("lib", "usr/lib")), tar(directory("lib"), file("lib/y", b"2")))
    assert found == {"usr": "dir", "usr/lib": "dir", "usr/lib/x": b"1", "lib": "dir", "lib/y": b"2"}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (file("p", b"1"), directory("p"), {"p": "dir"}),
        (file("p", b"1"), symlink("p", "q"), {"p": "-> q"}),
        (file("p/x", b"1"), file("p", b"2"), {"p": b"2"}),
        (file("p/x", b"1"), symlink("p", "q"), {"p": "-> q"}),
        (file("p/x", b"1"), directory("p"), {"p": "dir", "p/x": b"1"}),
        (symlink("p", "q"), file("p", b"2"), {"p": b"2"}),
        (file("p", b"1"), character_device("p", 0, 0), {}),
        (file("p/x", b"1"), fifo("p"), {}),
    ],
)
@pytest.mark.parametrize("same_layer", [True, False])
def test_the_last_entry_of_a_name_decides_what_it_is(
    before: Member, after: Member, expected: dict[str, object], same_layer: bool
) -> None:
    layers = (tar(before, after),) if same_layer else (tar(before), tar(after))
    assert tree_of(*layers) == expected


def test_missing_parents_are_made_0755() -> None:
    merge = merged(tar(file("a/b/c", b"1", mode=0o600)))
    a = merge.tree.root.children[b"a"]
    assert isinstance(a, Directory)
    assert a.mode == 0o755


def test_an_entry_below_a_file_is_refused() -> None:
    with pytest.raises(ImageBroken, match="not a directory"):
        tree_of(tar(file("a", b"1")), tar(file("a/b", b"2")))


@pytest.mark.parametrize("name", ["../a", "a/../b", "/..", "a/..", "./../x"])
@pytest.mark.parametrize("make", [file, directory, lambda name: hardlink("l", name), whiteout])
def test_paths_that_climb_are_refused(name: str, make: Callable[[str], Member]) -> None:
    with pytest.raises(ImageBroken):
        tree_of(tar(file("a", b"1")), tar(make(name)))


def test_spellings_of_one_path_are_one_path() -> None:
    assert tree_of(tar(file("./a", b"1"), file("/a", b"2"), file("d//x", b"1"), file("./d/./x", b"2"))) == {
        "a": b"2",
        "d": "dir",
        "d/x": b"2",
    }


def test_the_root_entry_gives_the_root_its_attributes() -> None:
    merge = merged(tar(directory("./", mode=0o700, mtime=5)), tar(file(".", b"ignored")))
    assert (merge.tree.root.mode, merge.tree.root.mtime) == (0o700, 5)
    assert not merge.tree.root.children


def test_a_directory_entry_after_its_content_gives_attributes_and_keeps_the_content() -> None:
    merge = merged(tar(file("d/x", b"1"), directory("d", mode=0o711)))
    d = merge.tree.root.children[b"d"]
    assert isinstance(d, Directory)
    assert d.mode == 0o711
    assert b"x" in d.children


@pytest.mark.parametrize("name", [b"x" * 256, b"a/" + b"x" * 256 + b"/b", b"d/" * 2048 + b"x"])
def test_names_no_kernel_takes_are_refused(name: bytes) -> None:
    with pytest.raises(ImageBroken):
        tree_of(tar(file(name)))


def test_the_number_of_entries_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers_module, "ENTRIES_MAX", 10)
    with pytest.raises(ImageBroken, match="more than 10 entries"):
        tree_of(tar(*(file(f"f{number}") for number in range(11))))
    with pytest.raises(ImageBroken, match="more than 10 entries"):
        tree_of(tar(file("/".join("abcdefghijkl"))))


def test_the_content_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers_module, "CONTENT_MAX", 10)
    with pytest.raises(ImageBroken, match="more than 10 bytes"):
        tree_of(tar(file("a", b"123456"), file("b", b"123456")))


def test_what_no_entry_speaks_of_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers_module, "UNCOMPRESSED_MAX", 10_000)
    assert tree_of(tar(file("a", b"1"), end=bytes(5000))) == {"a": b"1"}
    with pytest.raises(ImageBroken, match="more than 10000 bytes"):
        tree_of(tar(file("a", b"1"), end=bytes(20_000)))
    with pytest.raises(ImageBroken, match="more than 10000 bytes"):
        tree_of(tar(file("a", b"1" * 9000)), tar(file("b", b"1")))


def test_names_in_memory_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers_module, "NAMES_MAX", 100)
    with pytest.raises(ImageBroken, match="names and attributes"):
        tree_of(tar(file("a", pax={"SCHILY.xattr.user.x": bytes(range(1, 101))})))


# against a model


@dataclass
class Model:
    """Layers applied to a dictionary of paths, the slow and obvious way."""

    nodes: dict[Parts, tuple[str, bytes | Parts]] = field(default_factory=dict)
    contents: list[bytes] = field(default_factory=list)
    mine: set[Parts] = field(default_factory=set)

    def real(self, path: Parts, links: int = 0) -> Parts | None:
        """Where a directory path leads, links followed, missing parts as they are; None when a file is in the way."""
        done: Parts = ()
        for index, part in enumerate(path):
            if part == b"..":
                done = done[:-1]
                continue
            node = self.nodes.get((*done, part))
            if node is None or node[0] == "dir":
                done = (*done, part)
            elif node[0] == "link":
                if links > 255:
                    raise ImageBroken("loop")
                target = bytes(node[1]) if isinstance(node[1], bytes) else b""
                rest = tuple(p for p in target.split(b"/") if p not in (b"", b"."))
                base = () if target.startswith(b"/") else done
                return self.real((*base, *rest, *path[index + 1 :]), links + 1)
            else:
                return None
        return done

    def remove(self, path: Parts, *, spare: set[Parts]) -> None:
        for other in [p for p in self.nodes if p[: len(path)] == path and p not in spare]:
            del self.nodes[other]

    def own(self, path: Parts) -> None:
        self.mine |= {path[:length] for length in range(1, len(path) + 1)}

    def apply(self, member: Member) -> None:
        parts = tuple(part for part in member.name.split(b"/") if part)
        *above, name = parts
        parent = self.real(tuple(above))
        if name.startswith(b".wh."):
            if parent is None or not (parent == () or self.nodes.get(parent, ("", b""))[0] == "dir"):
                return
            if name == b".wh..wh..opq":
                for path in [p for p in self.nodes if len(p) > len(parent) and p[: len(parent)] == parent]:
                    if path not in self.mine:
                        self.nodes.pop(path, None)
            else:
                self.remove((*parent, name[4:]), spare=self.mine)
            return
        target: tuple[str, bytes | Parts] | None = None
        if member.type == b"1":
            link = tuple(member.link.split(b"/"))
            where = self.real(link[:-1])
            target = None if where is None else self.nodes.get((*where, link[-1]))
            if target is None or target[0] == "dir":
                raise ImageBroken("hard link")
        if parent is None:
            raise ImageBroken("below a file")
        for length in range(1, len(parent) + 1):
            self.nodes.setdefault(parent[:length], ("dir", b""))
        path = (*parent, name)
        self.own(path)
        if member.type == b"5":
            if self.nodes.get(path, ("", b""))[0] != "dir":
                self.remove(path, spare=set())
            self.nodes[path] = ("dir", b"")
            return
        self.remove(path, spare=set())
        # What a replaced directory held is nobody's any more.
        self.mine -= {p for p in self.mine if len(p) > len(path) and p[: len(path)] == path}
        if member.type == b"2":
            self.nodes[path] = ("link", member.link)
        else:
            self.nodes[path] = target or ("file", member.content)


_name = st.sampled_from([b"a", b"b", b"c"])
_path = st.lists(_name, min_size=1, max_size=3).map(b"/".join)
_target = st.one_of(_path, _path.map(lambda p: b"/" + p), _path.map(lambda p: b"../" + p))
_member = st.one_of(
    st.builds(file, _path, st.binary(min_size=1, max_size=4)),
    st.builds(file, _path, st.binary(min_size=1, max_size=4)),
    st.builds(directory, _path),
    st.builds(symlink, _path, _target),
    st.builds(hardlink, _path, _path),
    st.builds(whiteout, _path),
    st.builds(opaque, _path),
)


@settings(max_examples=1500, deadline=None)
@given(st.lists(st.lists(_member, max_size=8), min_size=1, max_size=4))
def test_a_stack_of_layers_merges_as_the_model_says(stack: list[list[Member]]) -> None:
    model = Model()
    broken = False
    try:
        for number, members in enumerate(stack):
            model.mine = set()
            for member in members:
                if number or not member.name.rpartition(b"/")[2].startswith(b".wh."):
                    model.apply(member)
    except ImageBroken:
        broken = True
    layers = tuple(tar(*members) for members in stack)
    if broken:
        with pytest.raises(ImageBroken):
            merged(*layers)
        return
    expected = {
        b"/".join(path).decode(): kind if kind == "dir" else f"-> {bytes(value).decode()}" if kind == "link" else value
        for path, (kind, value) in model.nodes.items()
        if isinstance(value, bytes)
    }
    assert tree_of(*layers) == expected


def unpacked_by_umoci(stack: list[list[Member]], where: Path) -> dict[str, object] | None:
    """What umoci makes of a stack; None when it refuses it."""
    write_layout(where / "layout", Image(layers=tuple(tar(*members) for members in stack)), ref="x")
    command = ["umoci", "unpack", "--image", f"{where}/layout:x", str(where / "bundle")]
    if subprocess.run(command, capture_output=True).returncode:
        return None
    found: dict[str, object] = {}
    root = where / "bundle/rootfs"
    for above, directories, files in os.walk(root):
        for name in (*directories, *files):
            path = Path(above, name)
            key = str(path.relative_to(root))
            found[key] = f"-> {path.readlink()}" if path.is_symlink() else "dir" if path.is_dir() else path.read_bytes()
    return found


def possible(stack: list[list[Member]]) -> list[list[Member]]:
    """The stack without the members that cannot be, such as those below a file: what is left is never refused."""
    model = Model()
    kept: list[list[Member]] = []
    for number, members in enumerate(stack):
        model.mine = set()
        kept.append([])
        for member in members:
            if number == 0 and b".wh." in member.name:
                # umoci takes a whiteout of the lowest layer for one of its own entries before it.
                continue
            with contextlib.suppress(ImageBroken):
                model.apply(member)
                kept[-1].append(member)
    return kept


@pytest.mark.skipif(os.geteuid() != 0, reason="umoci unpacks as root")
@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(_member, min_size=4, max_size=25), min_size=1, max_size=4))
def test_a_stack_of_layers_merges_as_umoci_unpacks_it(stack: list[list[Member]]) -> None:
    stack = possible(stack)
    layers = tuple(tar(*members) for members in stack)
    with tempfile.TemporaryDirectory() as where:
        theirs = unpacked_by_umoci(stack, Path(where))
        ours = tree_of(*layers)
        if theirs is not None:
            assert ours == theirs


def test_a_leaf_knows_where_its_content_lies() -> None:
    layer = tar(directory("d"), file("d/x", b"content", pax={"mtime": b"1.5"}), file("d/y", b"more"))
    d = merged(layer).tree.root.children[b"d"]
    assert isinstance(d, Directory)
    for name, content in ((b"x", b"content"), (b"y", b"more")):
        leaf = d.children[name]
        assert isinstance(leaf, Leaf)
        assert layer[leaf.offset : leaf.offset + leaf.size] == content
