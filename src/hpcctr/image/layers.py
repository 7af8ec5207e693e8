"""Merging: the layers of an image become one tar stream, without extracting anything and without root.

First every layer's headers are read, lowest layer first, and applied to a :class:`hpcctr.image.tree.Tree`; then the tree is
written: directories, links and empty files in the order of their names, then the contents in the order in which they lie in
the layers, copied raw, then hard links. The same layers give the same bytes.

Rules: OCI image-spec ``layer.md``; where it is silent, what containerd does when it applies a layer (``pkg/archive``,
``applyNaive``). Whiteouts and opaque marks hide what lower layers have, wherever in their layer they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hpcctr.errors import ImageBroken
from hpcctr.image import tarstream
from hpcctr.image.record import Changed
from hpcctr.image.tarstream import DIRECTORY, HARDLINK, REGULAR, SPECIAL, SYMLINK, ByteStream, Entry, printable
from hpcctr.image.tree import Directory, Leaf, Tree, split

#: Entries an image may have in all its layers together, and nodes in its tree.
ENTRIES_MAX = 8_000_000
#: Bytes of all layers together, uncompressed.
CONTENT_MAX = 2**40
#: Bytes of all names, link targets and extended attributes together: they are held in memory.
NAMES_MAX = 2**30
#: /etc/passwd and /etc/group are noted up to this size.
_ACCOUNTS_MAX = 2**20

_OPAQUE = b".wh..wh..opq"
_WHITEOUT = b".wh."
#: What aufs kept for itself begins so.
_WHITEOUT_META = b".wh..wh."

#: Opens layer number N once more, from its beginning.
OpenLayer = Callable[[int], Iterator[bytes]]


class LayerMerge:
    """Applies layers one by one, lowest first."""

    def __init__(self) -> None:
        self.tree = Tree()
        self._entries = 0
        self._names = 0
        self._content = 0
        self._layers = 0

    def apply(self, chunks: Iterator[bytes], what: str) -> None:
        """Read one uncompressed layer to its end. Raises :class:`ImageBroken`; ``what`` names the layer."""
        self.tree.begin_layer(self._layers)
        self._layers += 1
        stream = ByteStream(chunks)
        for entry in tarstream.entries(stream, what):
            self._entries += 1
            self._names += len(entry.name) + len(entry.link)
            if entry.kept_xattrs:
                self._names += sum(len(key) + len(value) for key, value in entry.kept_xattrs.items())
            self._content += entry.size
            self._put(entry, what)
            self._require_within_limits()
        stream.drain()

    def _require_within_limits(self) -> None:
        if max(self._entries, self.tree.made) > ENTRIES_MAX:
            raise ImageBroken(f"the image has more than {ENTRIES_MAX} entries", hint="split the data set from the image")
        if self._names > NAMES_MAX:
            raise ImageBroken(f"the image has more than {NAMES_MAX} bytes of names and attributes")
        if self._content > CONTENT_MAX:
            raise ImageBroken(f"the image has more than {CONTENT_MAX} bytes", hint="split the data set from the image")

    def _put(self, entry: Entry, what: str) -> None:
        tree = self.tree
        parts = split(entry.name, what)
        if not parts:
            # The root: a directory gives it its attributes, anything else there means nothing.
            if entry.type == DIRECTORY:
                tree.root.describe(entry)
            return
        name = parts.pop()
        if name.startswith(_WHITEOUT) or any(part.startswith(_WHITEOUT_META) for part in parts):
            if not any(part.startswith(_WHITEOUT_META) for part in parts):
                self._white_out(entry, parts, name, what)
            return
        if entry.type == HARDLINK:
            target = self._target(entry, what)
            parent = tree.parent_for(entry.name, parts, entry.mtime)
            tree.put(parent, name, target)
            return
        parent = tree.parent_for(entry.name, parts, entry.mtime)
        if entry.type == DIRECTORY:
            node = parent.children.get(name)
            if not isinstance(node, Directory):
                node = Directory(parent, entry.mtime)
                tree.made += 1
                tree.put(parent, name, node)
            tree.touch(parent, name)
            node.describe(entry)
            return
        if entry.type == SYMLINK and not 0 < len(entry.link) < tarstream.PATH_MAX:
            raise ImageBroken(f"{what} has a symbolic link with a target of {len(entry.link)} bytes: {printable(entry.name)}")
        tree.made += 1
        tree.put(parent, name, Leaf(entry, tree.layer))

    def _white_out(self, entry: Entry, parts: list[bytes], name: bytes, what: str) -> None:
        if name.startswith(_WHITEOUT_META) and name != _OPAQUE:
            return
        directory = self.tree.find_directory(parts, entry.name)
        hidden = name[len(_WHITEOUT) :]
        if name != _OPAQUE and hidden in (b"", b".", b".."):
            raise ImageBroken(f"{what} has a whiteout of nothing: {printable(entry.name)}")
        if directory is None:
            return
        if name == _OPAQUE:
            self.tree.hide_below(directory)
        else:
            self.tree.hide(directory, hidden)

    def _target(self, entry: Entry, what: str) -> Leaf:
        """What a hard link leads to: by now another entry of its layer or of a lower one."""
        split(entry.link, what)
        target = self.tree.find(entry.link)
        if not isinstance(target, Leaf):
            problem = "a directory" if target else "nothing"
            raise ImageBroken(f"{what} has a hard link {printable(entry.name)} to {printable(entry.link)}, which is {problem}")
        return target


@dataclass(frozen=True, kw_only=True)
class MergeFacts:
    """What was noted while the tree was written."""

    changed: Changed
    #: Sum of the sizes of regular files, bytes; names in the tree.
    content_size: int
    entries: int
    #: Entries without the second and further names of a file.
    inodes: int
    passwd: bytes
    group: bytes


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What comes after the first part of the stream."""

    #: Files with content, by layer, as their contents lie there.
    contents: list[list[Leaf]]
    #: Path and file of every further name.
    hardlinks: list[tuple[bytes, Leaf]]


