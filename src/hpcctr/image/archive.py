"""Images in files: OCI layouts (a directory, or in a tar file), and what ``docker save`` writes.

Formats: OCI image-spec ``image-layout.md``; moby's ``image/tarexport`` for ``manifest.json``. A tar file is read once
for its headers; blobs are then read in place. A compressed one is decompressed into the workspace first."""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Protocol

import msgspec

from hpcctr.errors import ImageBroken, NotAnImage
from hpcctr.image import tarstream
from hpcctr.image.compression import CHUNK, Blob, decompressed, is_compressed
from hpcctr.image.imagefile import store_unusable
from hpcctr.image.record import Platform
from hpcctr.image.reference import ImageRef
from hpcctr.image.source import (
    DOCUMENT_MAX,
    INDEX_TYPES,
    Descriptor,
    Index,
    LayerBlob,
    SourceImage,
    fetch_document,
    image_of,
    parse,
    resolve,
)
from hpcctr.image.verification import sha256_of

_REF_NAME = "org.opencontainers.image.ref.name"
_MEMBERS_MAX = 100_000
_LINKS_MAX = 8
_HEX64 = re.compile(r"[0-9a-f]{64}")


class Files(Protocol):
    """Named files: a directory's, or an archive's members."""

    name: str

    def has(self, path: str) -> bool:
        """Whether there is a file of that name."""
        ...

    def open(self, path: str) -> io.BufferedIOBase | None:
        """None when there is no such file. Raises :class:`ImageBroken` when it is not a regular file."""
        ...


class DirectoryFiles:
    """The files below a directory."""

    def __init__(self, path: str) -> None:
        self.name = path
        self._path = path

    def has(self, path: str) -> bool:
        """See :class:`Files`."""
        return os.path.isfile(f"{self._path}/{path}")

    def open(self, path: str) -> io.BufferedIOBase | None:
        """See :class:`Files`."""
        return open_regular(f"{self._path}/{path}")


class ArchiveFiles:
    """The members of a tar file."""

    def __init__(self, path: str, name: str) -> None:
        self.name = name
        self._path = path
        self._members: dict[str, tuple[int, int] | str] = {}
        with _require_file(path) as file:
            for entry in _entries(file, name):
                member = _normal(os.fsdecode(entry.name))
                if entry.type == tarstream.REGULAR:
                    self._members[member] = (entry.offset, entry.size)
                elif entry.type == tarstream.HARDLINK:
                    self._members[member] = _normal(os.fsdecode(entry.link))
                elif entry.type == tarstream.SYMLINK:
                    # docker save once wrote a layer that two images share as a link beside it.
                    self._members[member] = _normal(os.path.join(os.path.dirname(member), os.fsdecode(entry.link)))
                if len(self._members) > _MEMBERS_MAX:
                    raise NotAnImage(f"{name} has more than {_MEMBERS_MAX} files: it is no image archive")

    def has(self, path: str) -> bool:
        """See :class:`Files`."""
        return self._find(path) is not None

    def open(self, path: str) -> io.BufferedIOBase | None:
        """See :class:`Files`."""
        place = self._find(path)
        if place is None:
            return None
        return io.BufferedReader(Slice(_require_file(self._path), *place), CHUNK)

    def _find(self, path: str) -> tuple[int, int] | None:
        place: tuple[int, int] | str | None = _normal(path)
        for _ in range(_LINKS_MAX):
            place = self._members.get(place) if isinstance(place, str) else place
        return place if isinstance(place, tuple) else None


def _entries(file: io.BufferedReader, name: str) -> Iterator[tarstream.Entry]:
    """The entries of a tar file; one that has not a single one was never an archive."""
    has_any = False
    try:
        for entry in tarstream.entries(_FileCursor(file), name):
            has_any = True
            yield entry
    except ImageBroken as error:
        if has_any:
            raise
        raise NotAnImage(
            f"{name} is not a tar archive ({error.message.removeprefix(name).strip()})", hint="name an image archive"
        ) from None


