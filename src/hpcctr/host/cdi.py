"""The node's CDI devices: what ``/etc/cdi`` and ``/var/run/cdi`` describe, by qualified name.

A broken file is recorded and left out, the others stay usable. Files are read at every load, so an edit counts from the
next launch on; what was parsed is kept by content, so a load costs the reading. Only what nobody but root can write is
believed: devices, mounts and hooks of these files are root's words.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from hpcctr.errors import FeatureUnknown, FeatureUnusable, PolicyUnusable
from hpcctr.host import cdi_written
from hpcctr.host.cdi_inject import CdiFile, Described, Injection
from hpcctr.host.cdi_text import Wrong
from hpcctr.host.cdi_written import BYTES_MAX, Document
from hpcctr.host.edits import HostEdits
from hpcctr.host.trusted import require_only_roots
from hpcctr.rootfiles import require_only_roots_way

#: Of one directory.
FILES_MAX = 200
#: Of one launch.
ASKED_MAX = 128
#: Parsed files that are kept; what a node has is one to three.
_KEPT_MAX = 32
_WRITABLE = stat.S_IWGRP | stat.S_IWOTH
_GENERATE = (
    "describe it: nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml,"
    " amd-ctk cdi generate --output=/etc/cdi/amd.json or intel-cdi-specs-generator --cdi-dir=/etc/cdi gpu"
)

#: Parsing takes many times what reading does: of launches at once that find a new file, one parses it.
_parsing = threading.Lock()
#: By digest of the content, oldest first: the document, or what is wrong with it.
_kept: dict[bytes, Document | str] = {}


@dataclass(frozen=True, kw_only=True)
class FileError:
    """A file or directory that is not used, or a device that two files want to describe, and why."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class CdiProblem:
    """What a doctor finds wrong with a device or a file, and what mends it."""

    path: str
    #: Qualified name; empty when it is the file's.
    device: str
    text: str
    hint: str


