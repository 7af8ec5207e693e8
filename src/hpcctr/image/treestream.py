"""A merged tree as one tar stream: what the image file is made of.

Directories, links and empty files come first, in the order of their names, then the contents in the order in which
they lie in the layers, copied raw, then hard links. The same layers give the same bytes. Here modes are made
harmless, and everything that is left out is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hpcctr.errors import ImageBroken
from hpcctr.image import tarheader, tarstream
from hpcctr.image.linkage import Linkage
from hpcctr.image.record import Changed, ImageFacts
from hpcctr.image.tarstream import DIRECTORY, HARDLINK, REGULAR, SPECIAL, SYMLINK, ByteStream, printable
from hpcctr.image.tree import Directory, Leaf, Tree

#: /etc/passwd and /etc/group are noted up to this size.
ACCOUNTS_MAX = 2**20

#: Opens layer number N once more, from its beginning.
OpenLayer = Callable[[int], Iterator[bytes]]


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
    #: What programs of the image meet when they are loaded; None where it cannot be told.
    facts: ImageFacts | None = None


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What comes after the first part of the stream."""

    #: Files with content, by layer, as their contents lie there.
    contents: list[list[Leaf]]
    #: Path and file of every further name.
    hardlinks: list[tuple[bytes, Leaf]]


def write_tree(
    tree: Tree,
    layers: int,
    open_layer: OpenLayer,
    write: Callable[[bytes], object],
    progress: Callable[[int, int], None],
) -> MergeFacts:
    """Write the merged tar stream. ``progress`` is told how many bytes of content are written, and how many there are.

    Raises :class:`ImageBroken` when a layer is not what it was when it was applied.
    """
    count = _Count()
    plan = _write_names(tree, layers, write, count)
    accounts = {word: _account_file(tree, word) for word in ("passwd", "group")}
    wanted = {id(leaf) for leaf in accounts.values() if leaf is not None}
    noted: dict[int, bytes] = {}
    linkage = Linkage()
    for path, leaf in plan.hardlinks:
        linkage.add_name(path, leaf)
    total, done = sum(leaf.size for leaves in plan.contents for leaf in leaves), 0
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
            elif linkage.wants(leaf):
                whole = linkage.copy(leaf, stream, write)
            else:
                whole = stream.copy(leaf.size, write)
            if not whole:
                raise _changed_meanwhile(number)
            write(tarheader.padding(leaf.size))
            done += leaf.size
            progress(done, total)
        stream.drain()
    for path, leaf in plan.hardlinks:
        write(tarheader.header(path, HARDLINK, mode=_file_mode(leaf.mode), mtime=leaf.mtime, link=_path(leaf)))
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
        facts=linkage.facts(tree),
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
        write(tarheader.header(path or b"./", DIRECTORY, mode=mode, mtime=directory.mtime, xattrs=directory.xattrs))
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
    leaf: Leaf,
    directory: Directory,
    name: bytes,
    path: bytes,
    write: Callable[[bytes], object],
    count: _Count,
    plan: _Plan,
) -> None:
    if leaf.kind in SPECIAL:
        count.device_nodes += 1
        return
    count.entries += 1
    if leaf.kind == SYMLINK:
        # Several names of one symbolic link become several links: no program sees the difference.
        count.xattrs += leaf.other_xattrs + len(leaf.xattrs or ())
        write(tarheader.header(path, SYMLINK, mode=0o777, mtime=leaf.mtime, link=leaf.link))
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
    return tarheader.header(_path(leaf), REGULAR, mode=mode, size=leaf.size, mtime=leaf.mtime, xattrs=leaf.xattrs)


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
    return node if isinstance(node, Leaf) and node.is_regular and 0 < node.size <= ACCOUNTS_MAX else None


def _changed_meanwhile(number: int) -> ImageBroken:
    return ImageBroken(
        f"layer {number + 1} is not what it was a moment ago", hint="let nobody write to the image while it is pulled"
    )
