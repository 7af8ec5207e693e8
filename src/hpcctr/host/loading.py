"""What ld.so of a container is told of the node's libraries: entries of its ``/etc/ld.so.cache``.

The cache is the one place that every glibc reads, whatever a program was linked with, and that no variable of the
caller's is needed for: LD_LIBRARY_PATH would come before the search paths of the image's own programs, and be handed on
to every child. A loader that reads no such cache (musl), or none at all (an image of static programs), cannot be told.
"""

from __future__ import annotations

import os
from dataclasses import replace

from hpcctr.host.edits import CacheEntry, HostEdits, LinkEdit
from hpcctr.host.elf import ElfFile
from hpcctr.host.ldcache import flags_of
from hpcctr.host.libraries import ShownFile, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hpcctr.image.record import ImageFacts

#: Links one after the other to a library (path_resolution(7)).
_LINKS_MAX = 40


def told(edits: HostEdits, facts: ImageFacts | None) -> HostEdits:
    """The edits with their cache entries: every library in a library folder by its SONAME, and every link there by its
    own name. A SONAME that is no file's name gets a link, as ldconfig makes it, for links that lead to it.

    With a warning where the image's loader cannot be told.
    """
    files = [file for file in shown(edits) if file.is_findable]
    if not files:
        return edits
    reason = cannot(facts)
    if reason:
        return replace(edits, warnings=(*edits.warnings, f"{reason}: libraries of the node are not found by name"))
    places = {os.path.normpath(file.target): file for file in files}
    links = {os.path.normpath(link.path): link for link in edits.links}
    added: list[LinkEdit] = []
    entries: dict[tuple[str, int], CacheEntry] = {}
    for folder in map(os.path.normpath, edits.library_folders):
        here = [(path, file) for path, file in places.items() if os.path.dirname(path) == folder]
        # A file with the very name comes before one that only says so.
        for path, file in sorted(here, key=lambda pair: os.path.basename(pair[0]) != pair[1].soname):
            named = os.path.join(folder, file.soname)
            if "/" not in file.soname and not file.is_in_directory and named not in places and named not in links:
                links[named] = LinkEdit(path=named, target=os.path.basename(path), origin=file.origin)
                added.append(links[named])
            _add(entries, file.soname, path, file)
        for path, link in links.items():
            if os.path.dirname(path) == folder and (library := _behind(link, places, links)) is not None:
                _add(entries, os.path.basename(path), path, library)
        for path, file in here:
            _add(entries, os.path.basename(path), path, file)
    return replace(edits, links=(*edits.links, *added), cache=(*edits.cache, *entries.values()))


def cannot(facts: ImageFacts | None) -> str:
    """Why the loader of an image cannot be told of libraries; empty where it can, or where nobody knows."""
    if facts is None or facts.libc == "glibc":
        return ""
    if facts.libc == "musl":
        return "the image's C library is musl, whose loader reads no cache and loads no library made for glibc"
    return "the image has no dynamic loader"


def _add(entries: dict[tuple[str, int], CacheEntry], name: str, path: str, file: ShownFile) -> None:
    flags = _flags(file.file)
    if flags is not None:
        entries.setdefault((name, flags), CacheEntry(soname=name, path=path, flags=flags, origin=file.origin))


def _flags(file: ElfFile) -> int | None:
    return flags_of(file) if file.is_shared else None


def _behind(link: LinkEdit, places: dict[str, ShownFile], links: dict[str, LinkEdit]) -> ShownFile | None:
    """The file of the node that a link leads to."""
    for _ in range(_LINKS_MAX):
        path = os.path.normpath(os.path.join(os.path.dirname(link.path), link.target))
        if path in places:
            return places[path]
        if path not in links:
            return None
        link = links[path]
    return None
