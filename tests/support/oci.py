"""Container images for tests, written down to the byte: tar layers, OCI layouts, archives of both kinds.

Independent of the program under test: headers are laid out here, from POSIX pax and the GNU tar manual.

    image = busybox()                                             # runs: static busybox with its applets
    write_oci_archive(tmp / "busybox.tar", image)
    image = Image(layers=(tar(file("etc/motd", b"hi")), tar(whiteout("etc/motd"))))
    write_layout(tmp / "layout", image, ref="v1")
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import zstandard

from hpcctr.context import machine

Compression = Literal["gzip", "zstd", "none"]

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
_SUFFIX = {"gzip": "+gzip", "zstd": "+zstd", "none": ""}
_DOCKER_SUFFIX = {"gzip": ".gzip", "zstd": ".zstd", "none": ""}

#: 2023-11-14T22:13:20Z
MTIME = 1_700_000_000


# tar


@dataclass(frozen=True, kw_only=True)
class Member:
    """One entry of a tar stream: its header fields as they are written, and the records before it."""

    name: bytes
    type: bytes
    content: bytes = b""
    link: bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: int = MTIME
    device: tuple[int, int] = (0, 0)
    #: Size field of the header; None: that of the content.
    size: int | None = None
    #: Records of a pax header before the entry.
    pax: Mapping[str, bytes] = field(default_factory=dict)
    #: Long names as a pax path or as GNU ``L`` and ``K`` entries; ``ustar`` splits them into prefix and name.
    long_names: Literal["gnu", "pax", "ustar"] = "gnu"
    magic: bytes = b"ustar\0" + b"00"


def file(name: str | bytes, content: bytes = b"", *, mode: int = 0o644, **fields: Any) -> Member:
    return Member(name=_bytes(name), type=b"0", content=content, mode=mode, **fields)


def directory(name: str | bytes, *, mode: int = 0o755, **fields: Any) -> Member:
    return Member(name=_bytes(name), type=b"5", mode=mode, **fields)


def symlink(name: str | bytes, target: str | bytes, **fields: Any) -> Member:
    return Member(name=_bytes(name), type=b"2", link=_bytes(target), mode=0o777, **fields)


def hardlink(name: str | bytes, target: str | bytes, **fields: Any) -> Member:
    return Member(name=_bytes(name), type=b"1", link=_bytes(target), **fields)


def character_device(name: str | bytes, major: int, minor: int, **fields: Any) -> Member:
    return Member(name=_bytes(name), type=b"3", device=(major, minor), **fields)


def fifo(name: str | bytes, **fields: Any) -> Member:
    return Member(name=_bytes(name), type=b"6", **fields)


def whiteout(path: str | bytes) -> Member:
    """The entry that hides ``path`` of lower layers."""
    parent, slash, name = _bytes(path).rpartition(b"/")
    return file(parent + slash + b".wh." + name)


def opaque(path: str | bytes) -> Member:
    """The entry that hides what lower layers have in directory ``path``."""
    path = _bytes(path)
    return file((path + b"/" if path else b"") + b".wh..wh..opq")


def tar(*members: Member | bytes, end: bytes = bytes(1024)) -> bytes:
    """A tar stream; raw bytes among the members are written as they are."""
    return b"".join(member if isinstance(member, bytes) else member_bytes(member) for member in members) + end


def member_bytes(member: Member) -> bytes:
    """All blocks of one entry."""
    out = io.BytesIO()
    pax = dict(member.pax)
    name, link, prefix = member.name, member.link, b""
    if len(name) > 100 and member.long_names == "ustar":
        cut = name.index(b"/", len(name) - 101)
        prefix, name = name[:cut], name[cut + 1 :]
    elif len(name) > 100 and member.long_names == "pax":
        pax["path"] = name
    elif len(name) > 100:
        out.write(_block(Member(name=b"././@LongLink", type=b"L", content=name + b"\0")))
    if len(link) > 100 and member.long_names == "pax":
        pax["linkpath"] = link
    elif len(link) > 100:
        out.write(_block(Member(name=b"././@LongLink", type=b"K", content=link + b"\0")))
    if pax:
        records = b"".join(pax_record(key, value) for key, value in pax.items())
        out.write(_block(Member(name=b"PaxHeaders/x", type=b"x", content=records)))
    out.write(_block(replace(member, name=name[:100], link=link[:100]), prefix=prefix))
    return out.getvalue()


def pax_record(key: str, value: bytes) -> bytes:
    body = b" " + key.encode() + b"=" + value + b"\n"
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return str(length).encode() + body


def number(value: int, width: int) -> bytes:
    """Octal, and base-256 (GNU tar manual, "Basic Tar Format") for what octal cannot hold."""
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    raw = bytearray(value.to_bytes(width, "big", signed=True))
    raw[0] |= 0x80
    return bytes(raw)


def _block(member: Member, *, prefix: bytes = b"") -> bytes:
    size = len(member.content) if member.size is None else member.size
    header = bytearray(512)
    for start, value in (
        (0, member.name),
        (100, number(member.mode, 8)),
        (108, number(member.uid, 8)),
        (116, number(member.gid, 8)),
        (124, number(size, 12)),
        (136, number(member.mtime, 12)),
        (148, b" " * 8),
        (156, member.type),
        (157, member.link),
        (257, member.magic),
        (329, number(member.device[0], 8)),
        (337, number(member.device[1], 8)),
        (345, prefix),
    ):
        header[start : start + len(value)] = value
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + member.content + bytes(-len(member.content) % 512)


def _bytes(name: str | bytes) -> bytes:
    return name if isinstance(name, bytes) else name.encode()


# images


@dataclass(frozen=True, kw_only=True)
class Image:
    """An image: uncompressed layers, lowest first, and its config. ``compression`` is of all layers or of each."""

    layers: tuple[bytes, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    architecture: str = field(default_factory=machine)
    os: str = "linux"
    variant: str = ""
    compression: Compression | tuple[Compression, ...] = "gzip"
    #: Media types of Docker's schema 2 instead of OCI's.
    docker: bool = False

    def compression_of(self, index: int) -> Compression:
        return self.compression if isinstance(self.compression, str) else self.compression[index]

    @property
    def platform(self) -> dict[str, str]:
        return {"os": self.os, "architecture": self.architecture} | ({"variant": self.variant} if self.variant else {})

    def config_bytes(self) -> bytes:
        document = {
            **self.platform,
            "created": "2023-11-14T22:13:20Z",
            "config": dict(self.config),
            "rootfs": {"type": "layers", "diff_ids": [digest_of(layer) for layer in self.layers]},
            "history": [{"created_by": "test"} for _ in self.layers],
        }
        return json.dumps(document).encode()

    def blobs(self) -> tuple[bytes, list[bytes]]:
        """The manifest, and all blobs but it: the config, then the compressed layers."""
        config = self.config_bytes()
        layers = [compress(layer, self.compression_of(index)) for index, layer in enumerate(self.layers)]
        types = (DOCKER_MANIFEST, DOCKER_CONFIG) if self.docker else (OCI_MANIFEST, OCI_CONFIG)
        manifest = {
            "schemaVersion": 2,
            "mediaType": types[0],
            "config": descriptor(config, types[1]),
            "layers": [
                descriptor(
                    blob,
                    DOCKER_LAYER + _DOCKER_SUFFIX[self.compression_of(index)]
                    if self.docker
                    else OCI_LAYER + _SUFFIX[self.compression_of(index)],
                )
                for index, blob in enumerate(layers)
            ],
        }
        return json.dumps(manifest).encode(), [config, *layers]

    @property
    def digest(self) -> str:
        """Of the manifest."""
        return digest_of(self.blobs()[0])


def digest_of(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def descriptor(blob: bytes, media_type: str, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest_of(blob), "size": len(blob), **more}


def compress(layer: bytes, how: Compression) -> bytes:
    if how == "gzip":
        return gzip.compress(layer, compresslevel=1, mtime=0)
    return zstandard.ZstdCompressor(level=1).compress(layer) if how == "zstd" else layer


# layouts and archives


def layout_files(image: Image | Sequence[Image], *, ref: str = "") -> dict[str, bytes]:
    """An OCI image layout as a mapping of paths to contents. Several images become one index by platform."""
    images = [image] if isinstance(image, Image) else list(image)
    files = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}'}

    def add(blob: bytes) -> None:
        files[f"blobs/sha256/{hashlib.sha256(blob).hexdigest()}"] = blob

    entries = []
    for one in images:
        manifest, blobs = one.blobs()
        for blob in (manifest, *blobs):
            add(blob)
        media_type = DOCKER_MANIFEST if one.docker else OCI_MANIFEST
        entries.append(descriptor(manifest, media_type, platform=one.platform))
    if len(entries) == 1:
        top = dict(entries[0])
        del top["platform"]
    else:
        index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()
        add(index)
        top = descriptor(index, OCI_INDEX)
    if ref:
        top["annotations"] = {"org.opencontainers.image.ref.name": ref}
    files["index.json"] = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [top]}).encode()
    return files


def write_layout(path: Path, image: Image | Sequence[Image], *, ref: str = "") -> Path:
    """An OCI image layout in the directory ``path``."""
    return write_files(path, layout_files(image, ref=ref))


def write_oci_archive(path: Path, image: Image | Sequence[Image], *, ref: str = "") -> Path:
    """An OCI image layout in the tar file ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar(*(file(name, content) for name, content in layout_files(image, ref=ref).items())))
    return path