class LayoutSource:
    """An OCI image layout."""

    def __init__(self, files: Files) -> None:
        self._files = files
        if not files.has("index.json"):
            problem = "is what docker save writes" if files.has("manifest.json") else "has no index.json"
            raise NotAnImage(
                f"{files.name} {problem}",
                hint="for a docker archive: docker-archive:FILE; else oci-archive:FILE or oci:DIR",
            )

    def find(self, layout_ref: str, wanted: Platform) -> SourceImage:
        """The image with that reference, or the only one. Raises :class:`NotAnImage`, :class:`PlatformMissing`."""
        name = self._files.name
        content = _read_small(self._files, "index.json")
        index = parse(content, Index, f"{name}: index.json")
        refs = [(entry.annotations or {}).get(_REF_NAME, "") for entry in index.manifests]
        if layout_ref:
            entries = [entry for entry, ref in zip(index.manifests, refs, strict=True) if ref == layout_ref]
            if not entries:
                known = ", ".join(sorted({ref for ref in refs if ref})[:20])
                raise NotAnImage(
                    f"{name} has no image {layout_ref!r}", hint=f"it has: {known}" if known else "it names none"
                )
        else:
            entries = index.manifests
            if len({ref for ref in refs if ref}) > 1:
                raise NotAnImage(
                    f"{name} has several images", hint=f"choose one: {name}:{sorted(filter(None, refs))[0]}"
                )
        if not entries:
            raise NotAnImage(f"{name} has no image")
        if len(entries) == 1:
            top = fetch_document(self, entries[0], f"{name}: manifest")
        else:
            top = msgspec.json.encode({"schemaVersion": 2, "mediaType": INDEX_TYPES[0], "manifests": entries})
        return resolve(self, top, sha256_of(top), wanted, name)

    def document(self, descriptor: Descriptor) -> bytes:
        """See :class:`hpcctr.image.source.BlobSource`."""
        return _read_small(self._files, _blob_path(descriptor.digest))

    def open_layer(self, layer: LayerBlob) -> Blob:
        """The compressed bytes of a layer, not yet verified."""
        file = self._files.open(_blob_path(layer.digest))
        if file is None:
            raise ImageBroken(
                f"{self._files.name} lacks the blob {layer.digest}", hint="copy the image again, with all its layers"
            )
        return file


class _SavedImage(msgspec.Struct, frozen=True, rename="pascal"):
    config: str
    layers: list[str]
    repo_tags: list[str] | None = None


class DockerArchive:
    """What ``docker save`` and ``podman save`` write. Its layers have no digests but those of their uncompressed
    content."""

    def __init__(self, files: Files) -> None:
        self._files = files
        if not files.has("manifest.json"):
            problem = "is an OCI archive" if files.has("index.json") else "has no manifest.json"
            raise NotAnImage(f"{files.name} {problem}", hint="for an OCI archive: oci-archive:FILE")
        content = _read_small(files, "manifest.json")
        try:
            images = msgspec.json.decode(content, type=list[_SavedImage])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise NotAnImage(f"{files.name}: manifest.json cannot be read: {error}") from None
        if len(images) != 1:
            tags = ", ".join(tag for image in images for tag in image.repo_tags or ())
            raise NotAnImage(
                f"{files.name} has {len(images)} images", hint=f"save one image into one file; it has: {tags}"
            )
        self._image = images[0]
        self._by_diff_id: dict[str, str] = {}

    def find(self, wanted: Platform) -> SourceImage:
        """The image. Its digest is that of its config."""
        name = self._files.name
        config = _read_small(self._files, self._image.config)
        digest = sha256_of(config)
        promised = _HEX64.search(self._image.config)
        if promised and f"sha256:{promised[0]}" != digest:
            raise ImageBroken(f"{name}: the image config {self._image.config} has the digest {digest}")
        image = image_of(config, None, digest, wanted, name, count=len(self._image.layers))
        self._by_diff_id = {layer.diff_id: path for layer, path in zip(image.layers, self._image.layers, strict=True)}
        return image

    def open_layer(self, layer: LayerBlob) -> Blob:
        """The bytes of a layer, not yet verified."""
        path = self._by_diff_id[layer.diff_id]
        file = self._files.open(path)
        if file is None:
            raise ImageBroken(f"{self._files.name} lacks the layer {path}", hint="save the image again")
        return file


