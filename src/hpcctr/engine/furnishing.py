"""What the site adds to a container, made in its upper layer before a runtime sees it: links, generated files, mount
points, and what ld.so is told.

In this order: links and files replace what the image has and may lead the way for what follows; then mount points,
outer first. Where an edit's own directory is mounted nothing can be made: what is to be there must exist in it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hpcctr.engine.mounts import open_beneath
from hpcctr.engine.union import Names, PathLost, Union, shown
from hpcctr.errors import FeatureUnusable
from hpcctr.host.edits import MOUNTS_MAX, FileEdit, HostEdits, LinkEdit, MountEdit
from hpcctr.host.trusted import Look, Trusted
from hpcctr.request import Target
from hpcctr.spec.mounts import BindMount
from hpcctr.spec.process import ANCHOR

#: Bytes of the image's own /etc/ld.so.cache, of what is made of it, and of all files of the site's together.
CACHE_MAX = 4 << 20
_MERGED_MAX = CACHE_MAX + (2 << 20)
FILES_MAX = 1 << 20
#: Where a runtime runs hooks in the host's own view. At createContainer runc has the image's root as working directory,
#: and hands on descriptors that lead to the container's init.
HOOK_STAGES = ("prestart", "createRuntime")
_CACHE = (b"etc", b"ld.so.cache")
#: Trees that every container has of the node, and what the engine itself needs in it.
_RESERVED = ((b"proc",), (b"sys",), (b"dev",), (ANCHOR[1:].encode(),))
_NAME_MAX = 255
_PATH_MAX = 4095


def room(edits: HostEdits) -> tuple[int, int]:
    """Bytes and inodes that an upper layer needs for the edits, at most."""
    paths = _paths(edits)
    # A link of the image may lead to a longer path; few do.
    inodes = sum(path.count("/") + 2 for path in paths)
    return sum(len(edit.content) + 4096 for edit in edits.files) + (_MERGED_MAX if edits.cache else 0), inodes


def covered(edits: HostEdits, targets: Sequence[Target]) -> tuple[str, ...]:
    """Warnings: what of the edits a program does not see, since the caller's own mounts lie over it."""
    theirs = [names_of(target.path) for target in targets]
    over: dict[Names, list[str]] = {}
    for path in _paths(edits):
        place = _at_or_above(names_of(os.fsencode(path)), theirs)
        if place is not None:
            over.setdefault(place, []).append(path)
    return tuple(
        f"{shown(b'/' + b'/'.join(place))} of yours is mounted over what the node puts there: "
        + shown(os.fsencode(paths[0]))
        + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
        for place, paths in over.items()
    )


def _paths(edits: HostEdits) -> list[str]:
    made: list[LinkEdit | FileEdit] = [*edits.links, *edits.files]
    return [edit.target for edit in edits.mounts] + [edit.path for edit in made]


def names_of(path: bytes) -> Names:
    """A plain absolute path as names."""
    return tuple(name for name in path.split(b"/") if name)


