"""The upper layer of a node container: mount points and generated files, and nothing else.

It is a small tmpfs of root's, below a directory only root may enter. The image below it is hostile in names and kinds
of its entries, so every name is looked up with :func:`hpcctr.engine.mounts.open_beneath`, component by component:
nothing follows a symbolic link of the image, and nothing is ever written anywhere but in the upper layer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from hpcctr.engine.furnishing import Furnishing, names_of
from hpcctr.engine.mounts import open_beneath
from hpcctr.engine.union import DEPTH_MAX, Names, Union, shown
from hpcctr.errors import TargetImpossible
from hpcctr.host.edits import HostEdits
from hpcctr.request import Target
from hpcctr.spec.mounts import BindMount

#: What every container has for enter to cover: the node's own trees.
NODE_TREES = (b"/proc", b"/sys", b"/dev")
_O_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, kw_only=True)
class UpperLayer:
    """An upper layer being made; both are descriptors of directories."""

    image: int
    upper: int

    def make(
        self,
        *,
        targets: tuple[Target, ...],
        etc: Mapping[str, bytes],
        anchor: str,
        edits: HostEdits,
        image_name: str,
    ) -> tuple[BindMount, ...]:
        """Make everything; the mounts of the host's that the runtime is to make.

        ``targets`` have parents before children; ``etc`` is name below /etc → content. Raises :class:`TargetImpossible`
        for a place the image does not allow, :class:`FeatureUnusable` where an edit is the reason, OSError when the
        tmpfs is full.
        """
        for target in targets:
            if target.path.count(b"/") > DEPTH_MAX:
                raise _impossible(target, f"it is more than {DEPTH_MAX} directories deep", "choose a shorter path")
        self._write(self.upper, anchor.lstrip("/").encode(), b"", mode=0o755)
        for tree in (*NODE_TREES, b"/etc"):
            self._make_point(Target("d", tree), remedy=f"rebuild the image with a directory {tree.decode()}")
        etc_directory = self._upper_directory(b"etc")
        try:
            for name, content in etc.items():
                self._write(etc_directory, name.encode(), content, mode=0o644)
        finally:
            os.close(etc_directory)
        union = Union(image=self.image, upper=self.upper)
        binds = Furnishing(union=union, image=image_name, targets=targets).make(edits)
        directories = {names_of(os.fsencode(bind.target)) for bind in binds if bind.kind == "d"}
        for target in outermost(targets):
            if not _is_below(names_of(target.path), directories):
                self._make_point(target)
        return binds

    def _upper_directory(self, name: bytes) -> int:
        """The directory at the top of the upper layer, re-created from the image's when it is not there."""
        try:
            return os.open(name, _O_DIR, dir_fd=self.upper)
        except FileNotFoundError:
            lower = open_beneath(self.image, name)
        try:
            _make_directory(self.upper, name, stat.S_IMODE(os.fstat(lower).st_mode))
        finally:
            os.close(lower)
        return os.open(name, _O_DIR, dir_fd=self.upper)

    def _write(self, directory: int, name: bytes, content: bytes, *, mode: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(name, flags, 0o600, dir_fd=directory), "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), mode)

    def _make_point(self, target: Target, *, remedy: str = "give it another place inside: -v SRC:DST") -> None:
        names = target.path[1:].split(b"/")
        with _Walk.start(self) as walk:
            for position, name in enumerate(names, 1):
                is_last = position == len(names)
                found = walk.step(name, target)
                if found is None:
                    walk.create(names[position - 1 :], target)
                    return
                if is_last and found != target.kind:
                    wanted = "a directory" if target.kind == "d" else "a file"
                    raise _impossible(
                        target,
                        f"it is {_kind_word(found)} in the image, where {wanted} is to be mounted",
                        remedy,
                    )
                if not is_last and found != "d":
                    raise _impossible(
                        target,
                        f"{shown(b'/' + b'/'.join(names[:position]))} is a file in the image",
                        remedy,
                    )


def _is_below(names: Names, directories: set[Names]) -> bool:
    """Whether a caller's mount point is to be in a directory of the host's. Whether it is there, enter finds out with
    the caller's own rights.
    """
    return any(names[:length] in directories for length in range(1, len(names)))


def outermost(targets: tuple[Target, ...]) -> Iterator[Target]:
    """The targets that lie in the image itself: what is below another target must exist in the caller's directory."""
    seen: set[bytes] = set()
    for target in targets:
        parent = target.path
        while parent and parent not in seen:
            parent = parent.rpartition(b"/")[0]
        if not parent:
            seen.add(target.path)
            yield target


@dataclass(kw_only=True)
class _Walk:
    """A place in image and upper layer at once, going down. A side that ends there has no descriptor any more."""

    layer: UpperLayer
    lower: int | None
    upper: int | None
    #: Names and modes of the directories passed since the upper layer ended: they exist in the image only.
    only_lower: list[tuple[bytes, int]] = field(default_factory=list)
    #: The last directory that both have, or that the upper layer alone has.
    last_upper: int

    @classmethod
    @contextlib.contextmanager
    def start(cls, layer: UpperLayer) -> Iterator[_Walk]:
        walk = cls(layer=layer, lower=os.dup(layer.image), upper=os.dup(layer.upper), last_upper=os.dup(layer.upper))
        try:
            yield walk
        finally:
            for descriptor in (walk.lower, walk.upper, walk.last_upper):
                if descriptor is not None:
                    os.close(descriptor)

    def step(self, name: bytes, target: Target) -> str | None:
        """Go down to ``name``. Its kind as the container will see it, ``d`` or ``f``; None when nothing is there."""
        upper_kind = self._step_upper(name)
        if upper_kind == "l":
            raise _impossible(
                target,
                f"{shown(name)} is a symbolic link that a feature of the node has put there",
                "name the place it leads to",
            )
        if upper_kind == "f":
            return "f"
        lower_kind, mode = self._step_lower(name, target)
        if upper_kind is None and lower_kind == "d":
            self.only_lower.append((name, mode))
        return upper_kind or lower_kind

    def _step_upper(self, name: bytes) -> str | None:
        if self.upper is None:
            return None
        here, self.upper = self.upper, None
        try:
            status = os.stat(name, dir_fd=here, follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode):
                return "l" if stat.S_ISLNK(status.st_mode) else "f"
            self.upper = os.open(name, _O_DIR, dir_fd=here)
        except FileNotFoundError:
            return None
        finally:
            os.close(here)
        # In this order: a number closed and not replaced would be closed again, when it may be another thread's.
        last, self.last_upper = self.last_upper, os.dup(self.upper)
        os.close(last)
        return "d"

    def _step_lower(self, name: bytes, target: Target) -> tuple[str | None, int]:
        if self.lower is None:
            return None, 0
        here, self.lower = self.lower, None
        try:
            self.lower = open_beneath(here, name)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None, 0
            if error.errno == errno.ELOOP:
                raise _impossible(
                    target,
                    f"{shown(name)} is a symbolic link in the image, and nothing is mounted through one",
                    f"name {_link(here, name)}",
                ) from None
            raise _impossible(
                target, f"{shown(name)} cannot be looked up in the image: {error.strerror}", "hpcctr inspect IMAGE"
            ) from None
        finally:
            os.close(here)
        mode = os.fstat(self.lower).st_mode
        return ("d" if stat.S_ISDIR(mode) else "f"), stat.S_IMODE(mode)

    def create(self, names: list[bytes], target: Target) -> None:
        """Make the rest of the path in the upper layer, its parents that only the image has first."""
        parents = [*self.only_lower, *((name, 0o755) for name in names[:-1])]
        for name, mode in parents:
            _make_directory(self.last_upper, name, mode)
            below = os.open(name, _O_DIR, dir_fd=self.last_upper)
            last, self.last_upper = self.last_upper, below
            os.close(last)
        if target.kind == "d":
            _make_directory(self.last_upper, names[-1], 0o755)
        else:
            self.layer._write(self.last_upper, names[-1], b"", mode=0o644)


def _make_directory(parent: int, name: bytes, mode: int) -> None:
    os.mkdir(name, 0o700, dir_fd=parent)
    # Sticky stays; set-user-ID and set-group-ID have no place on a directory of root's.
    os.chmod(name, mode & 0o1777, dir_fd=parent)


def _link(directory: int, name: bytes) -> str:
    try:
        return f"the place it leads to, {shown(os.readlink(name, dir_fd=directory))}"
    except OSError:
        return "the place it leads to"


def _kind_word(kind: str) -> str:
    return "a directory" if kind == "d" else "a file"


def _impossible(target: Target, reason: str, hint: str) -> TargetImpossible:
    return TargetImpossible(f"mount target {shown(target.path)}: {reason}", hint=hint)