@dataclass(frozen=True, kw_only=True)
class Registry:
    """Devices of all files, in order of name."""

    directories: tuple[str, ...]
    devices: Mapping[str, Described]
    #: Names that files of one directory describe twice, and those files: unusable.
    conflicts: Mapping[str, tuple[str, ...]]
    errors: tuple[FileError, ...]
    root_owned: bool = True

    @classmethod
    def load(cls, directories: Sequence[str], *, root_owned: bool = True) -> Registry:
        """What ``*.json`` and ``*.yaml`` of the directories describe; a device in a later directory replaces one of the
        same name in an earlier. Raises nothing: see :attr:`errors`.
        """
        files: list[CdiFile] = []
        errors: list[FileError] = []
        for priority, directory in enumerate(directories):
            for path, found in _files_of(directory, errors, root_owned=root_owned):
                if isinstance(found, str):
                    errors.append(FileError(path=path, reason=found))
                else:
                    files.append(CdiFile(path=path, priority=priority, document=found))
        devices, conflicts = _resolved(files, errors)
        return cls(
            directories=tuple(directories),
            devices=devices,
            conflicts=conflicts,
            errors=tuple(errors),
            root_owned=root_owned,
        )

    def names(self) -> tuple[str, ...]:
        """Qualified names of the usable devices."""
        return tuple(self.devices)

    def by_file(self) -> dict[str, tuple[str, ...]]:
        """Files, and the qualified names of the devices that count as theirs."""
        found: dict[str, list[str]] = {}
        for name, described in self.devices.items():
            found.setdefault(described.file.path, []).append(name)
        return {path: tuple(names) for path, names in sorted(found.items())}

    def inject(
        self,
        names: Sequence[str],
        *,
        allowed_hooks: Collection[str],
        caller_gids: Collection[int],
        image_env: Iterable[str] = (),
    ) -> HostEdits:
        """All edits of these devices, or none: one that cannot be had is an error.

        ``image_env`` is the image's, for what its libraries may want of the driver. Raises :class:`FeatureUnknown`,
        :class:`FeatureUnusable`.
        """
        names = tuple(dict.fromkeys(names))
        if len(names) > ASKED_MAX:
            raise FeatureUnknown(f"{len(names)} devices asked for, {ASKED_MAX} are possible", hint="ask for fewer")
        for name in names:
            if name not in self.devices:
                raise self.unknown(name)
        injection = Injection(
            allowed_hooks=allowed_hooks, caller_gids=caller_gids, image_env=image_env, root_owned=self.root_owned
        )
        injection.add([self.devices[name] for name in names])
        return injection.edits()

    def unknown(self, name: str) -> FeatureUnknown:
        """The error for a name that is no usable device."""
        shown = name[:200]
        if name in self.conflicts:
            return FeatureUnknown(
                f"device {shown} is described twice, by {' and '.join(self.conflicts[name])}", hint="remove one of them"
            )
        parts = cdi_written.split_name(name)
        if parts is None:
            return FeatureUnknown(
                f"device {shown!r} is no name of CDI", hint="as in --device nvidia.com/gpu=0; hpcctr doctor lists them"
            )
        same_kind = [known for known in self.devices if known.startswith(parts[0] + "=")]
        text = f"device {shown}: no CDI file of this node describes it"
        if self.errors:
            text += f"; {self.errors[0].path} is not used: {self.errors[0].reason}"
        if same_kind or self.devices:
            known = ", ".join((same_kind or list(self.devices))[:12])
            return FeatureUnknown(text, hint=f"known here: {known}")
        return FeatureUnknown(text, hint=self.how_to_describe())

    def how_to_describe(self) -> str:
        """The hint for a node whose hardware no file describes."""
        return "hpcctr doctor" if self.errors else _GENERATE

    def problems(self, *, allowed_hooks: Collection[str] = ()) -> tuple[CdiProblem, ...]:
        """Files that are not used, conflicts, and devices that are out of date or want what is not given."""
        found = [CdiProblem(path=error.path, device="", text=error.reason, hint="") for error in self.errors]
        seen: set[str] = set()
        for name, one in self.devices.items():
            parts = [("", one.file.document.edits)] if one.file.path not in seen else []
            seen.add(one.file.path)
            for device, edits in (*parts, (name, one.device.edits)):
                injection = Injection(allowed_hooks=allowed_hooks, caller_gids=(), root_owned=self.root_owned)
                try:
                    injection.add_edits(one.file, edits, device=device, asked=name)
                    injection.edits()
                except FeatureUnusable as error:
                    problem = CdiProblem(path=one.file.path, device=device, text=error.message, hint=error.hint or "")
                    found.append(problem)
        return tuple(found)


def _resolved(
    files: Iterable[CdiFile], errors: list[FileError]
) -> tuple[dict[str, Described], dict[str, tuple[str, ...]]]:
    """Usable devices and conflicts, by name."""
    all_of: dict[str, list[Described]] = {}
    for file in files:
        for device in file.document.devices:
            all_of.setdefault(f"{file.document.kind}={device.name}", []).append(Described(file=file, device=device))
    devices: dict[str, Described] = {}
    conflicts: dict[str, tuple[str, ...]] = {}
    for name in sorted(all_of, key=_natural):
        highest = max(one.file.priority for one in all_of[name])
        counting = [one for one in all_of[name] if one.file.priority == highest]
        if len(counting) == 1:
            devices[name] = counting[0]
            continue
        paths = tuple(sorted(one.file.path for one in counting))
        conflicts[name] = paths
        errors.extend(FileError(path=path, reason=f"device {name} is in {' and '.join(paths)}") for path in paths)
    return devices, conflicts


def _natural(name: str) -> list[tuple[int, str]]:
    """gpu=2 before gpu=10."""
    return [(int(part[:18]) if part.isdigit() else -1, part) for part in re.split(r"([0-9]+)", name)]