def write_tree(
    tree: Tree, layers: int, open_layer: OpenLayer, write: Callable[[bytes], object], progress: Callable[[int], None]
) -> MergeFacts:
    """Write the merged tar stream. ``progress`` is told how many bytes of content were written.

    Raises :class:`ImageBroken` when a layer is not what it was when it was applied.
    """
    count = _Count()
    plan = _write_names(tree, layers, write, count)
    accounts = {word: _account_file(tree, word) for word in ("passwd", "group")}
    wanted = {id(leaf) for leaf in accounts.values() if leaf is not None}
    noted: dict[int, bytes] = {}
    for number, leaves in enumerate(plan.contents):
        # A layer is read to its end also when nothing of it is left: its digest is checked there.
        stream = ByteStream(open_layer(number))
        for leaf in leaves:
            write(_header_of(leaf, count))
            if not stream.skip(leaf.offset - stream.position):
                raise _changed_meanwhile(number)
            if id(leaf) in wanted:
                noted[id(leaf)] = content = stream.take(leaf.size)
                whole = len(content) == leaf.size
                write(content)
            else:
                whole = stream.copy(leaf.size, write)
            if not whole:
                raise _changed_meanwhile(number)
            write(tarstream.padding(leaf.size))
            progress(leaf.size)
        stream.drain()
    for path, leaf in plan.hardlinks:
        write(tarstream.header(path, HARDLINK, mode=_file_mode(leaf.mode), mtime=leaf.mtime, link=_path(leaf)))
    write(bytes(2 * tarstream.BLOCK))
    return MergeFacts(
        changed=Changed(
            setuid_bits=count.setuid_bits,
            device_nodes=count.device_nodes,
            xattrs=count.xattrs,
            made_readable=count.made_readable,
            write_bits=count.write_bits,
        ),
        content_size=count.content_size,
        entries=count.entries,
        inodes=count.entries - len(plan.hardlinks),
        passwd=noted.get(id(accounts["passwd"]), b""),
        group=noted.get(id(accounts["group"]), b""),
    )