@dataclass(kw_only=True)
class Furnishing:
    """The edits of one container being made. ``targets`` are the caller's mount points, ``image`` is its name."""

    union: Union
    image: str
    targets: Sequence[Target]
    look: Look = field(default_factory=Look)

    def make(self, edits: HostEdits) -> tuple[BindMount, ...]:
        """Make everything; the mounts the runtime is to make, outer before inner.

        Raises :class:`FeatureUnusable`, and OSError when the upper layer is full.
        """
        _require_bounds(edits)
        self._require_hooks(edits)
        theirs = [names_of(target.path) for target in self.targets]
        made: dict[Names, LinkEdit | FileEdit] = {}
        several: list[LinkEdit | FileEdit] = [*edits.links, *edits.files]
        for edit in sorted(several, key=lambda edit: edit.path.count("/")):
            place = self._place(edit.path, edit.origin, edit.path)
            if _at_or_above(place, theirs) is None:
                self._make(place, edit)
                made[place] = edit
        binds = self._mount_points(edits.mounts, theirs)
        self._require_in_sources(made, binds)
        if edits.cache and _at_or_above(_CACHE, theirs) is None and _at_or_above(_CACHE, list(binds)) is None:
            self._tell_ld_so(edits)
        return tuple(binds.values())

    # links and files

    def _make(self, place: Names, edit: LinkEdit | FileEdit) -> None:
        found = self.union.look(place)
        if found is not None and found.kind == "d":
            what = "a link" if isinstance(edit, LinkEdit) else "a file"
            raise self._unusable(edit.origin, edit.path, f"it is a directory in the image, where {what} is to be")
        self.union.make_parents(place)
        if isinstance(edit, LinkEdit):
            text = os.fsencode(edit.target)
            if not text or len(text) > _PATH_MAX or b"\0" in text:
                raise self._unusable(edit.origin, edit.path, "a link cannot hold such a text")
            self.union.link(place, text)
        else:
            self.union.write(place, edit.content)
        self.union.forget()

    def _tell_ld_so(self, edits: HostEdits) -> None:
        from hpcctr.host.ldcache import merged  # noqa: PLC0415 - one launch in many needs it

        content = merged(self._ld_so_cache(), edits.cache)
        if len(content) > _MERGED_MAX:
            raise FeatureUnusable(
                f"{edits.cache[0].origin}: ld.so would be told of more than {_MERGED_MAX} bytes of names",
                hint="fewer libraries in one profile",
            )
        self.union.make_parents(_CACHE)
        self.union.write(_CACHE, content)

    def _ld_so_cache(self) -> bytes:
        """The image's own; empty when it has none, or something else in its place."""
        try:
            descriptor = open_beneath(self.union.image, b"/".join(_CACHE))
        except OSError:
            return b""
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > CACHE_MAX:
                return b""
            # By the number and not by name: this very file.
            with open(f"/proc/self/fd/{descriptor}", "rb") as file:
                return file.read(CACHE_MAX)
        except OSError:
            return b""
        finally:
            os.close(descriptor)

    # mounts

    def _mount_points(self, edits: Iterable[MountEdit], theirs: Sequence[Names]) -> dict[Names, BindMount]:
        """The mounts by their places. Of two that links of the image lead to one place the later counts."""
        binds: dict[Names, BindMount] = {}
        directories: set[Names] = set()
        for edit in edits:
            source = self._source(edit)
            place = self._place(edit.target, edit.origin, edit.target, directories, edit.kind, binds)
            if _at_or_above(place, theirs) is not None:
                continue
            if _at_or_above(place[:-1], list(directories)) is None:
                self._make_point(place, edit)
            binds.pop(place, None)
            binds[place] = BindMount(
                source=source.path,
                target=os.fsdecode(b"/" + b"/".join(place)),
                kind=edit.kind,
                is_read_only=edit.is_read_only or (edit.kind == "f" and "ro" in source.options),
                is_noexec=edit.is_noexec or (edit.kind == "f" and "noexec" in source.options),
                identity=source.identity,
                origin=edit.origin,
            )
            if edit.kind == "d":
                directories.add(place)
                self.union.forget()
        return dict(sorted(binds.items(), key=lambda item: len(item[0])))

    def _source(self, edit: MountEdit) -> Trusted:
        source = self.look.require(edit.source, origin=edit.origin)
        if source.kind != edit.kind:
            is_now = "a directory" if source.kind == "d" else "a file"
            raise FeatureUnusable(f"{edit.origin}: {edit.source} is {is_now}", hint=f"ls -ld {edit.source}")
        if edit.identity and edit.identity != source.identity:
            raise FeatureUnusable(f"{edit.origin}: {edit.source} has just changed", hint="try again")
        if edit.kind == "d":
            self._require_bindable(source.path, edit)
        return source

    def _require_bindable(self, source: str, edit: MountEdit) -> None:
        """A recursive clone leaves unbindable mounts out and so shows what they cover (mount_namespaces(7))."""
        for entry in self.look.mounts():
            if "unbindable" in entry.propagation and f"{entry.target}/".startswith(f"{source.rstrip('/')}/"):
                raise FeatureUnusable(
                    f"{edit.origin}: {edit.source} has an unbindable mount at {entry.target}, which hides something",
                    hint="name directories beside it: findmnt -o TARGET,PROPAGATION",
                )

    def _make_point(self, place: Names, edit: MountEdit) -> None:
        found = self.union.look(place)
        if edit.kind == "d":
            if found is not None and found.kind == "d":
                return
            if found is not None and found.kind == "f":
                raise self._unusable(
                    edit.origin, edit.target, "it is a file in the image, where a directory is to be mounted"
                )
            self.union.make_parents(place)
            # Nothing is mounted through a link: it is hidden by a plain directory.
            self.union.clear(place)
            self.union.make_directory(place, 0o755)
            return
        if found is not None and found.kind == "d":
            raise self._unusable(edit.origin, edit.target, "it is a directory in the image, not a file")
        self.union.make_parents(place)
        # Of whatever kind the image's is, a link, a device, a pipe: a plain file hides it.
        self.union.write(place, b"")
        if found is not None and found.kind == "l":
            self.union.forget()

    # places

    def _place(
        self,
        path: str,
        origin: str,
        said: str,
        mounted: Iterable[Names] = (),
        kind: str = "",
        binds: dict[Names, BindMount] | None = None,
    ) -> Names:
        """Where ``path`` leads in the image. What lies in a mounted directory must be there, of this kind."""
        names = names_of(_encoded(path, origin))
        plain = "/" + "/".join(os.fsdecode(name) for name in names)
        if path != plain or not names or b".." in names or b"." in names:
            raise self._unusable(origin, said, "not a plain absolute path")
        if len(path) > _PATH_MAX or max(map(len, names)) > _NAME_MAX:
            raise self._unusable(origin, said, "a name too long")
        inside = set(mounted)
        try:
            place, rest = self.union.follow(b"/" + b"/".join(names), mounted=inside)
        except PathLost as lost:
            raise self._unusable(origin, said, str(lost)) from None
        if _at_or_above(place, _RESERVED) is not None:
            where = "" if place == names else f", where a link of the image leads ({shown(b'/' + b'/'.join(place))})"
            raise self._unusable(origin, said, f"/proc, /sys and /dev are the caller's own{where}")
        if rest:
            assert binds is not None  # noqa: S101 - links and files are placed while nothing is mounted
            self._require_there(binds[place], rest, kind, origin, said)
        return (*place, *rest)

    def _require_there(self, outer: BindMount, rest: Names, kind: str, origin: str, said: str) -> None:
        """The place must exist below the source that will be mounted over it, on a way without links."""
        if b".." in rest:
            raise self._unusable(origin, said, f"a link of the image leads out of {outer.target}, which is mounted")
        mode = _mode_beneath(outer.source, rest)
        if mode is None or stat.S_ISLNK(mode) or stat.S_ISDIR(mode) != (kind == "d"):
            what = "directory" if kind == "d" else "file"
            raise FeatureUnusable(
                f"{origin}: {shown(os.fsencode(said))} lies in {outer.target}, which is {outer.source} of the host "
                f"({outer.origin}), and there is no such {what}",
                hint=f"ls -ld {outer.source}/{shown(b'/'.join(rest))}",
            )

    def _require_in_sources(self, made: dict[Names, LinkEdit | FileEdit], binds: dict[Names, BindMount]) -> None:
        """A link below a mounted directory is seen only if the directory itself has it."""
        for place, edit in made.items():
            outer = _at_or_above(place[:-1], list(binds))
            if outer is None:
                continue
            bind, rest = binds[outer], place[len(outer) :]
            source = os.path.join(bind.source, *map(os.fsdecode, rest))
            with contextlib.suppress(OSError):
                if isinstance(edit, LinkEdit) and os.readlink(source) == edit.target:
                    continue
            raise FeatureUnusable(
                f"{edit.origin}: {edit.path} lies in {bind.target}, which is {bind.source} of the host "
                f"({bind.origin}), and is something else there",
                hint=f"ls -ld {source}",
            )

    def _require_hooks(self, edits: HostEdits) -> None:
        for hook in edits.hooks:
            if hook.stage not in HOOK_STAGES:
                raise FeatureUnusable(
                    f"{hook.origin}: hook {hook.path} is to run at {hook.stage}, where runtimes work in the image's "
                    "root directory",
                    hint=f"another stage in {hook.origin}: {' or '.join(HOOK_STAGES)}",
                )
            program = self.look.require(hook.path, origin=hook.origin)
            if program.kind != "f" or not os.access(program.path, os.X_OK):
                raise FeatureUnusable(f"{hook.origin}: hook {hook.path} is not a program", hint=f"ls -l {hook.path}")

    def _unusable(self, origin: str, path: str, reason: str) -> FeatureUnusable:
        return FeatureUnusable(
            f"{origin}: {shown(os.fsencode(path))}: {reason} (image {self.image})",
            hint="another place in the file that names it, or another image",
        )


