"""Devices of CDI files as HostEdits, in the order and by the rules of the specification's own library.

A file's own edits once, before its first device; then each device's; then all together by kind. /dev inside is the
caller's, so a device node is checked and never made. What cannot be given as the file says is refused, not left out.
"""

from __future__ import annotations

import grp
import os
import socket
import stat
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from hpcctr.errors import FeatureUnusable
from hpcctr.host.cdi_hooks import Hooks
from hpcctr.host.cdi_mounts import Sources, remedy
from hpcctr.host.cdi_written import Device, DeviceNode, Document, Edits, NetDevice
from hpcctr.host.edits import MOUNTS_MAX, DeviceEdit, EnvEdit, HostEdits, MountEdit


@dataclass(frozen=True, kw_only=True)
class CdiFile:
    """A CDI file that is used."""

    path: str
    #: Its directory's place among the directories; the higher counts.
    priority: int
    document: Document


@dataclass(frozen=True, kw_only=True)
class Described:
    """A device and the file that describes it."""

    file: CdiFile
    device: Device

    @property
    def name(self) -> str:
        """``vendor/class=name``."""
        return f"{self.file.document.kind}={self.device.name}"


class Injection:
    """Collects edits, device by device."""

    def __init__(
        self,
        *,
        allowed_hooks: Collection[str],
        caller_gids: Collection[int],
        image_env: Iterable[str] = (),
        root_owned: bool = True,
    ) -> None:
        self._gids = frozenset(caller_gids)
        self._root_owned = root_owned
        self._hooks = Hooks(allowed=allowed_hooks, image_env=image_env, root_owned=root_owned)
        self._sources: dict[str, Sources] = {}
        self._env: dict[str, EnvEdit] = {}
        self._devices: dict[str, DeviceEdit] = {}
        self._mounts: dict[str, MountEdit] = {}
        self._warnings: list[str] = []

    def add(self, several: Sequence[Described]) -> None:
        """Devices in the order in which they were asked for. Raises :class:`FeatureUnusable`."""
        begun: set[str] = set()
        for one in several:
            if one.file.path not in begun:
                begun.add(one.file.path)
                self.add_edits(one.file, one.file.document.edits, device="", asked=one.name)
            self.add_edits(one.file, one.device.edits, device=one.name, asked=one.name)

    def add_edits(self, file: CdiFile, edits: Edits, *, device: str, asked: str) -> None:
        """Edits of a file (``device`` is empty) or of one of its devices. Raises :class:`FeatureUnusable`."""
        origin = f"{file.path} ({device})" if device else file.path
        for name, value in edits.env:
            self._env[name] = EnvEdit(name=name, value=value, origin=origin)
        for node in edits.device_nodes:
            edit = _node(node, file, device=device or file.document.kind, origin=origin)
            self._devices.pop(edit.path, None)
            self._devices[edit.path] = edit
        for net in edits.net_devices:
            _require_interface(net, file.path, asked)
        self._add_mounts(file, edits, origin)
        for hook in edits.hooks:
            self._hooks.add(hook, file=file.path, device=asked, origin=origin)
        if edits.has_intel_rdt:
            raise FeatureUnusable(
                f"device {asked}: {file.path} wants a resctrl group (intelRdt), and programs stay in their job's",
                hint=f"edit {file.path}",
            )
        for gid in dict.fromkeys(edits.gids):
            if gid != 0 and gid not in self._gids:
                self._warn(f"{asked} wants group {_group(gid)}, which you are not in; nobody gains a group")

    def edits(self) -> HostEdits:
        """All of it. Raises :class:`FeatureUnusable`."""
        if len(self._mounts) > MOUNTS_MAX:
            raise FeatureUnusable(
                f"the devices have {len(self._mounts)} mounts together, {MOUNTS_MAX} are possible", hint="ask for fewer"
            )
        done = self._hooks.done
        devices = tuple(self._devices.values())
        return HostEdits(
            env=tuple(self._env.values()),
            mounts=tuple(sorted(self._mounts.values(), key=lambda mount: mount.target.count("/"))),
            links=tuple({link.path: link for link in done.links}.values()),
            files=self._hooks.files(devices),
            devices=devices,
            hooks=tuple(done.hooks),
            library_folders=tuple(done.library_folders),
            warnings=tuple(dict.fromkeys((*self._warnings, *done.warnings))),
        )

    def _add_mounts(self, file: CdiFile, edits: Edits, origin: str) -> None:
        sources = self._sources.setdefault(
            file.path, Sources(file=file.path, kind=file.document.kind, root_owned=self._root_owned)
        )
        for mount in edits.mounts:
            edit = sources.edit(mount, origin)
            if isinstance(edit, str):
                self._warn(edit)
            elif edit is not None:
                self._mounts.pop(edit.target, None)
                self._mounts[edit.target] = edit

    def _warn(self, text: str) -> None:
        self._warnings.append(text)


