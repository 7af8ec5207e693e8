"""HostEdits: what a container gets beyond its image, each piece with the place it comes from.

Only files of the site decide them: the site file, CDI files, profiles. They are part of a node container's key, so they
are plain values that compare and print. Nothing here opens or makes anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal

from hpcctr.site import Site

#: Of one launch, all features together. Each is a mount that every rank's namespace copies.
MOUNTS_MAX = 512


@dataclass(frozen=True, kw_only=True)
class EnvEdit:
    """One variable and where it comes from."""

    name: str
    value: str
    origin: str


@dataclass(frozen=True, kw_only=True)
class MountEdit:
    """A file or directory of the host's, shown inside. Never followed by set-user-ID programs or devices: both are off
    on every mount of a container, whatever a file says.
    """

    #: On the host: absolute, as the site has written it or found it.
    source: str
    #: Inside: absolute and plain. Symbolic links of the image on the way are followed below its root.
    target: str
    kind: Literal["d", "f"]
    origin: str
    is_read_only: bool = True
    is_noexec: bool = False
    #: What the source is now (device, inode, size, modification time): a driver that is updated makes another
    #: container, and no launch sees half of it.
    identity: str = ""


@dataclass(frozen=True, kw_only=True)
class LinkEdit:
    """A symbolic link in the container; the text it holds is ``target``."""

    path: str
    target: str
    origin: str


@dataclass(frozen=True, kw_only=True)
class FileEdit:
    """A small file that is generated for the container, readable by everybody."""

    path: str
    content: bytes
    origin: str


@dataclass(frozen=True, kw_only=True)
class DeviceEdit:
    """A device node a feature is about. It is never made: /dev inside is the caller's own, and what the caller may open
    is the caller's job to say.
    """

    path: str
    kind: Literal["c", "b"]
    major: int
    minor: int
    #: Of ``r``, ``w``, ``m``.
    permissions: str
    #: The device it belongs to, by its qualified name (``vendor.com/class=name``), or the profile's name.
    device: str
    origin: str


@dataclass(frozen=True, kw_only=True)
class HookEdit:
    """A program of the host's that the OCI runtime runs while it builds the container; the site has named its path."""

    #: The last is refused where files are read, and once more by the engine, which relies on no reader.
    stage: Literal["prestart", "createRuntime", "createContainer"]
    path: str
    args: tuple[str, ...]
    #: All of its environment.
    env: tuple[str, ...]
    #: Seconds; None: the engine's own limit.
    timeout: int | None
    origin: str


@dataclass(frozen=True, kw_only=True)
class NeedEdit:
    """A limit of the caller's that a feature is known to need; looked at before going in, never changed."""

    what: Literal["memlock", "shm"]
    #: Bytes: of RLIMIT_MEMLOCK, of /dev/shm; -1: no limit.
    least: int
    origin: str


@dataclass(frozen=True, kw_only=True)
class GpuEdit:
    """A device node that belongs to one GPU alone, and what its vendor's libraries call that GPU."""

    #: ``nvidia``, ``amd``, ``intel``.
    vendor: str
    #: The vendor's number of it on the node.
    index: str
    #: Empty where the files do not tell.
    uuid: str
    #: All names it has in files, with commas between.
    names: str
    path: str


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """One library that ld.so is told of (``/etc/ld.so.cache`` of the container)."""

    #: What programs ask for, as ``libcuda.so.1``.
    soname: str
    #: Where it is inside.
    path: str
    #: The cache's own word for kind and processor (glibc, sysdeps/generic/ldconfig.h).
    flags: int
    origin: str


@dataclass(frozen=True, kw_only=True)
class HostEdits:
    """Everything a site adds to a container. Of equal names, paths or targets the later one counts."""

    env: tuple[EnvEdit, ...] = ()
    mounts: tuple[MountEdit, ...] = ()
    links: tuple[LinkEdit, ...] = ()
    files: tuple[FileEdit, ...] = ()
    devices: tuple[DeviceEdit, ...] = ()
    gpus: tuple[GpuEdit, ...] = ()
    needs: tuple[NeedEdit, ...] = ()
    hooks: tuple[HookEdit, ...] = ()
    #: Directories inside whose host libraries ld.so is to find, in order.
    library_folders: tuple[str, ...] = ()
    #: What ld.so is told; made from the folders once all mounts and links are known.
    cache: tuple[CacheEntry, ...] = ()
    #: What the user should know, and the launch goes on.
    warnings: tuple[str, ...] = ()
    #: What was decided and why, for --explain.
    notes: tuple[str, ...] = ()
    #: The MPI that programs inside load, for the client, which knows the launcher: family, version, PMI (with commas),
    #: version of PMIx, product, with tabs between. Empty: none, or not known.
    mpi: str = ""

    def key(self) -> str:
        """A text equal for equal edits, for the node container's key. What changes nothing inside is left out."""
        lines: list[str] = []
        for field in fields(self):
            if field.name in ("warnings", "notes", "devices", "gpus", "needs", "mpi"):
                continue
            lines += [f"{field.name} {edit!r}" for edit in getattr(self, field.name)]
        return "\n".join(lines)


def joined(several: Iterable[HostEdits]) -> HostEdits:
    """All of them as one: variables keep the place of their first mention and take the last value, a later mount, link
    or file at a place replaces an earlier one, and mounts are in the order in which they can be made, outer first.
    """
    everything = list(several)
    env = {edit.name: edit for edits in everything for edit in edits.env}
    mounts: dict[str, MountEdit] = {}
    for edits in everything:
        for mount in edits.mounts:
            mounts.pop(mount.target, None)
            mounts[mount.target] = mount
    return HostEdits(
        env=tuple(env.values()),
        mounts=tuple(sorted(mounts.values(), key=lambda mount: len(os.path.normpath(mount.target).split("/")))),
        links=tuple({edit.path: edit for edits in everything for edit in edits.links}.values()),
        files=tuple({edit.path: edit for edits in everything for edit in edits.files}.values()),
        devices=tuple(dict.fromkeys(edit for edits in everything for edit in edits.devices)),
        gpus=tuple(dict.fromkeys(edit for edits in everything for edit in edits.gpus)),
        needs=tuple(dict.fromkeys(edit for edits in everything for edit in edits.needs)),
        hooks=tuple(dict.fromkeys(edit for edits in everything for edit in edits.hooks)),
        library_folders=tuple(dict.fromkeys(folder for edits in everything for folder in edits.library_folders)),
        cache=tuple(dict.fromkeys(edit for edits in everything for edit in edits.cache)),
        warnings=tuple(dict.fromkeys(text for edits in everything for text in edits.warnings)),
        notes=tuple(dict.fromkeys(text for edits in everything for text in edits.notes)),
        mpi=next((edits.mpi for edits in reversed(everything) if edits.mpi), ""),
    )


def of_site(site: Site) -> HostEdits:
    """The edits every launch of the site gets."""
    return HostEdits(
        env=tuple(EnvEdit(name=name, value=value, origin="site.toml [env]") for name, value in site.env.items())
    )
