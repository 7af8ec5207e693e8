"""The blobs of the site's pulls, kept where the site wants that: an OCI image layout that any tool reads.

    STORE/layout/oci-layout, index.json, blobs/sha256/<hex>      image-spec, image-layout.md
    STORE/layout/.entries/<image digest>.json                    what of it an image needs: :class:`_Entry`

index.json is made of the entries and renamed into place. Whoever has renamed it reads the entries once more, and makes
it anew when there are others by now: of any number of pulls at once, the one that renames last has seen the entries of
all. An entry is written before its blobs come, and blobs are listed before entries are read, so gc takes no blob of a
pull that is keeping them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator

import msgspec

from hpcctr.image.compression import CHUNK
from hpcctr.image.publish import write_flushed
from hpcctr.image.source import MANIFEST_TYPES, BlobSource, Descriptor, SourceImage, fetch_document, parse
from hpcctr.image.stale import looked_up_again
from hpcctr.image.verification import Verification

_MARKER = b'{"imageLayoutVersion":"1.0.0"}'
_NAME = "org.opencontainers.image.ref.name"
_ENTRIES = ".entries"
_INDEX_TRIES = 100


class _Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One image: its manifest, the name it was pulled by, since when, and the digests of all its blobs."""

    manifest: Descriptor
    name: str
    since: str
    blobs: tuple[str, ...]


class _Manifest(msgspec.Struct, frozen=True, rename="camel"):
    config: Descriptor
    media_type: str = MANIFEST_TYPES[0]


def directory_of(store_path: str) -> str:
    """Where the layout of a store is, or would be."""
    return f"{store_path}/layout"


def blob_path(layout: str, digest: str) -> str:
    """Where a blob is, or would be."""
    return f"{layout}/blobs/{digest.replace(':', '/', 1)}"


def keep(layout: str, source: BlobSource, image: SourceImage, blobs: str, *, name: str, since: str) -> None:
    """Keep what was downloaded to the directory ``blobs``, as ``hex of digest`` each; they are moved.

    Raises OSError, and what ``source`` raises when it does not give the manifest once more.
    """
    raw = source.document(Descriptor(digest=image.digest, size=-1, media_type=MANIFEST_TYPES[0]))
    check = Verification(image.digest, -1, f"manifest of {name}")
    check.add(raw)
    check.require_agreement()
    manifest = parse(raw, _Manifest, f"{name}: manifest")
    config = fetch_document(source, manifest.config, f"{name}: image config")
    layers = [layer.digest for layer in image.layers]
    entry = _Entry(
        manifest=Descriptor(digest=image.digest, size=len(raw), media_type=manifest.media_type),
        name=name,
        since=since,
        blobs=tuple(dict.fromkeys([image.digest, manifest.config.digest, *layers])),
    )
    for directory in (
        layout,
        f"{layout}/{_ENTRIES}",
        *(os.path.dirname(blob_path(layout, one)) for one in entry.blobs),
    ):
        looked_up_again(lambda directory=directory: os.makedirs(directory, 0o755, exist_ok=True))  # type: ignore[misc]
    _write(layout, "oci-layout", _MARKER)
    _write(layout, f"{_ENTRIES}/{image.digest.replace(':', '-')}.json", msgspec.json.encode(entry))
    for digest in dict.fromkeys(layers):
        with contextlib.suppress(FileNotFoundError):
            os.chmod(f"{blobs}/{digest.replace(':', '-')}", 0o644)
            os.replace(f"{blobs}/{digest.replace(':', '-')}", blob_path(layout, digest))
    for digest, content in ((image.digest, raw), (manifest.config.digest, config)):
        _write(layout, os.path.relpath(blob_path(layout, digest), layout), content)
    write_index(layout)


def lend(layout: str, digest: str, path: str) -> bool:
    """Whether a kept blob has the name ``path`` as well now; not verified."""
    try:
        os.link(blob_path(layout, digest), path, follow_symlinks=False)
    except OSError:
        return False
    return True


def write_index(layout: str) -> None:
    """Make index.json of the entries whose blobs are all there. Raises OSError."""
    for _ in range(_INDEX_TRIES):
        entries = _entries(layout)
        _write(layout, "index.json", _index(layout, entries))
        if _entries(layout) == entries:
            return


def drop_entries(layout: str, stored: set[str]) -> None:
    """Forget the images the store has no more. Raises OSError."""
    gone = [digest for digest in _entries(layout) if digest not in stored]
    for digest in gone:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{layout}/{_ENTRIES}/{digest.replace(':', '-')}.json")
    if gone:
        write_index(layout)


def unreferenced(layout: str, stored: set[str]) -> Iterator[tuple[str, os.stat_result]]:
    """Blobs that no stored image needs, as paths below the layout. Raises OSError."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for algorithm in sorted(os.listdir(f"{layout}/blobs")):
            found += [f"{algorithm}/{name}" for name in sorted(os.listdir(f"{layout}/blobs/{algorithm}"))]
    entries = _entries(layout)
    needed = {
        blob.replace(":", "/", 1) for digest, entry in entries.items() if digest in stored for blob in entry.blobs
    }
    for path in found:
        if path not in needed:
            with contextlib.suppress(FileNotFoundError):
                yield f"blobs/{path}", os.lstat(f"{layout}/blobs/{path}")


def _entries(layout: str) -> dict[str, _Entry]:
    entries = {}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for name in sorted(os.listdir(f"{layout}/{_ENTRIES}")):
            path = f"{layout}/{_ENTRIES}/{name}"
            if not name.endswith(".json") or name.startswith("."):
                continue
            # One that a gc has taken meanwhile, or that is damaged, is none.
            with contextlib.suppress(FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
                entry = msgspec.json.decode(_read(path), type=_Entry)
                entries[name.removesuffix(".json").replace("-", ":", 1)] = entry
    return entries


def _index(layout: str, entries: dict[str, _Entry]) -> bytes:
    newest = {entry.name: digest for digest, entry in sorted(entries.items(), key=lambda item: item[1].since)}
    manifests = []
    for digest, entry in entries.items():
        if not all(os.path.exists(blob_path(layout, blob)) for blob in entry.blobs):
            continue
        described: dict[str, object] = {
            "mediaType": entry.manifest.media_type,
            "digest": entry.manifest.digest,
            "size": entry.manifest.size,
        }
        if newest[entry.name] == digest:
            described["annotations"] = {_NAME: entry.name}
        manifests.append(described)
    return msgspec.json.encode({"schemaVersion": 2, "manifests": manifests})


def _read(path: str) -> bytes:
    def read() -> bytes:
        with open(path, "rb") as file:
            return file.read(CHUNK)

    return looked_up_again(read)


def _write(layout: str, name: str, content: bytes) -> None:
    temporary = f"{layout}/.new-{secrets.token_hex(8)}"
    try:
        write_flushed(temporary, content)
        os.replace(temporary, f"{layout}/{name}")
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
