"""What the store knows of one image: the types behind ``image.json`` and ``names/…/TAG.ARCH.json``.

Pure data. The image's own words (``ImageConfig``) shape the workload only; nothing of hpcctr obeys them.
"""

from __future__ import annotations

import msgspec


class Platform(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Operating system and processor, in the words of the OCI image index (``linux``/``amd64``/``v3``)."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The part of the image's config that a launch reads (OCI image-spec ``config.md``). All of it is the image's
    claim.
    """

    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    labels: dict[str, str] = {}


class Changed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How many entries conversion changed, by kind: what the file has less than the layers."""

    setuid_bits: int = 0
    device_nodes: int = 0
    xattrs: int = 0
    made_readable: int = 0
    write_bits: int = 0


class ImageRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``images/<digest>/image.json``: written once, next to the file it describes."""

    schema: int
    #: Manifest digest; the config digest for sources without a manifest (docker-archive). ``sha256:<64 hex>``.
    digest: str
    platform: Platform
    config: ImageConfig
    #: Name of the image file in the same directory, ``root.squashfs``.
    file: str
    #: Bytes of the image file and ``sha256:<64 hex>`` of them.
    file_size: int
    file_digest: str
    #: Sum of the sizes of regular files in the tree, bytes; number of entries in the tree.
    content_size: int
    entries: int
    #: RFC 3339, UTC.
    created: str
    #: The name the image was pulled by, as :class:`hpcctr.image.reference.ImageRef` prints it.
    source: str
    #: Contents of /etc/passwd and /etc/group in the image, at most 1 MiB each; empty when absent or not a regular file.
    passwd: bytes = b""
    group: bytes = b""
    changed: Changed = Changed()
    #: The digest by which the kernel checks the file itself (fs-verity); empty where the filesystem does not.
    verity: str = ""


class NameEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of a name's history."""

    digest: str
    #: RFC 3339, UTC: from when on the name meant this digest.
    since: str
    #: What was pulled then, as :class:`hpcctr.image.reference.ImageRef` prints it.
    source: str = ""


class NameRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``names/<registry>/<repository>/<tag>.<arch>.json``: what a name means and meant, newest first."""

    schema: int
    name: str
    history: tuple[NameEntry, ...]


class StoredImage(msgspec.Struct, frozen=True, kw_only=True):
    """An image found in the store: its record and the absolute path of its file."""

    record: ImageRecord
    path: str
    #: The name it was found by; the digest itself when it was asked for by digest. ``@OWNER/`` begins the name of an
    #: image that another user shares.
    name: str
    #: In a user's own part of the store: what it is named says nothing about where it came from.
    is_private: bool = False
    #: Why the name led to this digest, for people.
    because: str = ""

    @property
    def policy_name(self) -> str:
        """What rules know it by. No name of the shared store begins so: its first part has a dot, a colon or is
        localhost.
        """
        name = self.name.partition("/")[2] if self.name.startswith("@") else self.name
        return f"private/{name}" if self.is_private else name