def _mode_beneath(source: str, names: Names) -> int | None:
    """Kind and permission bits of what is below a directory of the host's, on a way without links."""
    top = os.open(source, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = open_beneath(top, b"/".join(names), is_link_opened=True, is_mount_crossed=True)
    except OSError:
        return None
    finally:
        os.close(top)
    try:
        return os.fstat(found).st_mode
    finally:
        os.close(found)


def _at_or_above(place: Names, several: Sequence[Names]) -> Names | None:
    """The one of ``several`` that ``place`` is, or lies below."""
    return next((names for names in several if place[: len(names)] == names), None)


def _encoded(path: str, origin: str) -> bytes:
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        raise FeatureUnusable(f"{origin}: {ascii(path)} is not UTF-8", hint="rename it") from None
    if not path.startswith("/") or b"\0" in encoded:
        raise FeatureUnusable(
            f"{origin}: {ascii(path)} is not an absolute path", hint="name it from the root directory"
        )
    return encoded


def _require_bounds(edits: HostEdits) -> None:
    for what, several in (("mounts", edits.mounts), ("links", edits.links), ("files", edits.files)):
        if len(several) > MOUNTS_MAX:
            raise FeatureUnusable(
                f"the features of this launch have {len(several)} {what}, {MOUNTS_MAX} are possible",
                hint="fewer features, or directories instead of files in a profile",
            )
    if sum(len(edit.content) for edit in edits.files) > FILES_MAX:
        raise FeatureUnusable(
            f"{edits.files[0].origin}: generated files of more than {FILES_MAX} bytes", hint="fewer features"
        )
