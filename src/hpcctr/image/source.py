"""From a source's documents to one image: index → manifest → config → layers, every step checked by digest and size.

Formats: OCI image-spec ``image-index.md``, ``manifest.md``, ``config.md``; Docker's manifest list and schema 2, which
have the same shape. What the documents say is untrusted until it is a :class:`SourceImage`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import msgspec

from hpcctr.errors import ImageBroken, NotAnImage, PlatformMissing
from hpcctr.image.platform import acceptable, is_usable, normal
from hpcctr.image.record import ImageConfig, Platform
from hpcctr.image.verification import Verification, sha256_of

T = TypeVar("T", bound=msgspec.Struct)

#: Bytes of an index, manifest or config.
DOCUMENT_MAX = 4 << 20
#: Docker's drivers stop at 127.
_LAYERS_MAX = 512
_INDEX_DEPTH_MAX = 4
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")

INDEX_TYPES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
MANIFEST_TYPES = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
_CONFIG_TYPES = ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")
_LAYER_TYPES = re.compile(
    r"application/vnd\.(oci\.image\.layer\.(nondistributable\.)?v1\.tar(\+gzip|\+zstd)?"
    r"|docker\.image\.rootfs\.(foreign\.)?diff\.tar(\.gzip|\.zstd)?)"
)


class _PlatformWords(msgspec.Struct, frozen=True):
    os: str = ""
    architecture: str = ""
    variant: str = ""


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    """A pointer to a blob: what it is, its digest, its bytes."""

    digest: str
    size: int
    media_type: str = ""
    platform: _PlatformWords | None = None
    annotations: dict[str, str] | None = None

    def require_sane(self, what: str) -> None:
        """Raise :class:`ImageBroken` unless digest and size can be."""
        if not _DIGEST.fullmatch(self.digest) or self.size < 0:
            raise ImageBroken(f"{what} points to something with the digest {self.digest[:100]!r} and {self.size} bytes")


class Index(msgspec.Struct, frozen=True, rename="camel"):
    """An OCI index or Docker manifest list."""

    manifests: list[Descriptor]


class _Manifest(msgspec.Struct, frozen=True, rename="camel"):
    config: Descriptor
    layers: list[Descriptor]


class _Outline(msgspec.Struct, frozen=True, rename="camel"):
    """As much of a document as tells which one it is."""

    schema_version: int | None = None
    manifests: object = None
    layers: object = None
    fs_layers: object = None


class _ExecutionConfig(msgspec.Struct, frozen=True, rename="pascal"):
    env: list[str] | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    working_dir: str | None = None
    user: str | None = None
    labels: dict[str, str] | None = None


class _RootFs(msgspec.Struct, frozen=True):
    diff_ids: list[str]


class _Config(msgspec.Struct, frozen=True):
    rootfs: _RootFs
    os: str = ""
    architecture: str = ""
    variant: str = ""
    config: _ExecutionConfig | None = None


@dataclass(frozen=True, kw_only=True)
class LayerBlob:
    """One layer, as it lies in the source."""

    #: Of the compressed blob, with its bytes; empty and -1 when the source does not say.
    digest: str
    size: int
    #: Of the uncompressed tar stream.
    diff_id: str


@dataclass(frozen=True, kw_only=True)
class SourceImage:
    """One image of a source, for one platform. ``layers`` are lowest first."""

    digest: str
    platform: Platform
    config: ImageConfig
    layers: tuple[LayerBlob, ...]


@dataclass(frozen=True, kw_only=True)
class Found:
    """An image that was located: its digest and its manifest, which is not an image's for certain before its config was
    read."""

    digest: str
    manifest: _Manifest


class BlobSource(Protocol):
    """Where documents and blobs come from: a registry, a layout, an archive."""

    def document(self, descriptor: Descriptor) -> bytes:
        """A small blob, not yet verified; at most :data:`DOCUMENT_MAX` bytes of it are of use."""
        ...


def resolve(source: BlobSource, untrusted_top: bytes, top_digest: str, wanted: Platform, name: str) -> SourceImage:
    """The image for ``wanted`` that a document (index or manifest, its digest already verified) leads to.

    Raises :class:`NotAnImage`, :class:`PlatformMissing`, :class:`ImageBroken`; ``name`` is what messages call the
    source."""
    return image_at(source, locate(source, untrusted_top, top_digest, wanted, name), wanted, name)


def locate(source: BlobSource, untrusted_top: bytes, top_digest: str, wanted: Platform, name: str) -> Found:
    """The first half of :func:`resolve`: which manifest ``wanted`` gets. Only indexes and manifests are read, unless an
    index does not say what its images are for."""
    return _locate(source, untrusted_top, top_digest, wanted, name, depth=0)


def image_at(source: BlobSource, found: Found, wanted: Platform, name: str) -> SourceImage:
    """The second half: the image of a manifest, described by its config."""
    config = fetch_document(source, found.manifest.config, f"{name}: image config")
    return image_of(config, found.manifest.layers, found.digest, wanted, name)


def image_of(
    untrusted_config: bytes,
    blobs: list[Descriptor] | None,
    digest: str,
    wanted: Platform | None,
    name: str,
    *,
    count: int = 0,
) -> SourceImage:
    """The image a config describes, with the layers of its manifest, or ``count`` layers known by their diff ids
    only."""
    config = parse(untrusted_config, _Config, f"{name}: image config")
    platform = normal(Platform(os=config.os or "linux", architecture=config.architecture, variant=config.variant))
    if not is_usable(platform):
        raise NotAnImage(f"{name}: the image config names no platform of Linux: {platform}")
    if wanted is not None and platform not in acceptable(wanted):
        raise PlatformMissing(
            f"{name} is for {platform}, not for {wanted}", hint=f"hpcctr pull --platform {platform} {name}"
        )
    diff_ids = config.rootfs.diff_ids
    layers = [Descriptor(digest="", size=-1)] * count if blobs is None else blobs
    if len(diff_ids) != len(layers):
        raise ImageBroken(f"{name}: {len(layers)} layers, but {len(diff_ids)} diff ids in the config")
    if len(layers) > _LAYERS_MAX:
        raise ImageBroken(f"{name}: {len(layers)} layers, {_LAYERS_MAX} are possible")
    if not all(_DIGEST.fullmatch(diff_id) for diff_id in diff_ids):
        raise ImageBroken(f"{name}: the image config has a diff id that is no digest")
    said = config.config or _ExecutionConfig()
    return SourceImage(
        digest=digest,
        platform=platform,
        config=ImageConfig(
            env=tuple(said.env or ()),
            entrypoint=tuple(said.entrypoint or ()),
            cmd=tuple(said.cmd or ()),
            working_dir=said.working_dir or "",
            user=said.user or "",
            labels=said.labels or {},
        ),
        layers=tuple(
            LayerBlob(digest=layer.digest, size=layer.size, diff_id=diff_id)
            for layer, diff_id in zip(layers, diff_ids, strict=True)
        ),
    )


def parse(untrusted: bytes, kind: type[T], what: str) -> T:
    """A JSON document as a type. Raises :class:`NotAnImage`."""
    if len(untrusted) > DOCUMENT_MAX:
        raise NotAnImage(f"{what} is larger than {DOCUMENT_MAX} bytes")
    try:
        return msgspec.json.decode(untrusted, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NotAnImage(f"{what} cannot be read: {error}") from None


def fetch_document(source: BlobSource, descriptor: Descriptor, what: str) -> bytes:
    """A small blob, verified. Raises :class:`ImageBroken`, :class:`NotAnImage`."""
    descriptor.require_sane(what)
    if descriptor.size > DOCUMENT_MAX:
        raise NotAnImage(f"{what} is larger than {DOCUMENT_MAX} bytes")
    content = source.document(descriptor)
    check = Verification(descriptor.digest, descriptor.size, what)
    check.add(content)
    check.require_agreement()
    return content


def _locate(source: BlobSource, untrusted: bytes, digest: str, wanted: Platform, name: str, *, depth: int) -> Found:
    outline = parse(untrusted, _Outline, f"{name}: manifest")
    if outline.schema_version == 1 or outline.fs_layers is not None:
        raise NotAnImage(
            f"{name} is in Docker's schema 1", hint="push it again with a current docker, podman or skopeo"
        )
    if (outline.manifests is None) == (outline.layers is None):
        raise NotAnImage(f"{name} is neither an image nor an index of images")
    if outline.manifests is not None:
        if depth >= _INDEX_DEPTH_MAX:
            raise NotAnImage(f"{name} has indexes in indexes, more than {_INDEX_DEPTH_MAX} deep")
        index = parse(untrusted, Index, f"{name}: index")
        return _choose(
            source, index.manifests, wanted, name, lambda entry: _descend(source, entry, wanted, name, depth)
        )
    manifest = parse(untrusted, _Manifest, f"{name}: manifest")
    if manifest.config.media_type not in _CONFIG_TYPES:
        raise NotAnImage(f"{name} is an artifact of type {manifest.config.media_type[:100]!r}, not a container image")
    for layer in manifest.layers:
        layer.require_sane(f"{name}: manifest")
        if layer.media_type.endswith("+encrypted"):
            raise NotAnImage(f"{name} has encrypted layers")
        if not _LAYER_TYPES.fullmatch(layer.media_type):
            raise NotAnImage(f"{name} has a layer of type {layer.media_type[:100]!r}, which is no filesystem")
    return Found(digest=digest, manifest=manifest)


def _descend(source: BlobSource, entry: Descriptor, wanted: Platform, name: str, depth: int) -> Found:
    content = fetch_document(source, entry, f"{name}: manifest")
    return _locate(source, content, sha256_of(content), wanted, name, depth=depth + 1)


def _choose(
    source: BlobSource,
    manifests: list[Descriptor],
    wanted: Platform,
    name: str,
    descend: Callable[[Descriptor], Found],
) -> Found:
    """The best entry for ``wanted``; several entries without a platform are asked what they are."""
    unsaid: list[Descriptor] = []
    by_platform: dict[Platform, Descriptor] = {}
    for entry in manifests:
        words = entry.platform
        if words is None or not (words.os and words.architecture):
            unsaid.append(entry)
        else:
            platform = normal(Platform(os=words.os, architecture=words.architecture, variant=words.variant))
            by_platform.setdefault(platform, entry)
    for platform in acceptable(wanted):
        if platform in by_platform:
            return descend(by_platform[platform])
    for entry in unsaid:
        try:
            found = descend(entry)
            if len(manifests) > 1:
                image_at(source, found, wanted, name)
        except PlatformMissing:
            continue
        return found
    known = sorted(str(platform) for platform in by_platform if is_usable(platform))
    raise PlatformMissing(
        f"{name} exists for {', '.join(known) or 'no platform of Linux'}, not for {wanted}",
        hint=f"hpcctr pull --platform {known[0]} {name}" if known else "",
    )
