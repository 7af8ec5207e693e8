"""``hpcctr pull|images|inspect|rm|gc``: the store's commands."""

from __future__ import annotations

import json
import os
from typing import Annotated

import msgspec
import typer

from hpcctr.cli import bringing, own_images
from hpcctr.cli.bringing import pull_one
from hpcctr.cli.progress import say
from hpcctr.cli.table import Format, print_rows, printable, size
from hpcctr.errand import Removed
from hpcctr.errors import EngineUnreachable, ImageBroken
from hpcctr.image import platform as platforms
from hpcctr.image.record import Platform, StoredImage
from hpcctr.image.reference import ImageRef
from hpcctr.image.store import Store
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
) -> None:
    """Bring images into the store: downloaded, verified, and written as one read-only file each.

    One process brings an image, however many ask for it on however many nodes; the others wait. The name to run an
    image by is printed at the end.
    """
    for image in images:
        typer.echo(pull_one(image, platform=platform or "", name=name or "", is_private=private, verify=verify))


def images(
    mine: Annotated[bool, typer.Option("--mine", help="Only your own.")] = False,
    format: FormatOption = Format.TABLE,  # noqa: A002
) -> None:
    """List the images of the store: those of the site, and your own."""
    site = Site.of_this_process()
    rows: list[dict[str, object]] = []
    for stored in () if mine else Store.open(site.store).images():
        record = stored.image.record if stored.image is not None else None
        place = (stored.name, str(stored.platform), stored.digest, stored.since)
        rows.append(_row("site", *place, record.file_size if record else None))
    try:
        for one in own_images.listed(site):
            size_of_file = own_images.facts(one).get("file_size")
            place = (one.name, one.platform, one.digest, one.since)
            rows.append(_row("you", *place, size_of_file if isinstance(size_of_file, int) else None))
    except EngineUnreachable as error:
        if mine:
            raise
        say(f"without your own images: {error}")
    print_rows(rows, ("name", "platform", "short_digest", "size", "since", "whose"), format)


def _row(whose: str, name: str, platform: str, digest: str, since: str, file_size: int | None) -> dict[str, object]:
    return {
        "name": ImageRef.parse(name).familiar if not name.startswith("sha256:") else name,
        "platform": platform,
        "digest": digest,
        "short_digest": digest[:19],
        "since": since,
        "file_size": file_size,
        "size": "missing" if file_size is None else size(file_size),
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
    site = Site.of_this_process()
    own = own_images.find(site, image)
    if own is not None and not verify:
        facts = own_images.facts(own)
    else:
        stored = Store.open(site.store).find(image, _platform(platform))
        if verify:
            _require_intact(stored)
        facts = {"name": stored.name, **msgspec.to_builtins(stored.record), "path": stored.path}
    for key in ("passwd", "group"):
        facts.pop(key, None)
    if format is Format.JSON:
        typer.echo(json.dumps(facts, indent=2))
        return
    for key, value in _flat(facts):
        typer.echo(f"{key:22} {printable(str(value))}")


def rm(
    names: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Names or digests as hpcctr images prints them.")
    ],
    platform: PlatformOption = None,
) -> None:
    """Remove names from the store, and images that no name means any more. Running programs keep their image."""
    from hpcctr.image.publish import remove

    site = Site.of_this_process()
    is_writer = bringing.is_writer(site.store) or os.geteuid() == 0
    for name in names:
        if is_writer:
            gone_from_store = remove(own_images.writable_store(site), name, _platform(platform))
            removed = Removed(names=gone_from_store.names, digests=gone_from_store.digests, freed=gone_from_store.freed)
        else:
            removed = own_images.remove(site, name, platform or "")
        for gone in (*removed.names, *removed.digests):
            typer.echo(f"removed {gone}")
        say(f"{size(removed.freed)} freed")


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be removed.")] = False,
    older_than: Annotated[
        float,
        typer.Option("--older-than", metavar="DAYS", min=0, help="Days an image stays without a name."),
    ] = 7.0,
    format: FormatOption = Format.TABLE,  # noqa: A002
) -> None:
    """Put the store in order: remove images that no name has meant for some days, and what killed pulls left.

    An image that runs on another node is protected by the days alone: give more of them than your longest job has.
    """
    from hpcctr.image.gc import DAY, collect, find_garbage, parts

    site = Site.of_this_process()
    own_images.become_owner(site)
    rows: list[dict[str, object]] = []
    for part, store in parts(site.store):
        for garbage in (find_garbage if dry_run else collect)(store, image_days=older_than):
            rows.append(
                {
                    "kind": garbage.kind,
                    "what": f"{part}{garbage.what}",
                    "bytes": garbage.size,
                    "size": size(garbage.size),
                    "seconds": round(garbage.age),
                    "unwanted_for": f"{garbage.age / DAY:.1f} days",
                }
            )
    print_rows(rows, ("kind", "what", "size", "unwanted_for"), format)
    total = sum(int(str(row["bytes"])) for row in rows)
    say(f"{size(total)} {'would be freed' if dry_run else 'freed'}")


def _require_intact(stored: StoredImage) -> None:
    from hpcctr.image.publish import is_intact

    if not is_intact(stored):
        raise ImageBroken(
            f"{stored.path} is not what was published: its size or digest differs",
            hint=f"hpcctr pull --verify {stored.record.source}",
        )


def _platform(text: str | None) -> Platform | None:
    return platforms.parse(text) if text else None


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
