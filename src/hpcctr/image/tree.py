"""The tree an image's layers make, in memory: names, attributes, and where each content lies. No content, no
filesystem.

Paths are resolved as inside a chroot: symbolic links, absolute ones as well, lead to places below the root. A leaf
that has several names (hard links) is one object in several directories."""

from __future__ import annotations

from hpcctr.errors import ImageBroken
from hpcctr.image.tarstream import PATH_MAX, REGULAR, SYMLINK, Entry, printable

#: include/uapi/linux/limits.h NAME_MAX
_NAME_MAX = 255
#: As containerd's resolver (continuity, fs/path.go) has it.
_LINKS_MAX = 255
#: Components of symbolic links' targets that are gone through for all entries of an image together: links to long
#: targets that begin with links to long targets would take weeks.
STEPS_MAX = 1 << 26


class Leaf:
    """A file, symbolic link, or special file. ``kind`` is its tar type."""

    __slots__ = ("kind", "layer", "link", "mode", "mtime", "name", "offset", "other_xattrs", "parent", "size", "xattrs")

    def __init__(self, entry: Entry, layer: int) -> None:
        self.kind = entry.type
        self.mode = entry.mode
        self.mtime = entry.mtime
        self.link = entry.link if entry.type == SYMLINK else b""
        #: Where the content is: number of the layer, and offset and bytes in it, uncompressed.
        self.layer = layer
        self.offset = entry.offset
        self.size = entry.size
        self.xattrs = entry.kept_xattrs
        self.other_xattrs = entry.other_xattrs
        #: The first of its names, once the tree is walked.
        self.parent: Directory | None = None
        self.name = b""

    @property
    def is_regular(self) -> bool:
        return self.kind == REGULAR


class Directory:
    """A directory. ``fresh`` are the names in it that layer number ``fresh_layer`` gave something to."""

    __slots__ = (
        "children",
        "cleared_layer",
        "fresh",
        "fresh_layer",
        "mode",
        "mtime",
        "other_xattrs",
        "parent",
        "path",
        "xattrs",
    )

    def __init__(self, parent: Directory | None, mtime: int) -> None:
        self.parent = parent
        self.children: dict[bytes, Directory | Leaf] = {}
        self.mode = 0o755
        self.mtime = mtime
        self.xattrs: dict[bytes, bytes] | None = None
        self.other_xattrs = 0
        self.fresh: set[bytes] | None = None
        self.fresh_layer = 0
        #: The last layer that hid everything lower ones had in it.
        self.cleared_layer = 0
        #: Its path without slashes around, once the tree is walked.
        self.path = b""

    def describe(self, entry: Entry) -> None:
        """Take over an entry's attributes."""
        self.mode, self.mtime = entry.mode, entry.mtime
        self.xattrs, self.other_xattrs = entry.kept_xattrs, entry.other_xattrs