def _files_of(directory: str, errors: list[FileError], *, root_owned: bool) -> list[tuple[str, Document | str]]:
    """Path and document of every file, or what is wrong with it."""
    try:
        if root_owned:
            require_only_roots_way(directory)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    except PolicyUnusable as error:
        errors.append(FileError(path=directory, reason=error.message))
        return []
    except OSError as error:
        errors.append(FileError(path=directory, reason=error.strerror or "unreadable"))
        return []
    try:
        status = os.fstat(descriptor)
        if root_owned and (status.st_uid != 0 or status.st_mode & _WRITABLE):
            errors.append(FileError(path=directory, reason="not a directory that only root can write"))
            return []
        names = sorted(name for name in os.listdir(descriptor) if name.endswith((".json", ".yaml")))
        if len(names) > FILES_MAX:
            errors.append(FileError(path=directory, reason=f"{len(names)} files, {FILES_MAX} are possible"))
            return []
        found: list[tuple[str, Document | str]] = []
        for name in names:
            path = f"{directory}/{name}"
            try:
                raw = _read(descriptor, name, path, root_owned=root_owned)
            except IsADirectoryError:
                continue
            except OSError as error:
                found.append((path, error.strerror or "unreadable"))
            except Wrong as error:
                found.append((path, str(error)))
            else:
                found.append((path, _parsed(raw)))
        return found
    except OSError as error:
        errors.append(FileError(path=directory, reason=error.strerror or "unreadable"))
        return []
    finally:
        os.close(descriptor)


def _read(directory: int, name: str, path: str, *, root_owned: bool) -> bytes:
    """The content of a file; a link is followed when it is root's all the way. Raises :class:`Wrong`, OSError."""
    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    if stat.S_ISLNK(status.st_mode):
        path = _end_of_link(path, root_owned=root_owned)
        directory, name = -1, path
        status = os.stat(path, follow_symlinks=False)
    # Looked at first: opening a device can do something. Looked at again once it is open: that file is read.
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise Wrong("not a regular file")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.open(name, flags, dir_fd=directory if directory >= 0 else None)
    try:
        before = os.fstat(file)
        if not stat.S_ISREG(before.st_mode):
            raise Wrong("not a regular file")
        if root_owned and (before.st_uid != 0 or before.st_mode & _WRITABLE):
            raise Wrong("not a file that only root can write")
        content = _whole(file)
        after = os.fstat(file)
    finally:
        os.close(file)
    if len(content) > BYTES_MAX:
        raise Wrong(f"longer than {BYTES_MAX} bytes")
    if (len(content), before.st_ctime_ns) != (after.st_size, after.st_ctime_ns):
        raise Wrong("it has changed while it was read")
    return content


def _end_of_link(path: str, *, root_owned: bool) -> str:
    """Where a link leads. Every part of the way is looked at before, so it is the same afterwards."""
    if not root_owned:
        return os.path.realpath(path, strict=True)
    try:
        end = require_only_roots(path).path
    except FeatureUnusable as error:
        raise Wrong(error.message.removeprefix(f"{path}: ")) from None
    # In a sticky directory a user may put root's file of another place.
    if os.stat(os.path.dirname(end)).st_mode & _WRITABLE:
        raise Wrong(f"a link to {end}, whose directory others can write")
    return end


def _whole(file: int) -> bytes:
    """What a file has, at most a byte more than it may have."""
    content = bytearray()
    while len(content) <= BYTES_MAX and (more := os.read(file, BYTES_MAX + 1 - len(content))):
        content += more
    return bytes(content)


def _parsed(raw: bytes) -> Document | str:
    digest = hashlib.sha256(raw).digest()
    with _parsing:
        found = _kept.pop(digest, None)
        if found is None:
            try:
                found = cdi_written.parse(raw)
            except Wrong as error:
                found = str(error)
        _kept[digest] = found
        while len(_kept) > _KEPT_MAX:
            del _kept[next(iter(_kept))]
    return found
