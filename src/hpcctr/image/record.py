"""What the store knows of one image: the types behind ``image.json`` and ``names/…/TAG.ARCH.json``.

Pure data. The image's own words (``ImageConfig``) shape the workload only; nothing of hpcctr obeys them.
"""

from __future__ import annotations

from typing import Literal

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


class Library(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A shared library that ld.so finds by its name: it is in a default directory, or in one of the image's ld.so.conf.

    One of more than 16 MiB that does not tell at its beginning and end is noted under the names of its file.
    """

    #: DT_SONAME; the name of its file where it has none.
    soname: str
    #: Of the file itself: absolute, no symbolic link in it.
    path: str
    #: DT_VERDEF: the symbol versions it defines, without the base; at most 200.
    defines: tuple[str, ...] = ()


class MpiLibrary(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An MPI library, wherever in the image a program could load it from."""

    soname: str
    path: str
    #: Whose binary interface it has: that of MPICH, Open MPI, or the standard's own (MPI 5.0, libmpi_abi).
    family: Literal["mpich", "openmpi", "mpi-abi", "unknown"]
    #: ``4.0.2``, in its product's own counting; empty when it does not say.
    version: str = ""
    #: What it says to the launcher: ``pmi1``, ``pmi2``, ``pmix``; empty when that is not known.
    pmi: tuple[Literal["pmi1", "pmi2", "pmix"], ...] = ()
    #: ``MPICH``, ``Open MPI``, ``Intel MPI``, ``Cray MPICH``, ``MVAPICH``; empty when it does not say.
    product: str = ""


class ImageFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a program of the image meets when it is loaded, as noted at conversion: ``facts.json``.

    All of it is the image's claim, read from files that anybody may have made. It decides nothing but whether a launch
    in this very image is checked rightly, and how: a false claim harms who runs that image, and nobody else.
    """

    libc: Literal["glibc", "musl", ""] = ""
    #: ``2.36``, ``1.2.5``.
    libc_version: str = ""
    #: The dynamic loader as programs name it, ``/lib64/ld-linux-x86-64.so.2``; empty when there is none.
    loader: str = ""
    #: In the order in which ld.so searches: of several with one SONAME the first is loaded, unless a processor's own
    #: directory (glibc-hwcaps/…) has one.
    libraries: tuple[Library, ...] = ()
    mpi: tuple[MpiLibrary, ...] = ()
    #: Version of the image's PMIx library; empty when there is none, or it does not say.
    pmix: str = ""


class FactsSummary(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Of :class:`ImageFacts` what every launch may ask for; ``image.json`` has it."""

    libc: Literal["glibc", "musl", ""] = ""
    libc_version: str = ""
    loader: str = ""
    library_count: int = 0
    mpi: tuple[MpiLibrary, ...] = ()
    pmix: str = ""

    @classmethod
    def of(cls, facts: ImageFacts) -> FactsSummary:
        """All but the libraries."""
        return cls(
            libc=facts.libc,
            libc_version=facts.libc_version,
            loader=facts.loader,
            library_count=len(facts.libraries),
            mpi=facts.mpi,
            pmix=facts.pmix,
        )


class FactsRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``images/<digest>/facts.json``: written once, before ``image.json`` beside it, which has the summary."""

    schema: int
    digest: str
    facts: ImageFacts


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
    #: None for an image that was stored before such facts were noted, and where noting them failed. All of them:
    #: :func:`hpcctr.image.facts.facts_of`.
    facts: FactsSummary | None = None


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