class Tree:
    """The root, and how to get anywhere below it."""

    def __init__(self) -> None:
        self.root = Directory(None, 0)
        self.layer = 0
        #: Nodes that were ever made: they cost memory also when a later entry hides them.
        self.made = 1
        self._steps = 0
        # Entries of a directory follow one another: the last parent is remembered until something is taken away.
        self._parent_parts: list[bytes] | None = None
        self._parent = self.root

    def begin_layer(self, layer: int) -> None:
        """What is put from now on belongs to that layer."""
        self.layer = layer
        self._parent_parts = None

    def parent_for(self, path: bytes, parts: list[bytes], mtime: int) -> Directory:
        """The directory for a new entry ``path``, whose parent has these parts; missing directories are made, 0755.

        Raises :class:`ImageBroken` when a file is in the way.
        """
        if parts != self._parent_parts:
            directory = self._walk(parts, path, make=mtime)
            assert directory is not None  # noqa: S101 - with ``make`` nothing is missing
            self._parent, self._parent_parts = directory, parts
        return self._parent

    def find_directory(self, parts: list[bytes], path: bytes) -> Directory | None:
        """The directory with these parts, symbolic links followed; None when there is none."""
        return self._walk(parts, path, make=None)

    def find(self, path: bytes) -> Directory | Leaf | None:
        """What has the name ``path``; links are followed up to its last component only."""
        parts = split(path, "the image")
        if not parts:
            return self.root
        directory = self.find_directory(parts[:-1], path)
        return directory.children.get(parts[-1]) if directory else None

    def put(self, directory: Directory, name: bytes, node: Directory | Leaf) -> None:
        """Give a name to a node; what had it before is gone."""
        earlier = directory.children.get(name)
        if earlier is not None and (isinstance(earlier, Directory) or earlier.kind == SYMLINK):
            self._parent_parts = None
        directory.children[name] = node
        self._freshen(directory, name)

    def touch(self, directory: Directory, name: bytes) -> None:
        """Note that the current layer has an entry of that name."""
        self._freshen(directory, name)

    def hide(self, directory: Directory, name: bytes) -> None:
        """Take away what lower layers have at that name; what the current layer put there or below stays.

        Not for the lowest layer: what it put where is not noted.
        """
        node = directory.children.get(name)
        if node is None:
            return
        self._parent_parts = None
        if not self._is_fresh(directory, name):
            del directory.children[name]
        elif isinstance(node, Directory):
            self.hide_below(node)

    def hide_below(self, directory: Directory) -> None:
        """Take away everything that lower layers have below a directory. Not for the lowest layer."""
        self._parent_parts = None
        todo = [directory]
        while todo:
            current = todo.pop()
            if current.cleared_layer == self.layer:
                # All it has come by since is this layer's own.
                continue
            current.cleared_layer = self.layer
            fresh = current.fresh if current.fresh_layer == self.layer and current.fresh else ()
            current.children = {name: node for name, node in current.children.items() if name in fresh}
            todo += [node for node in current.children.values() if isinstance(node, Directory)]

    def _walk(self, parts: list[bytes], path: bytes, *, make: int | None) -> Directory | None:
        current = self.root
        todo = parts[::-1]
        links = 0
        while todo:
            part = todo.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                current = current.parent or current
                continue
            node = current.children.get(part)
            if node is None:
                if make is None:
                    return None
                if len(part) > _NAME_MAX:
                    raise ImageBroken(f"the image has a name of {len(part)} bytes on the way to {printable(path)}")
                node = Directory(current, make)
                self.made += 1
                self.put(current, part, node)
            if isinstance(node, Directory):
                if make is not None:
                    self._freshen(current, part)
                current = node
            elif node.kind == SYMLINK:
                links += 1
                if links > _LINKS_MAX:
                    raise ImageBroken(f"the image has a loop of symbolic links on the way to {printable(path)}")
                if node.link.startswith(b"/"):
                    current = self.root
                target = node.link.split(b"/")
                self._steps += len(target)
                if self._steps > STEPS_MAX:
                    raise ImageBroken("the image's symbolic links take more steps to follow than any image needs")
                todo += target[::-1]
            elif make is None:
                return None
            else:
                raise ImageBroken(f"the image puts {printable(path)} below {printable(part)}, which is not a directory")
        return current

    def _freshen(self, directory: Directory, name: bytes) -> None:
        if not self.layer:
            return
        if directory.fresh_layer != self.layer or directory.fresh is None:
            directory.fresh, directory.fresh_layer = set(), self.layer
        directory.fresh.add(name)

    def _is_fresh(self, directory: Directory, name: bytes) -> bool:
        return directory.fresh_layer == self.layer and directory.fresh is not None and name in directory.fresh


def split(path: bytes, what: str) -> list[bytes]:
    """The parts of an entry's path. Raises :class:`ImageBroken` for one that climbs or that no kernel takes."""
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise ImageBroken(f"{what} has an entry with '..' in its path: {printable(path)}")
    if len(path) > PATH_MAX or any(len(part) > _NAME_MAX for part in parts):
        raise ImageBroken(f"{what} has an entry whose path is too long: {printable(path)} ({len(path)} bytes)")
    return parts