def _node(node: DeviceNode, file: CdiFile, *, device: str, origin: str) -> DeviceEdit:
    """The node as the file and the host say together. Raises :class:`FeatureUnusable`."""
    host_path = node.host_path or node.path
    hint = remedy(file.document.kind, file.path)
    for path in (node.path, host_path):
        if not path.startswith("/") or os.path.normpath(path) != path or path.startswith("//"):
            raise FeatureUnusable(
                f"{file.path}: device node {path[:200]!r} is not a plain absolute path", hint=f"edit {file.path}"
            )
    if not node.path.startswith("/dev/"):
        raise FeatureUnusable(
            f"{file.path}: device node {node.path} cannot be given: devices inside are those of the node's /dev",
            hint=f"edit {file.path}",
        )
    kind, major, minor = _on_host(host_path, file.path, hint)
    wanted = "c" if node.type == "u" else node.type
    # A type and a major number are the least that counts as given; the minor number comes with the major.
    is_given = wanted != "" and node.major != 0
    if wanted and wanted != kind:
        raise FeatureUnusable(f"{file.path} is out of date: {host_path} is of type {kind} and not {wanted}", hint=hint)
    if is_given and (node.major, node.minor) != (major, minor):
        raise FeatureUnusable(
            f"{file.path} is out of date: {host_path} is device {major}:{minor}, and the file has "
            f"{node.major}:{node.minor}",
            hint=hint,
        )
    if host_path != node.path and _number_of(node.path) != (kind, major, minor):
        raise FeatureUnusable(
            f"{file.path}: device node {host_path} cannot be given as {node.path}: /dev inside is the node's own",
            hint=f"edit {file.path}",
        )
    permissions = {"": "rwm", "none": ""}.get(node.permissions, node.permissions)
    return DeviceEdit(
        path=node.path, kind=kind, major=major, minor=minor, permissions=permissions, device=device, origin=origin
    )


def _number_of(path: str) -> tuple[Literal["c", "b"], int, int] | None:
    """Type, major and minor number; None when there is no device node."""
    try:
        status = os.lstat(path)
    except (OSError, ValueError):
        return None
    if stat.S_ISCHR(status.st_mode):
        return "c", os.major(status.st_rdev), os.minor(status.st_rdev)
    if stat.S_ISBLK(status.st_mode):
        return "b", os.major(status.st_rdev), os.minor(status.st_rdev)
    return None


def _on_host(path: str, file: str, hint: str) -> tuple[Literal["c", "b"], int, int]:
    found = _number_of(path)
    if found is None:
        what = "is no device node" if os.path.lexists(path) else "is not there"
        raise FeatureUnusable(f"{file} is out of date: it names {path}, which {what}", hint=hint)
    return found


def _require_interface(net: NetDevice, file: str, asked: str) -> None:
    """The host's interfaces are those inside, so one keeps its name or is not to be had."""
    if net.name != net.host_interface:
        raise FeatureUnusable(
            f"device {asked}: {file} renames interface {net.host_interface[:40]} to {net.name[:40]}: "
            "programs have the node's own network",
            hint=f"edit {file}",
        )
    try:
        socket.if_nametoindex(net.name)
    except (OSError, ValueError):
        raise FeatureUnusable(
            f"device {asked}: {file} is out of date: this node has no interface {net.name[:40]}", hint="ip link"
        ) from None


def _group(gid: int) -> str:
    try:
        return f"{grp.getgrgid(gid).gr_name} ({gid})"
    except (KeyError, OverflowError):
        return str(gid)
