"""The administrator's settings: ``/etc/hpcctr/site.toml``.

Every key has a default, so an absent file is a valid site. The engine and root read the file only when nobody but root
could have written it; anything wrong with it is an error that names the file, never a silent default.
"""

from __future__ import annotations

import os
import stat
from typing import Annotated, Literal

import msgspec

from hpcctr.errors import PolicyUnusable, SiteFileWrong

DEFAULT_PATH = "/etc/hpcctr/site.toml"

_Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
_Rate = Annotated[float, msgspec.Meta(gt=0, le=1_000_000)]


class ContainerdSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """Where containerd is."""

    socket: str = "/run/containerd/containerd.sock"


class RegistrySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """How one registry (``host[:port]``, the table's name) is spoken to."""

    #: Speak plain HTTP. Loopback addresses need no such permission.
    plain_http: bool = False
    #: PEM certificates trusted for this registry, beside the machine's.
    ca_file: str = ""
    #: ``host[:port]`` or ``host[:port]/path``, asked in this order before the registry itself. How each is spoken to
    #: is in its own table.
    mirrors: tuple[str, ...] = ()


class CdiSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """Where device descriptions come from (CDI), and what of them may run."""

    #: In rising precedence: a device in a later directory replaces one of the same name.
    directories: tuple[str, ...] = ("/etc/cdi", "/var/run/cdi")
    #: Programs that hooks of these files may name: they run as root while a container is built.
    hooks: tuple[str, ...] = ()


class LimitSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """What the engine gives at most."""

    #: Sessions at once, of everybody and of one uid. A uid that has none gets one whatever the others have.
    sessions: _Count = 1024
    sessions_per_uid: _Count = 256
    #: Launches of one uid that wait until others of theirs have begun.
    waiting_per_uid: _Count = 4096
    #: Launches of one uid in the long run; faster ones wait.
    launches_per_second: _Rate = 200.0
    #: Node containers one uid may have on the node.
    containers_per_uid: _Count = 64
    #: Node containers built for one uid in the long run; faster ones wait.
    builds_per_minute: _Rate = 240.0
    #: Storekeepers (pulls, imports, listings) at once, of everybody and of one uid.
    errands: _Count = 64
    errands_per_uid: _Count = 8
    #: What one user's own images may take in the store.
    bytes_per_uid: Annotated[int, msgspec.Meta(ge=0)] = 200 * 2**30
    #: Users and groups one user may share images with, each image counted.
    shares_per_uid: Annotated[int, msgspec.Meta(ge=0)] = 256


