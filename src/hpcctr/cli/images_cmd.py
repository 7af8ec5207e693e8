"""``hpcctr pull|images|inspect|rm``: the store's commands."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from typing import Annotated

import msgspec
import typer

from hpcctr.cli import bringing, locking, own_images, shared_images
from hpcctr.cli.bringing import pull_one
from hpcctr.cli.progress import say
from hpcctr.cli.table import Format, print_rows, printable, size
from hpcctr.client.as_of import job_start
from hpcctr.client.environment import of_this_process
from hpcctr.errand import Quota, Removed
from hpcctr.errors import EngineUnreachable
from hpcctr.image import platform as platforms
from hpcctr.image.record import Platform
from hpcctr.image.reference import ImageRef
from hpcctr.image.shelves import is_shared_name
from hpcctr.image.store import Store
from hpcctr.image.uses import last_used
from hpcctr.site import Site

FormatOption = Annotated[Format, typer.Option("--format", help="How to print.")]
PlatformOption = Annotated[
    str | None, typer.Option("--platform", metavar="PLATFORM", help="OS/ARCH[/VARIANT]; default: this node's.")
]


def pull(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE...",
            help="[docker://]NAME[:TAG][@DIGEST], oci-archive:FILE[:REF], docker-archive:FILE, or oci:DIR[:REF].",
        ),
    ],
    platform: PlatformOption = None,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Name it has in the store.")] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Into your own images, with your credentials, seen by nobody else.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read a stored image as a whole, and bring it anew when it is damaged.")
    ] = False,
    lock: Annotated[
        str | None,
        typer.Option("--lock", metavar="FILE", help="Write names and digests into FILE, for hpcctr run --locked."),
    ] = None,
) -> None:
    """Bring images into the store: downloaded, verified, and written as one read-only file each.

    One process brings an image, however many ask for it on however many nodes; the others wait. The name to run an
    image by is printed at the end.
    """
    if lock:
        locking.require_writable(lock)
    brought = []
    for image in images:
        if lock and is_shared_name(image):
            brought.append(locking.of_shared(image, platform or ""))
        else:
            brought.append(pull_one(image, platform=platform or "", name=name or "", is_private=private, verify=verify))
        typer.echo(shared_images.familiar_name(brought[-1].name))
    if lock:
        locking.write(lock, brought)
    if job_start(of_this_process()) is not None:
        say("in this job, names keep what they meant when it started; HPCCTR_AS_OF=now for what they mean now")


def images(
    mine: Annotated[bool, typer.Option("--mine", help="Only your own.")] = False,
    format: FormatOption = Format.TABLE,  # noqa: A002
) -> None:
    """List the images of the store: those of the site, your own, and what others share with you."""
    site = Site.of_this_process()
    rows: list[dict[str, object]] = []
    quota = None
    store = Store.open(site.store)
    for stored in () if mine else store.images():
        record = stored.image.record if stored.image is not None else None
        place = (stored.name, str(stored.platform), stored.digest, stored.since)
        used = last_used(store.image_directory(stored.digest))
        rows.append(_row("site", *place, record.file_size if record else None, used))
    try:
        for one in own_images.listed_with_quota(site):
            if isinstance(one, Quota):
                quota = one
                continue
            size_of_file = own_images.facts(one).get("file_size")
            place = (one.name, one.platform, one.digest, one.since)
            rows.append(_row("you", *place, size_of_file if isinstance(size_of_file, int) else None, one.last_used))
    except EngineUnreachable as error:
        if mine:
            raise
        say(f"without your own images: {error}")
    rows += _shared_rows(site) if not mine else []
    print_rows(rows, ("name", "platform", "short_digest", "size", "since", "last_used", "whose"), format)
    if mine and quota is not None:
        say(f"{size(quota.used)} of {size(quota.limit)} that your own images may take")


def _shared_rows(site: Site) -> list[dict[str, object]]:
    rows = []
    try:
        for one in shared_images.listed(site):
            owner = shared_images.owner_name(one.owner or 0)
            place = (one.name, one.platform, one.digest, one.since)
            row = _row(owner, *place, one.record.file_size if one.record else None, one.last_used)
            rows.append({**row, "name": shared_images.familiar(owner, one.name)})
    except EngineUnreachable as error:
        say(f"without what others share with you: {error}")
    return rows


def _row(
    whose: str, name: str, platform: str, digest: str, since: str, file_size: int | None, used: float
) -> dict[str, object]:
    return {
        "name": ImageRef.parse(name).familiar if not name.startswith("sha256:") else name,
        "platform": platform,
        "digest": digest,
        "short_digest": digest[:19],
        "since": since,
        "file_size": file_size,
        "size": "missing" if file_size is None else size(file_size),
        "last_used": datetime.fromtimestamp(used, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if used else "",
        "whose": whose,
    }


def inspect(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A name or digest as hpcctr images prints it.")],
    platform: PlatformOption = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the image file as a whole and compare it with its digest.")
    ] = False,
    format: FormatOption = Format.TABLE,  # noqa: A002
) -> None:
    """Show what the store knows of an image: its config, where it came from, what conversion changed."""
    from hpcctr.image.publish import require_intact

    site = Site.of_this_process()
    is_shared = is_shared_name(image)
    own = None if is_shared else own_images.find(site, image)
    if is_shared and not verify:
        facts = shared_images.facts(site, image, platform or "")
    elif own is not None:
        if verify:
            own_images.require_intact(site, own)
        facts = own_images.facts(own)
    else:
        stored = (
            shared_images.found(site, image, platform or "")
            if is_shared
            else Store.open(site.store).find(image, _platform(platform))
        )
        if verify:
            require_intact(stored)
        facts = {"name": stored.name, **msgspec.to_builtins(stored.record), "path": stored.path}
    for key in ("passwd", "group"):
        facts.pop(key, None)
    if format is Format.JSON:
        typer.echo(json.dumps(facts, indent=2))
        return
    linkage = facts.pop("facts", None)
    for key, value in [*_flat(facts), *_of_linkage(linkage if isinstance(linkage, dict) else None)]:
        typer.echo(f"{key:22} {printable(str(value))}")


def rm(
    names: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Names or digests as hpcctr images prints them.")
    ],
    platform: PlatformOption = None,
) -> None:
    """Remove names from the store, and images that no name means any more. Running programs keep their image."""
    from hpcctr.image.publish import remove
    from hpcctr.image.sharing import drop_dangling

    site = Site.of_this_process()
    is_writer = bringing.is_writer(site.store) or os.geteuid() == 0
    for name in names:
        if is_writer:
            store, its_name = (
                shared_images.part_of(site, name) if is_shared_name(name) else (own_images.writable_store(site), name)
            )
            gone_from_store = remove(store, its_name, _platform(platform))
            drop_dangling(store)
            removed = Removed(
                names=gone_from_store.names,
                digests=gone_from_store.digests,
                freed=gone_from_store.freed,
                used_on=gone_from_store.used_on,
            )
        else:
            removed = own_images.remove(site, shared_images.own_name(name), platform or "")
        for gone in (*removed.names, *removed.digests):
            typer.echo(f"removed {gone}")
        say(f"{size(removed.freed)} freed")
        if removed.used_on:
            say(
                f"programs run in it on {', '.join(removed.used_on)}: its file stays until they have ended, then "
                "hpcctr gc frees it"
            )


def _platform(text: str | None) -> Platform | None:
    return platforms.parse(text) if text else None


def _of_linkage(known: dict[str, object] | None) -> list[tuple[str, object]]:
    """What programs of the image meet when they are loaded; one line for each MPI library."""
    if known is None:
        return [("libc", "not noted: the image was stored by an earlier hpcctr")]
    libc = f"{known.get('libc', '')} {known.get('libc_version', '')}".strip()
    rows: list[tuple[str, object]] = [("libc", libc or "none"), ("loader", known.get("loader") or "none")]
    rows.append(("libraries", known.get("library_count", 0)))
    mpi = known.get("mpi")
    for one in mpi if isinstance(mpi, list | tuple) else ():
        name = f"{one.get('product') or 'MPI library'} {one.get('version', '')}".strip()
        words = ", ".join(one.get("pmi", ())) or "an unknown PMI"
        rows.append(("mpi", f"{name} ({one.get('family')}, {words}) {one.get('path')}"))
    if known.get("pmix"):
        rows.append(("pmix", known["pmix"]))
    return rows


def _flat(facts: dict[str, object], prefix: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for key, value in facts.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            rows += [(f"{prefix}{key}", entry) for entry in value]
        elif isinstance(value, int) and key.endswith("_size"):
            rows.append((f"{prefix}{key}", f"{value} ({size(value)})"))
        else:
            rows.append((f"{prefix}{key}", value))
    return rows
