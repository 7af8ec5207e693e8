"""Image names: what a user types, parsed once.

    [docker://]registry/repository[:tag][@sha256:…]     an image of a registry
    oci-archive:FILE[:ref]                              an OCI image layout in a tar file
    docker-archive:FILE                                 what ``docker save`` writes
    oci:DIR[:ref]                                       an OCI image layout in a directory

Registry names follow the rules of docker: a first component with neither dot nor colon that is not ``localhost``
belongs to the repository, the registry is then docker.io, and a single component is one of ``library/``. Syntax of
the components: the grammar of the distribution project (its ``reference`` package) and OCI image-spec
``descriptor.md`` for digests.

Imports nothing but the standard library: it is part of finding an image.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from hpcctr.errors import ReferenceWrong

Transport = Literal["docker", "oci-archive", "docker-archive", "oci"]

DEFAULT_REGISTRY = "docker.io"
DEFAULT_TAG = "latest"
#: Where images of files are named: no registry is asked for it, and nobody else's name begins like it.
LOCAL_REGISTRY = "localhost"

_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_REGISTRY = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]{{1,5}})?", re.ASCII)
_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*", re.ASCII)
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_DIGEST_OR_PREFIX = re.compile(r"sha256:[0-9a-f]{12,64}")
_NAME_LENGTH_MAX = 255
_ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".oci")


def is_digest(text: str) -> bool:
    """Whether ``text`` is a whole digest, ``sha256:<64 hex>``."""
    return _DIGEST.fullmatch(text) is not None


def is_digest_or_prefix(text: str) -> bool:
    """Whether ``text`` is a digest or its beginning of at least twelve digits."""
    return _DIGEST_OR_PREFIX.fullmatch(text) is not None


@dataclass(frozen=True, kw_only=True)
class ImageRef:
    """Where an image comes from. ``str()`` is canonical and parses to an equal value.

    >>> str(ImageRef.parse("python:3.12"))
    'docker.io/library/python:3.12'
    """

    transport: Transport
    #: ``host[:port]`` and repository; empty for files.
    registry: str = ""
    repository: str = ""
    #: Empty for files, and for a name that has a digest and no tag.
    tag: str = ""
    #: ``sha256:<64 hex>`` of a manifest or an index, or empty.
    digest: str = ""
    #: File or directory of the other transports, as typed.
    path: str = ""
    #: Which image of a layout: the value of its annotation ``org.opencontainers.image.ref.name``; empty for the only
    #: one.
    layout_ref: str = ""

    @classmethod
    def parse(cls, text: str) -> ImageRef:
        """Raises :class:`ReferenceWrong` with what is wrong and how a name looks."""
        if "\0" in text or "\n" in text:
            raise _wrong(text, "holds a line end or a zero byte")
        head, colon, rest = text.partition(":")
        if colon and head in ("oci-archive", "docker-archive", "oci"):
            return cls._of_file(text, head, rest)
        return cls._of_registry(text, text.removeprefix("docker://"))

    @classmethod
    def _of_file(cls, text: str, transport: str, rest: str) -> ImageRef:
        if transport == "docker-archive":
            if not rest:
                raise _wrong(text, "names no file")
            return cls(transport="docker-archive", path=rest)
        path, colon, layout_ref = rest.partition(":")
        if not path:
            raise _wrong(text, "names no file")
        if colon and not layout_ref:
            raise _wrong(text, "ends in a colon")
        return cls(transport="oci" if transport == "oci" else "oci-archive", path=path, layout_ref=layout_ref)

    @classmethod
    def _of_registry(cls, text: str, name: str) -> ImageRef:
        if not name:
            raise _wrong(text, "is empty")
        if name.startswith(("/", "./", "../")):
            raise _wrong(text, "is a path", hint=f"for a file: oci-archive:{text} or docker-archive:{text}")
        name, at, digest = name.partition("@")
        if at and not is_digest(digest):
            raise _wrong(text, "has no sha256 digest of 64 hexadecimal digits after the @")
        first, slash, remainder = name.partition("/")
        if slash and (set(first) & set(".:[") or first.lower() == "localhost"):
            registry, path = first.lower(), remainder
        else:
            registry, path = DEFAULT_REGISTRY, name
        if registry == "index.docker.io":
            registry = DEFAULT_REGISTRY
        path, colon, tag = path.partition(":")
        if registry == DEFAULT_REGISTRY and path and "/" not in path:
            path = f"library/{path}"
        if not _REGISTRY.fullmatch(registry):
            raise _wrong(text, f"has no valid registry: {registry!r}")
        for component in path.split("/"):
            if not _COMPONENT.fullmatch(component):
                problem = "has upper-case letters" if _COMPONENT.fullmatch(component.lower()) else "is no valid name"
                raise _wrong(text, f"{component!r} {problem}" if component else "has an empty part")
        if len(registry) + 1 + len(path) > _NAME_LENGTH_MAX:
            raise _wrong(text, f"is longer than {_NAME_LENGTH_MAX} characters")
        if (colon or tag) and not _TAG.fullmatch(tag):
            raise _wrong(text, f"has no valid tag: {tag!r}")
        return cls(
            transport="docker",
            registry=registry,
            repository=path,
            tag=tag or ("" if digest else DEFAULT_TAG),
            digest=digest,
        )

    def __str__(self) -> str:
        if self.transport == "docker":
            tag = f":{self.tag}" if self.tag else ""
            return f"{self.registry}/{self.repository}{tag}" + (f"@{self.digest}" if self.digest else "")
        return f"{self.transport}:{self.path}" + (f":{self.layout_ref}" if self.layout_ref else "")

    @property
    def is_file(self) -> bool:
        """Whether it leads to a file or directory, not to a registry."""
        return self.transport != "docker"

    @property
    def familiar(self) -> str:
        """The shortest text that means the same, as docker prints it: ``python:3.12``."""
        text = str(self)
        if self.registry != DEFAULT_REGISTRY:
            return text
        short = text.removeprefix(f"{DEFAULT_REGISTRY}/")
        for shorter in (short.removeprefix("library/"), short):
            try:
                if ImageRef.parse(shorter) == self:
                    return shorter
            except ReferenceWrong:
                continue
        return text

    def absolute(self) -> ImageRef:
        """The same with a path that does not depend on the working directory."""
        return replace(self, path=str(_absolute(self.path))) if self.is_file else self

    def name_in_store(self) -> ImageRef:
        """The name an image gets when nobody gives it one.

        Its own for an image of a registry, without the tag when a digest decides. For a file
        ``localhost/STEM:latest``, or the tag the layout reference ends in: only what was typed, never what the file
        says of itself."""
        if not self.is_file:
            return replace(self, tag="") if self.digest else self
        stem = _absolute(self.path).name.lower()
        for suffix in sorted(_ARCHIVE_SUFFIXES, key=len, reverse=True):
            if stem.endswith(suffix) and stem != suffix:
                stem = stem.removesuffix(suffix)
                break
        repository = re.sub(r"[^a-z0-9]+", "-", stem).strip("-")[:128].strip("-") or "image"
        tag = self.layout_ref.rpartition(":")[2]
        return ImageRef(
            transport="docker",
            registry=LOCAL_REGISTRY,
            repository=repository,
            tag=tag if _TAG.fullmatch(tag) else DEFAULT_TAG,
        )


def _absolute(path: str) -> Path:
    try:
        return Path(path).absolute()
    except OSError as error:
        raise _wrong(
            path, f"the working directory is gone: {error.strerror}", hint="cd to a directory that exists"
        ) from None


def _wrong(text: str, problem: str, *, hint: str = "") -> ReferenceWrong:
    shown = text if len(text) <= 200 else text[:200] + "…"
    return ReferenceWrong(
        f"image name {shown!r}: {problem}",
        hint=hint or "names look like python:3.12, quay.io/org/app:1.0, oci-archive:FILE, docker-archive:FILE, oci:DIR",
    )
