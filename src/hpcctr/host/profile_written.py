"""What a profile's file says: closed keys, plain paths, and nothing looked up yet."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import msgspec

from hpcctr.errors import FeatureUnusable

#: Bytes of a file, words of one list, characters of a word.
BYTES_MAX = 256 * 1024
_WORDS_MAX = 256
_WORD_MAX = 1024
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}").fullmatch
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*").fullmatch
#: What is the caller's own view, or the engine's: nothing of a profile goes there or comes from there.
_NEVER = ("/proc", "/sys", "/dev", "/run/hpcctr", "/.hpcctr-host")
_UNLIMITED = -1


class MpiSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """What a profile says of the node's MPI; its family and version are the library's own word."""

    #: Whose MPI ``--mpi=auto`` takes where both would do.
    prefer: Literal["host", "container"] = "container"


class _Written(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """The keys of a file."""

    description: str = ""
    libraries: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    directories: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    env: dict[str, str] = {}
    replace: bool | tuple[str, ...] = False
    memlock: int | Literal["unlimited"] | None = None
    shm_bytes: int | None = None
    mpi: MpiSettings | None = None


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A directory or file of the node at the same place inside."""

    path: str
    is_read_only: bool = True


@dataclass(frozen=True, kw_only=True)
class Written:
    """One host feature, as its file describes it."""

    name: str
    #: The file.
    path: str
    description: str = ""
    #: Names, globs of names, paths, globs of paths.
    libraries: tuple[str, ...] = ()
    #: Paths and globs of device nodes.
    devices: tuple[str, ...] = ()
    directories: tuple[Shown, ...] = ()
    files: tuple[Shown, ...] = ()
    #: Words of the four lists that may find nothing.
    optional: frozenset[str] = frozenset()
    env: tuple[tuple[str, str], ...] = ()
    #: Globs of SONAMEs whose libraries also take the place of the image's files.
    replace: tuple[str, ...] = ()
    #: Bytes, -1 for no limit; None: says nothing.
    memlock: int | None = None
    shm_bytes: int | None = None
    mpi: MpiSettings | None = None
    #: Only what root alone can write is taken.
    root_owned: bool = True


def parse(untrusted_raw: bytes, path: str, *, root_owned: bool = True) -> Written:
    """The profile of a file's content; its name is the file's. Raises :class:`FeatureUnusable`."""
    name = os.path.basename(path).removesuffix(".toml")
    if not _NAME(name):
        raise _wrong(path, f"a profile's name is of a-z, 0-9 and -, and {name!r} is not")
    if len(untrusted_raw) > BYTES_MAX:
        raise _wrong(path, f"larger than {BYTES_MAX} bytes")
    try:
        written = msgspec.toml.decode(untrusted_raw, type=_Written)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise _wrong(path, str(error)) from None
    lists = {
        "libraries": written.libraries,
        "devices": written.devices,
        "directories": written.directories,
        "files": written.files,
        "optional": written.optional,
        "replace": () if isinstance(written.replace, bool) else written.replace,
    }
    for key, words in lists.items():
        if len(words) > _WORDS_MAX:
            raise _wrong(path, f"{key} has more than {_WORDS_MAX} words")
        for word in words:
            if not word or len(word) > _WORD_MAX or not word.isprintable():
                raise _wrong(path, f"{key}: {word[:80]!r} is no name and no path")
    directories = tuple(_entry(word, path, "directories") for word in written.directories)
    files = tuple(_entry(word, path, "files") for word in written.files)
    for key, word in (
        *(("libraries", word) for word in written.libraries),
        *(("replace", w) for w in lists["replace"]),
    ):
        if "/" in word and (key == "replace" or not word.startswith("/")):
            raise _wrong(path, f"{key}: {word!r} is neither a name nor an absolute path")
        if "/" in word:
            _require_plain(word, path, key)
    for word in written.devices:
        if not word.startswith("/dev/") or os.path.normpath(word) != word:
            raise _wrong(path, f"devices: {word!r} is not a plain path below /dev")
    known = {*written.libraries, *written.devices, *(shown.path for shown in (*directories, *files))}
    for word in written.optional:
        if word.removesuffix(":rw") not in known:
            raise _wrong(path, f"optional: {word!r} is in none of the lists")
    return Written(
        name=name,
        path=path,
        description=written.description,
        libraries=written.libraries,
        devices=written.devices,
        directories=directories,
        files=files,
        optional=frozenset(word.removesuffix(":rw") for word in written.optional),
        env=_variables(written.env, path),
        replace=lists["replace"] if written.replace is not True else ("*",),
        memlock=_amount(written.memlock, path, "memlock"),
        shm_bytes=_amount(written.shm_bytes, path, "shm-bytes"),
        mpi=written.mpi,
        root_owned=root_owned,
    )


def _variables(env: Mapping[str, str], path: str) -> tuple[tuple[str, str], ...]:
    for name, value in env.items():
        if not _VARIABLE(name) or "\0" in value or "\n" in value or len(value) > 16 * 1024:
            raise _wrong(path, f"env: {name[:80]!r} is no variable, or its value has more than a line")
        if name.startswith("LD_"):
            raise _wrong(path, f"env: {name} is for ld.so, which is told of libraries without it")
    return tuple(env.items())


def _amount(value: int | str | None, path: str, key: str) -> int | None:
    if value is None or isinstance(value, str):
        return None if value is None else _UNLIMITED
    if not 0 < value < 2**63:
        raise _wrong(path, f"{key} = {value} is no number of bytes")
    return value


def _entry(word: str, path: str, key: str) -> Shown:
    place = word.removesuffix(":rw")
    _require_plain(place, path, key)
    if key == "files" and place != word:
        raise _wrong(path, f"files: {word!r}: a file is always read-only")
    return Shown(path=place, is_read_only=place == word)


def _require_plain(word: str, path: str, key: str) -> None:
    if not word.startswith("/") or os.path.normpath(word) != word or word.startswith("//"):
        raise _wrong(path, f"{key}: {word!r} is not a plain absolute path")
    if key != "libraries" and is_never(word):
        raise _wrong(path, f"{key}: {word!r} is the caller's or the engine's, and no profile's")


def is_never(word: str) -> bool:
    """Whether a path or a glob of paths is, holds, or lies in what no profile may touch."""
    parts = word.split("/")[1:]
    for never in _NEVER:
        # Of each depth that both have: a glob that could be it is it.
        theirs = never.split("/")[1:]
        if all(fnmatchcase(their, ours) or their == ours for ours, their in zip(parts, theirs, strict=False)):
            return True
    return word == "/"


def _wrong(path: str, reason: str) -> FeatureUnusable:
    return FeatureUnusable(f"{path}: {reason}", hint=f"edit {path}; its keys are in docs/profiles.md")