class _Count:
    """Sums of one pass over the tree."""

    def __init__(self) -> None:
        self.setuid_bits = self.device_nodes = self.xattrs = self.made_readable = self.write_bits = 0
        self.content_size = self.entries = 0

    def mode(self, before: int, after: int) -> None:
        self.setuid_bits += bool(before & 0o6000)
        self.made_readable += bool(after & ~before & 0o777)
        self.write_bits += bool(before & ~after & 0o022)


def _write_names(tree: Tree, layers: int, write: Callable[[bytes], object], count: _Count) -> _Plan:
    """Everything without content, parents first, names of a directory in byte order."""
    plan = _Plan(contents=[[] for _ in range(layers)], hardlinks=[])
    tree.root.path = b""
    todo: list[tuple[Directory, Iterator[tuple[bytes, Directory | Leaf]]]] = []

    def enter(directory: Directory, path: bytes) -> None:
        if len(path) >= tarstream.PATH_MAX:
            raise ImageBroken(f"the image has a path of {len(path)} bytes: {printable(path)}")
        directory.path = path
        mode = _directory_mode(directory.mode)
        count.mode(directory.mode, mode)
        count.entries += 1
        count.xattrs += directory.other_xattrs
        write(tarstream.header(path or b"./", DIRECTORY, mode=mode, mtime=directory.mtime, xattrs=directory.xattrs))
        todo.append((directory, iter(sorted(directory.children.items()))))

    enter(tree.root, b"")
    while todo:
        directory, names = todo[-1]
        for name, node in names:
            path = directory.path + b"/" + name if directory.path else name
            if isinstance(node, Directory):
                enter(node, path)
                break
            if len(path) >= tarstream.PATH_MAX:
                raise ImageBroken(f"the image has a path of {len(path)} bytes: {printable(path)}")
            _plan_leaf(node, directory, name, path, write, count, plan)
        else:
            todo.pop()
    for leaves in plan.contents:
        leaves.sort(key=lambda leaf: leaf.offset)
    return plan


def _plan_leaf(
    leaf: Leaf, directory: Directory, name: bytes, path: bytes, write: Callable[[bytes], object], count: _Count, plan: _Plan
) -> None:
    if leaf.kind in SPECIAL:
        count.device_nodes += 1
        return
    count.entries += 1
    if leaf.kind == SYMLINK:
        # Several names of one symbolic link become several links: no program sees the difference.
        count.xattrs += leaf.other_xattrs + len(leaf.xattrs or ())
        write(tarstream.header(path, SYMLINK, mode=0o777, mtime=leaf.mtime, link=leaf.link))
        return
    if leaf.parent is not None:
        plan.hardlinks.append((path, leaf))
        return
    leaf.parent, leaf.name = directory, name
    if leaf.size:
        plan.contents[leaf.layer].append(leaf)
    else:
        write(_header_of(leaf, count))


def _header_of(leaf: Leaf, count: _Count) -> bytes:
    mode = _file_mode(leaf.mode)
    count.mode(leaf.mode, mode)
    count.xattrs += leaf.other_xattrs
    count.content_size += leaf.size
    return tarstream.header(_path(leaf), REGULAR, mode=mode, size=leaf.size, mtime=leaf.mtime, xattrs=leaf.xattrs)


def _path(leaf: Leaf) -> bytes:
    assert leaf.parent is not None  # noqa: S101 - given to every leaf that is written
    return leaf.parent.path + b"/" + leaf.name if leaf.parent.path else leaf.name


def _file_mode(mode: int) -> int:
    """``a+rX``, without set-id bits and write for group and others."""
    return (mode & 0o755) | 0o444 | (0o111 if mode & 0o111 else 0)


def _directory_mode(mode: int) -> int:
    """``a+rx``, without set-id bits; write for group and others only on sticky ones, as /tmp is."""
    return (mode & 0o1777 if mode & 0o1000 else mode & 0o755) | 0o555


def _account_file(tree: Tree, word: str) -> Leaf | None:
    node = tree.find(b"etc/" + word.encode())
    return node if isinstance(node, Leaf) and node.is_regular and 0 < node.size <= _ACCOUNTS_MAX else None


def _changed_meanwhile(number: int) -> ImageBroken:
    return ImageBroken(f"layer {number + 1} is not what it was a moment ago", hint="let nobody write to the image while it is pulled")
