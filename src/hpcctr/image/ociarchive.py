"""One image as an OCI archive, written as a stream: what a user's own process hands to a storekeeper.

Format: a tar file (pax) of an OCI image layout, image-spec ``image-layout.md``, with the one image.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from typing import BinaryIO, Protocol, cast

import msgspec

from hpcctr.errors import ImageBroken
from hpcctr.image.compression import CHUNK, Blob
from hpcctr.image.source import (
    MANIFEST_TYPES,
    BlobSource,
    Descriptor,
    LayerBlob,
    SourceImage,
    fetch_document,
    parse,
)


class Writable(Protocol):
    """Where the stream goes."""

    def write(self, data: bytes, /) -> int | None:
        """As of a file; all of it."""
        ...


class _Manifest(msgspec.Struct, frozen=True, rename="camel"):
    config: Descriptor
    media_type: str = MANIFEST_TYPES[0]


def write(
    out: Writable, source: BlobSource, image: SourceImage, open_layer: Callable[[LayerBlob], Blob], name: str
) -> None:
    """Write ``image`` of ``source``. Layers are passed on unread: the receiver verifies them by their digests.

    Raises :class:`ImageBroken` for a layer that is not as long as its manifest says, and what the source raises.
    """
    raw = source.document(Descriptor(digest=image.digest, size=-1, media_type=MANIFEST_TYPES[0]))
    manifest = parse(raw, _Manifest, f"{name}: manifest")
    config = fetch_document(source, manifest.config, f"{name}: image config")
    index = {
        "schemaVersion": 2,
        "manifests": [{"mediaType": manifest.media_type, "digest": image.digest, "size": len(raw)}],
    }
    with tarfile.open(fileobj=cast(BinaryIO, out), mode="w|", bufsize=CHUNK, format=tarfile.PAX_FORMAT) as tar:
        _add(tar, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        _add(tar, "index.json", msgspec.json.encode(index))
        _add(tar, _path(image.digest), raw)
        _add(tar, _path(manifest.config.digest), config)
        for layer in {layer.digest: layer for layer in image.layers}.values():
            blob = open_layer(layer)
            try:
                member = tarfile.TarInfo(_path(layer.digest))
                member.size = layer.size
                tar.addfile(member, cast(io.BufferedReader, blob))
            except OSError as error:
                if error.errno is None:  # tarfile's own: the blob ended early
                    raise ImageBroken(f"{name}: blob {layer.digest} is shorter than its manifest promises") from None
                raise
            finally:
                blob.close()


def _add(tar: tarfile.TarFile, path: str, content: bytes) -> None:
    member = tarfile.TarInfo(path)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _path(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/', 1)}"
