"""Merging: the headers of an image's layers, lowest first, are applied to a :class:`hpcctr.image.tree.Tree`.

Nothing is extracted and no root is needed. :mod:`hpcctr.image.treestream` then writes the tree as one tar stream.

Rules: OCI image-spec ``layer.md``; where it is silent, what containerd does when it applies a layer (``pkg/archive``,
``applyNaive``). Whiteouts and opaque marks hide what lower layers have, wherever in their layer they stand.
"""

from __future__ import annotations

from collections.abc import Iterator

from hpcctr.errors import ImageBroken
from hpcctr.image import tarstream
from hpcctr.image.tarstream import DIRECTORY, HARDLINK, SYMLINK, ByteStream, Entry, printable
from hpcctr.image.tree import Directory, Leaf, Tree, split

#: Entries an image may have in all its layers together, and nodes in its tree.
ENTRIES_MAX = 8_000_000
#: Bytes of all files of all layers together.
CONTENT_MAX = 2**40
#: The same with headers and padding.
UNCOMPRESSED_MAX = CONTENT_MAX + 2**36
#: Bytes of all names, link targets and extended attributes together: they are held in memory.
NAMES_MAX = 2**30
#: What an extended attribute takes beside its name and value.
_XATTR = 128
_OPAQUE = b".wh..wh..opq"
_WHITEOUT = b".wh."
#: What aufs kept for itself begins so.
_WHITEOUT_META = b".wh..wh."


class LayerMerge:
    """Applies layers one by one, lowest first."""

    def __init__(self) -> None:
        self.tree = Tree()
        self._entries = 0
        self._names = 0
        self._content = 0
        self._uncompressed = 0
        self._layers = 0

    def apply(self, chunks: Iterator[bytes], what: str) -> None:
        """Read one uncompressed layer to its end. Raises :class:`ImageBroken`; ``what`` names the layer."""
        self.tree.begin_layer(self._layers)
        self._layers += 1
        stream = ByteStream(self._bounded(chunks))
        for entry in tarstream.entries(stream, what):
            self._entries += 1
            self._names += len(entry.name) + len(entry.link)
            if entry.kept_xattrs:
                self._names += sum(_XATTR + len(key) + len(value) for key, value in entry.kept_xattrs.items())
            self._content += entry.size
            self._put(entry, what)
            self._require_within_limits()
        stream.drain()

    def _bounded(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Also what no entry speaks of costs time: padding, and whatever follows the archive's end."""
        for chunk in chunks:
            self._uncompressed += len(chunk)
            if self._uncompressed > UNCOMPRESSED_MAX:
                raise _too_large(UNCOMPRESSED_MAX)
            yield chunk

    def _require_within_limits(self) -> None:
        if max(self._entries, self.tree.made) > ENTRIES_MAX:
            raise ImageBroken(
                f"the image has more than {ENTRIES_MAX} entries", hint="split the data set from the image"
            )
        if self._names > NAMES_MAX:
            raise ImageBroken(f"the image has more than {NAMES_MAX} bytes of names and attributes")
        if self._content > CONTENT_MAX:
            raise _too_large(CONTENT_MAX)

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
            raise ImageBroken(
                f"{what} has a symbolic link with a target of {len(entry.link)} bytes: {printable(entry.name)}"
            )
        tree.made += 1
        tree.put(parent, name, Leaf(entry, tree.layer))

    def _white_out(self, entry: Entry, parts: list[bytes], name: bytes, what: str) -> None:
        if name.startswith(_WHITEOUT_META) and name != _OPAQUE:
            return
        hidden = name[len(_WHITEOUT) :]
        if name != _OPAQUE and hidden in (b"", b".", b".."):
            raise ImageBroken(f"{what} has a whiteout of nothing: {printable(entry.name)}")
        if self.tree.layer == 0:
            # Nothing lies below the lowest layer.
            return
        directory = self.tree.find_directory(parts, entry.name)
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
            raise ImageBroken(
                f"{what} has a hard link {printable(entry.name)} to {printable(entry.link)}, which is {problem}"
            )
        return target


def _too_large(limit: int) -> ImageBroken:
    return ImageBroken(f"the image has more than {limit} bytes", hint="split the data set from the image")
