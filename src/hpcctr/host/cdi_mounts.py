"""Mounts of CDI files as MountEdits, and whether what they name is what the node has now."""

from __future__ import annotations

import os
import re
import stat
from typing import Literal

from hpcctr.errors import FeatureUnusable
from hpcctr.host.cdi_written import Mount
from hpcctr.host.edits import MountEdit
from hpcctr.host.trusted import Look, Trusted, identity_of
from hpcctr.request import target_problem

#: What is on whatever a file says, and what it may ask for that changes nothing: every mount is a bind, and private.
_NOTHING = frozenset(
    ("rw", "nosuid", "nodev", "rnosuid", "rnodev", "exec", "rexec", "bind", "rbind", "defaults", "async")
    + ("private", "rprivate", "slave", "rslave", "atime", "noatime", "diratime", "nodiratime", "relatime")
    + ("norelatime", "strictatime", "nostrictatime")
)
_READ_ONLY = frozenset(("ro", "rro"))
_NOEXEC = frozenset(("noexec", "rnoexec"))
#: A library of a driver: its name ends with the driver's version, of at least two numbers.
_OF_A_DRIVER = re.compile(r"(.+\.so)\.([0-9]+(?:\.[0-9]+)+)")
#: Those a driver has exactly one of: the SONAME's link leads to the one in use.
_ONE_OF_A_DRIVER = ("libcuda.so", "libnvidia-ml.so")


def remedy(kind: str, path: str) -> str:
    """The command that makes a file anew."""
    vendor = kind.partition("/")[0]
    if vendor == "nvidia.com":
        return f"nvidia-ctk cdi generate --output={path}"
    if vendor == "amd.com":
        return f"amd-ctk cdi generate --output={path}"
    if vendor == "intel.com":
        return f"intel-cdi-specs-generator --cdi-dir={os.path.dirname(path)} gpu"
    return f"have {vendor}'s tool write {path} again"


def driver_version(path: str) -> str:
    """The driver's version in a library's name, as ``libcuda.so.550.54.15``; empty when there is none."""
    found = _OF_A_DRIVER.fullmatch(os.path.basename(path))
    return found[2] if found else ""


class Sources:
    """Host paths of one CDI file: what a launch may be shown of them.

    The runtime mounts them as root, so nobody but root may be able to make one lead elsewhere: in a directory that only
    root can enter, a user would be shown files that only the directory protects. Without ``root_owned`` that is not
    looked at.
    """

    def __init__(self, *, file: str, kind: str, root_owned: bool) -> None:
        self._file = file
        self._kind = kind
        self._look = Look() if root_owned else None

    def edit(self, mount: Mount, origin: str) -> MountEdit | str | None:
        """The edit for a mount; a text is a warning that it is left out, None is what the container has anyway.

        Raises :class:`FeatureUnusable`.
        """
        named = f"{self._file}: mount of {mount.container_path[:200]}"
        if mount.type not in ("", "bind", "none"):
            raise FeatureUnusable(
                f"{named} is of type {mount.type[:40]}, and only binds can be given", hint=f"edit {self._file}"
            )
        words = set(mount.options)
        if odd := sorted(words - _NOTHING - _READ_ONLY - _NOEXEC):
            raise FeatureUnusable(
                f"{named} has option {odd[0][:80]!r}, which cannot be given", hint=f"edit {self._file}"
            )
        source, target = self._plain(mount.host_path, named), self._plain(mount.container_path, named)
        if _is_the_nodes_own(target):
            if source == target or os.path.realpath(source) == os.path.realpath(target):
                return None
            raise FeatureUnusable(
                f"{named} cannot be made: {target} inside is the node's own, and {source} is something else",
                hint=f"edit {self._file}",
            )
        if problem := target_problem(os.fsencode(target)):
            raise FeatureUnusable(f"{named} cannot be made: it {problem}", hint=f"edit {self._file}")
        is_noexec = bool(words & _NOEXEC)
        try:
            found = self._found(source, named)
        except FeatureUnusable as error:
            # Sockets of a vendor's daemons are mounted so. One that is not running, or whose place is a user's, takes
            # its own service from programs and no more.
            if is_noexec:
                return f"{error.message}: left out"
            raise
        self._require_driver_in_use(source)
        return MountEdit(
            source=found.path,
            target=target,
            kind=found.kind,
            origin=origin,
            is_read_only=bool(words & _READ_ONLY),
            is_noexec=is_noexec,
            identity=found.identity,
        )

    def _found(self, source: str, named: str) -> Trusted:
        """What a source is now. Raises :class:`FeatureUnusable`."""
        if self._look is not None:
            try:
                return self._look.require(source, origin=named)
            except FeatureUnusable:
                # That it is gone has a better text and remedy.
                if os.path.lexists(source):
                    raise
        try:
            status = os.stat(source)
        except OSError as error:
            raise self._gone(source, error) from None
        return Trusted(path=source, kind=self._kind_of(source, status, named), identity=identity_of(status))

    def _plain(self, path: str, named: str) -> str:
        if not path.startswith("/") or ".." in path.split("/"):
            raise FeatureUnusable(f"{named}: {path[:200]!r} is not a plain absolute path", hint=f"edit {self._file}")
        return "/" + os.path.normpath(path).lstrip("/")

    def _kind_of(self, source: str, status: os.stat_result, named: str) -> Literal["d", "f"]:
        if stat.S_ISDIR(status.st_mode):
            return "d"
        if stat.S_ISREG(status.st_mode) or stat.S_ISSOCK(status.st_mode):
            return "f"
        raise FeatureUnusable(
            f"{named} cannot be made: {source} is neither file, directory nor socket", hint=f"edit {self._file}"
        )

    def _gone(self, source: str, error: OSError) -> FeatureUnusable:
        hint = remedy(self._kind, self._file)
        if not isinstance(error, FileNotFoundError):
            return FeatureUnusable(f"{self._file} names {source}: {error.strerror}", hint=hint)
        old = driver_version(source)
        if others := _other_versions(source):
            return FeatureUnusable(
                f"{self._file} is out of date: it names {source} of driver {old}, which is gone; here is {others[-1]}",
                hint=hint,
            )
        return FeatureUnusable(f"{self._file} is out of date: it names {source}, which is not there", hint=hint)

    def _require_driver_in_use(self, source: str) -> None:
        found = _OF_A_DRIVER.fullmatch(os.path.basename(source))
        if not found or found[1] not in _ONE_OF_A_DRIVER:
            return
        link = os.path.join(os.path.dirname(source), found[1] + ".1")
        used = driver_version(os.path.realpath(link))
        if used and used != found[2]:
            raise FeatureUnusable(
                f"{self._file} is out of date: it names {source} of driver {found[2]}, and {link} is of driver {used}",
                hint=remedy(self._kind, self._file),
            )


def _is_the_nodes_own(target: str) -> bool:
    """Whether the container has this from the caller's own view of the node."""
    return target.startswith(("/dev/", "/proc/", "/sys/"))


def _other_versions(path: str) -> list[str]:
    """The same library of other drivers, beside it; the highest version last."""
    found = _OF_A_DRIVER.fullmatch(os.path.basename(path))
    if not found:
        return []
    try:
        names = os.listdir(os.path.dirname(path))
    except OSError:
        return []
    others = [other for name in names if (other := _OF_A_DRIVER.fullmatch(name)) and other[1] == found[1]]
    return [
        f"{other[0]} of driver {other[2]}"
        for other in sorted(others, key=lambda other: [int(number[:18]) for number in other[2].split(".")])
    ]