class Site(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """The whole file."""

    store: str = "/var/lib/hpcctr/store"
    #: The installed enter: root:root 0711 with file capabilities, on a local filesystem.
    enter: str = "/usr/libexec/hpcctr/enter"
    runtime: Literal["runc", "crun"] = "runc"
    #: Seconds a node container stays after its last member has ended.
    linger_seconds: Annotated[float, msgspec.Meta(ge=0, le=86400)] = 60.0
    #: Directories of the host, beside /tmp, home and the working directory, that every launch sees where the caller
    #: does.
    carry: tuple[str, ...] = ()
    #: Variables set in every container (host feature of the site).
    env: dict[str, str] = {}
    #: Globs of variables, beside hpcctr's own list, that describe the host's files: the image's value is taken.
    env_of_the_host: tuple[str, ...] = ()
    policy_directory: str = "/etc/hpcctr/policy.d"
    #: Site profiles: one host feature a file, named after it.
    profile_directory: str = "/etc/hpcctr/profiles.d"
    #: Profiles every launch gets where the node has what they are about.
    features: tuple[str, ...] = ()
    #: Whose MPI a launch uses that does not say: the image's, the node's in its place, or what fits.
    mpi: Literal["auto", "container", "host"] = "container"
    cdi: CdiSettings = CdiSettings()
    #: Where users' launches and pulls may fetch what the store lacks. ``outside-jobs`` where compute nodes have no way
    #: out, or its use should not count for a job; ``nowhere`` leaves it to the administrator.
    pull: Literal["anywhere", "outside-jobs", "nowhere"] = "anywhere"
    #: Days a node's mark on an image it uses counts when the node never takes it away: longer than a job may run.
    mark_days: float = 60.0
    #: Read an image's file as a whole, and compare it with its digest, before a node mounts it for the first time.
    verify_at_mount: bool = False
    #: Keep the blobs of pulls from registries in an OCI layout, STORE/layout.
    keep_blobs: bool = False
    containerd: ContainerdSettings = ContainerdSettings()
    registry: dict[str, RegistrySettings] = {}
    limits: LimitSettings = LimitSettings()

    @property
    def front(self) -> str:
        """The program that the command hpcctr starts with; it lies beside enter."""
        return os.path.join(os.path.dirname(self.enter), "front")

    @classmethod
    def of_this_process(cls) -> Site:
        """The site of a command line: HPCCTR_SITE names another file, for tests and for trying a site out.

        The gateway does not use this: its site is what root started it with.
        """
        return cls.load(os.environ.get("HPCCTR_SITE"), root_owned=os.getuid() == 0)  # noqa: TID251

    @classmethod
    def load(cls, path: str | None = None, *, root_owned: bool = False) -> Site:
        """The settings in ``path``; the defaults when ``path`` is None and :data:`DEFAULT_PATH` does not exist.

        With ``root_owned`` the file must be root's and writable by nobody else, else :class:`PolicyUnusable`.
        Raises :class:`SiteFileWrong` for a file that cannot be read or is not a site file.
        """
        name = path or DEFAULT_PATH
        try:
            raw = read_root_owned(name) if root_owned else _read(name)
        except FileNotFoundError:
            if path is None:
                return cls()
            raise SiteFileWrong(f"{name}: no such file", hint="name an existing site file") from None
        except OSError as error:
            raise SiteFileWrong(f"{name}: {error.strerror}", hint=f"make {name} readable") from None
        try:
            site = msgspec.toml.decode(raw, type=cls)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise SiteFileWrong(f"{name}: {error}", hint=f"edit {name}; its keys are in docs/site.md") from None
        paths = [("store", site.store), ("enter", site.enter), *(("carry", entry) for entry in site.carry)]
        paths += [("profile-directory", site.profile_directory)]
        paths += [("cdi directories", entry) for entry in site.cdi.directories]
        paths += [("cdi hooks", entry) for entry in site.cdi.hooks]
        paths += [("ca-file", settings.ca_file) for settings in site.registry.values() if settings.ca_file]
        for key, value in paths:
            if not value.startswith("/") or os.path.normpath(value) != value or value == "/":
                raise SiteFileWrong(f"{name}: {key} = {value!r} is not a plain absolute path", hint=f"edit {name}")
        if not 1 <= site.mark_days <= 3650:
            raise SiteFileWrong(f"{name}: mark-days = {site.mark_days} is not 1 to 3650 days", hint=f"edit {name}")
        for settings in site.registry.values():
            for mirror in settings.mirrors:
                if not mirror or mirror.startswith("/") or "://" in mirror or not mirror.isascii() or " " in mirror:
                    raise SiteFileWrong(
                        f"{name}: mirrors: {mirror!r} is not HOST[:PORT] or HOST[:PORT]/PATH", hint=f"edit {name}"
                    )
        return site


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def read_root_owned(path: str) -> bytes:
    """The content of a file only root can have written. Raises :class:`PolicyUnusable` otherwise, OSError as open does.

    The owner is looked at after opening, on the descriptor: the other way round another file could be slipped in
    between.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != 0 or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PolicyUnusable(
                f"{path} is not a file that only root can write",
                hint=f"chown root:root {path} && chmod go-w {path}",
            )
        return file.read()