FileSource = LayoutSource | DockerArchive


def open_files(ref: ImageRef, workspace: str) -> FileSource:
    """The source a file reference names. Raises :class:`NotAnImage`, :class:`ImageBroken`, :class:`StoreUnusable`."""
    if ref.transport == "oci":
        if not os.path.isdir(ref.path):
            raise NotAnImage(
                f"{ref.path} is not a directory", hint="for a file: oci-archive:FILE or docker-archive:FILE"
            )
        return LayoutSource(DirectoryFiles(ref.path))
    with _require_file(ref.path) as file:
        first = file.read(8)
    path = _decompress(ref.path, f"{workspace}/archive.tar") if is_compressed(first) else ref.path
    files = ArchiveFiles(path, ref.path)
    return DockerArchive(files) if ref.transport == "docker-archive" else LayoutSource(files)


def find_image(source: FileSource, ref: ImageRef, wanted: Platform) -> SourceImage:
    """The image the reference means in the source."""
    return source.find(wanted) if isinstance(source, DockerArchive) else source.find(ref.layout_ref, wanted)


def open_regular(path: str) -> io.BufferedReader | None:
    """A regular file for reading; None when there is none. Raises :class:`NotAnImage`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise NotAnImage(f"{path}: {(error.strerror or str(error)).lower()}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotAnImage(f"{path} is not a regular file", hint="for a directory: oci:DIR")
    return io.BufferedReader(io.FileIO(descriptor, "rb"), CHUNK)


def _require_file(path: str) -> io.BufferedReader:
    file = open_regular(path)
    if file is None:
        raise NotAnImage(f"{path}: no such file")
    return file


def _decompress(path: str, target: str) -> str:
    with _require_file(path) as source:
        chunks: Iterator[bytes] = decompressed(source, path)
        try:
            with open(target, "xb") as file:
                for chunk in chunks:
                    file.write(chunk)
        except OSError as error:
            raise store_unusable(target, error) from None
    return target


def _read_small(files: Files, path: str) -> bytes:
    file = files.open(path)
    if file is None:
        raise ImageBroken(f"{files.name} lacks {path}", hint="copy the image again, with all its blobs")
    with file:
        content = file.read(DOCUMENT_MAX + 1)
    if len(content) > DOCUMENT_MAX:
        raise NotAnImage(f"{files.name}: {path} is larger than {DOCUMENT_MAX} bytes")
    return content


def _blob_path(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/', 1)}"


def _normal(path: str) -> str:
    return str(PurePosixPath(os.path.normpath("/" + path))).lstrip("/")


class _FileCursor:
    """What :func:`hpcctr.image.tarstream.entries` reads, over a file: contents are skipped without reading them."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self.position = 0

    def take(self, count: int) -> bytes:
        """At most ``count`` bytes; fewer only at the end."""
        out = self._file.read(count)
        self.position += len(out)
        return out

    def skip(self, count: int) -> bool:
        """Whether the file has so many bytes more."""
        self.position += count
        self._file.seek(self.position)
        return self.position <= self._size


class Slice(io.RawIOBase):
    """A part of a file, as a file. ``fileno`` is that of the whole one."""

    def __init__(self, file: io.BufferedReader, offset: int, size: int) -> None:
        self._file = file
        self._left = size
        self.offset, self.size = offset, size
        file.seek(offset)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)[: self._left]  # type: ignore[arg-type]
        count = self._file.readinto(view) if len(view) else 0
        self._left -= count
        return count

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()
        super().close()