def docker_archive_files(image: Image, *, tags: Sequence[str] = ()) -> dict[str, bytes]:
    """What ``docker save`` puts into its archive."""
    config = image.config_bytes()
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    names = [f"{hashlib.sha256(layer).hexdigest()}-{index}/layer.tar" for index, layer in enumerate(image.layers)]
    layers = {
        name: compress(layer, image.compression_of(index))
        for index, (name, layer) in enumerate(zip(names, image.layers, strict=True))
    }
    manifest = [{"Config": config_name, "RepoTags": list(tags), "Layers": names}]
    return {config_name: config, **layers, "manifest.json": json.dumps(manifest).encode()}


def write_docker_archive(path: Path, image: Image, *, tags: Sequence[str] = ()) -> Path:
    """``docker save`` of the image; its layers are uncompressed unless the image says otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar(*(file(name, content) for name, content in docker_archive_files(image, tags=tags).items())))
    return path


def write_files(path: Path, files: Mapping[str, bytes]) -> Path:
    """Files below the directory ``path``."""
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


# an image that runs


@cache
def _busybox_binary() -> tuple[bytes, tuple[str, ...]]:
    path = Path("/bin/busybox")
    applets = subprocess.run([path, "--list"], capture_output=True, text=True, check=True).stdout.split()
    return path.read_bytes(), tuple(applet for applet in applets if applet != "busybox")


def busybox_members() -> list[Member]:
    """The tree of :func:`busybox`."""
    binary, applets = _busybox_binary()
    return [
        *(
            directory(name)
            for name in ("bin", "etc", "root", "usr", "usr/bin", "var", "home", "proc", "sys", "dev", "run")
        ),
        directory("tmp", mode=0o1777),
        file("bin/busybox", binary, mode=0o755),
        *(symlink(f"bin/{applet}", "busybox") for applet in applets),
        symlink("usr/bin/env", "../../bin/busybox"),
        file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"),
        file("etc/group", b"root:x:0:\nnogroup:x:65534:\n"),
    ]


def busybox(
    *members: Member,
    config: Mapping[str, Any] | None = None,
    layers: Sequence[bytes] = (),
    compression: Compression | tuple[Compression, ...] = "gzip",
    docker: bool = False,
) -> Image:
    """Debian's busybox-static with a link for each applet, /etc/passwd, /etc/group and /tmp; then ``members`` in the
    same layer, then ``layers`` over it. ``config`` is added to Env PATH and Cmd /bin/sh."""
    return Image(
        layers=(tar(*busybox_members(), *members), *layers),
        config={"Env": ["PATH=/usr/local/bin:/usr/bin:/bin"], "Cmd": ["/bin/sh"], **(config or {})},
        compression=compression,
        docker=docker,
    )
