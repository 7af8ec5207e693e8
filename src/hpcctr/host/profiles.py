"""Site profiles: one host feature a file, ``/etc/hpcctr/profiles.d/NAME.toml``.

A file names libraries, devices, directories and files of the node; what they are on this node is found out at a launch.
Keys are closed: a word nobody knows is an error. What was parsed is kept by the files' content, as policy is: there is
no edit that is not seen.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from glob import glob, has_magic

from hpcctr import rootfiles
from hpcctr.errors import FeatureUnusable
from hpcctr.host import libraries
from hpcctr.host.edits import DeviceEdit, EnvEdit, HostEdits, MountEdit, NeedEdit, joined
from hpcctr.host.ldcache import HostCache
from hpcctr.host.loading import cannot
from hpcctr.host.profile_written import BYTES_MAX, Written, is_never, parse
from hpcctr.host.trusted import Look, Trusted, identity_of
from hpcctr.rootfiles import require_only_roots_way

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hpcctr.image.record import ImageFacts

#: Files of a profile directory, and matches of one glob.
FILES_MAX = 200
_MATCHES_MAX = 256


@dataclass(frozen=True, kw_only=True)
class Profile(Written):
    """One host feature, and what it is on this node."""

    @classmethod
    def of(cls, written: Written) -> Profile:
        """The profile of what a file says."""
        return cls(**{field.name: getattr(written, field.name) for field in fields(written)})

    def missing(self, host: HostCache) -> tuple[str, ...]:
        """The words, other than optional ones, that find nothing on this node."""
        words = [word for word in self.libraries if not libraries.found(word, host)]
        words += [word for word in self.devices if not _nodes(word)]
        words += [shown.path for shown in (*self.directories, *self.files) if not _paths(shown.path)]
        return tuple(word for word in dict.fromkeys(words) if word not in self.optional)

    def edits(self, facts: ImageFacts | None, host: HostCache, *, is_asked: bool) -> HostEdits:
        """What the profile adds to a container on this node.

        A profile that nobody asked for adds nothing where the node lacks what it is about, or where the image's loader
        could not be told of its libraries. Raises :class:`FeatureUnusable`.
        """
        missing = self.missing(host)
        if missing:
            if is_asked:
                raise FeatureUnusable(
                    f"host feature {self.name}: this node has no {_words(missing)}",
                    hint=f"run where the node has it, or edit {self.path} (optional)",
                )
            return HostEdits(notes=(f"{self.name}: left out, this node has no {_words(missing)}",))
        reason = cannot(facts) if self.libraries else ""
        if reason and not is_asked:
            return HostEdits(notes=(f"{self.name}: left out, {reason}",))
        shown = self._shown()
        plugins = [os.path.join(mount.source, name) for mount in shown if mount.kind == "d" for name in _plugins(mount)]
        programs = [mount.source for mount in shown if mount.kind == "f"]
        injected = libraries.inject(
            [word for word in self.libraries if libraries.found(word, host)],
            facts=facts,
            origin=self.path,
            host=host,
            replace=self.replace,
            beside=[*plugins, *programs],
            root_owned=self.root_owned,
        )
        rest = HostEdits(
            env=tuple(EnvEdit(name=name, value=value, origin=self.path) for name, value in self.env),
            mounts=tuple(shown),
            devices=tuple(self._devices()),
            needs=tuple(self._needs()),
        )
        return joined([rest, injected])

    def _shown(self) -> list[MountEdit]:
        look = Look() if self.root_owned else None
        mounts: dict[str, MountEdit] = {}
        for kind, entries in (("d", self.directories), ("f", self.files)):
            for entry in entries:
                for path in _paths(entry.path):
                    trusted = look.require(path, origin=self.path) if look is not None else _as_it_is(path, self.path)
                    if trusted.kind != kind:
                        key = "files" if kind == "d" else "directories"
                        raise FeatureUnusable(
                            f"{self.path}: {path} belongs into {key}, by what it is", hint=f"edit {self.path}"
                        )
                    _require_allowed(trusted.path, self.path, path)
                    mounts[path] = self._mount(trusted, path, is_read_only=entry.is_read_only)
                    if kind == "d":
                        for target, source in _led_to(trusted.path, path):
                            behind = look.require(source, origin=self.path) if look else _as_it_is(source, self.path)
                            mounts.setdefault(target, self._mount(behind, target))
        return list(mounts.values())

    def _mount(self, trusted: Trusted, target: str, *, is_read_only: bool = True) -> MountEdit:
        return MountEdit(
            source=trusted.path,
            target=target,
            kind=trusted.kind,
            origin=self.path,
            is_read_only=is_read_only,
            identity=trusted.identity,
        )

    def _devices(self) -> Iterable[DeviceEdit]:
        for path in dict.fromkeys(path for word in self.devices for path in _nodes(word)):
            status = os.stat(path)
            yield DeviceEdit(
                path=path,
                kind="b" if stat.S_ISBLK(status.st_mode) else "c",
                major=os.major(status.st_rdev),
                minor=os.minor(status.st_rdev),
                permissions="rw",
                device=self.name,
                origin=self.path,
            )

    def _needs(self) -> Iterable[NeedEdit]:
        if self.memlock is not None:
            yield NeedEdit(what="memlock", least=self.memlock, origin=self.name)
        if self.shm_bytes is not None:
            yield NeedEdit(what="shm", least=self.shm_bytes, origin=self.name)


def load(directory: str, *, root_owned: bool = True) -> Mapping[str, Profile]:
    """The profiles of ``directory`` by name; none when it does not exist.

    Names of files that begin with a dot, or do not end in ``.toml``, are no profiles. Without ``root_owned`` files may
    be anybody's: for trying out what is to become a profile. Raises :class:`FeatureUnusable` for a file that is wrong,
    :class:`PolicyUnusable` for one that is not root's.
    """
    if root_owned:
        require_only_roots_way(os.path.dirname(directory))
    contents = (
        rootfiles.contents(
            directory,
            bytes_max=BYTES_MAX,
            files_max=FILES_MAX,
            root_owned=root_owned,
            too_many=lambda text: FeatureUnusable(text, hint="remove those that nobody uses"),
        )
        or []
    )
    with _parsing:
        global _last  # noqa: PLW0603
        key = (directory, root_owned, contents)
        if _last is None or _last[0] != key:
            profiles = [Profile.of(parse(raw, f"{directory}/{name}", root_owned=root_owned)) for name, raw in contents]
            _last = (key, {profile.name: profile for profile in profiles})
        return _last[1]


#: Parsing takes many times what reading does: of launches at once that find an edit, one parses it.
_parsing = threading.Lock()
_last: tuple[tuple[str, bool, list[tuple[str, bytes]]], dict[str, Profile]] | None = None


def _require_allowed(real: str, path: str, word: str) -> None:
    if is_never(real):
        raise FeatureUnusable(f"{path}: {word} leads to {real}, which is no profile's", hint=f"edit {path}")


def _paths(word: str) -> list[str]:
    """What a path or a glob of paths is on this node."""
    if has_magic(word):
        return [path for path in sorted(glob(word))[:_MATCHES_MAX] if not is_never(path)]
    return [word] if os.path.exists(word) else []


def _nodes(word: str) -> list[str]:
    """Device nodes among what a word is on this node."""
    found = []
    for path in sorted(glob(word))[:_MATCHES_MAX] if has_magic(word) else [word]:
        try:
            kind = os.stat(path).st_mode
        except OSError:
            continue
        if stat.S_ISCHR(kind) or stat.S_ISBLK(kind):
            found.append(path)
    return found


def _plugins(mount: MountEdit) -> list[str]:
    return libraries.names_in(mount.source)


def _led_to(directory: str, target: str) -> Iterable[tuple[str, str]]:
    """Where links of plug-ins in a directory lead, if out of it: the place inside, and the file of the node.

    rdma-core has such links, to libraries that programs are linked with as well.
    """
    for name in libraries.names_in(directory):
        path = os.path.join(directory, name)
        if not os.path.islink(path):
            continue
        real = os.path.realpath(path)
        if os.path.dirname(real) == directory or not os.path.isfile(real):
            continue
        place = os.path.normpath(os.path.join(target, os.readlink(path)))
        # A link to another link beside it leads where that one does.
        if os.path.dirname(place) != target and not is_never(place):
            yield place, real


def _as_it_is(path: str, origin: str) -> Trusted:
    """A path of anybody's: for trying out."""
    real = os.path.realpath(path)
    try:
        status = os.stat(real)
    except OSError as error:
        raise FeatureUnusable(f"{origin}: {path}: {(error.strerror or '').lower()}", hint=f"ls -l {path}") from None
    return Trusted(path=real, kind="d" if stat.S_ISDIR(status.st_mode) else "f", identity=identity_of(status))


def _words(words: Collection[str]) -> str:
    return ", ".join(words)
