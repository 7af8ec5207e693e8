"""``hpcctr gc``: the store put in order, by root or the store's owner."""

from __future__ import annotations

from typing import Annotated

import typer

from hpcctr.cli import own_images, shared_images
from hpcctr.cli.progress import say
from hpcctr.cli.table import Format, print_rows, size
from hpcctr.errors import UsageWrong
from hpcctr.image import gc as images_gc
from hpcctr.image import quota, uses
from hpcctr.image.gc import DAY, Garbage
from hpcctr.image.imagefile import store_unusable
from hpcctr.site import Site


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be removed.")] = False,
    older_than: Annotated[
        float,
        typer.Option("--older-than", metavar="DAYS", min=0, help="Days an image stays without a name and without use."),
    ] = images_gc.IMAGE_DAYS,
    keep_bytes: Annotated[
        str,
        typer.Option("--keep-bytes", metavar="SIZE", help="Remove images until all take at most SIZE, as 20TB."),
    ] = "",
    unused: Annotated[
        bool, typer.Option("--unused", help="With --keep-bytes: named ones as well, the longest unused first.")
    ] = False,
    mark_days: Annotated[
        float | None,
        typer.Option(
            "--mark-days",
            metavar="DAYS",
            min=1,
            help="Days the mark of a node counts that vanished; default: the site's.",
        ),
    ] = None,
    forget_node: Annotated[
        list[str] | None,
        typer.Option("--forget-node", metavar="NODE", help="First remove the marks of a node that is dead."),
    ] = None,
    format: Annotated[Format, typer.Option("--format", help="How to print.")] = Format.TABLE,  # noqa: A002
) -> None:
    """Put the store in order: remove images that nobody has named or used for some days, and what killed pulls left.

    What runs is never removed, on whatever node: nodes mark what they use. A node that cannot write the store makes no
    mark; for it, give more days than your longest job has.
    """
    if unused and not keep_bytes:
        raise UsageWrong("--unused goes with --keep-bytes", hint="hpcctr gc --keep-bytes SIZE --unused")
    keep = quota.parse_size(keep_bytes) if keep_bytes else None
    site = Site.of_this_process()
    shared_images.require_administrator(site, "gc")
    own_images.become_owner(site)
    for node in forget_node or ():
        _forget(site, node, dry_run)
    marks_for = site.mark_days if mark_days is None else mark_days
    rows = []
    for part, store in images_gc.parts(site.store):
        work = images_gc.find_garbage if dry_run else images_gc.collect
        rows += [_row(part, one) for one in work(store, image_days=older_than, mark_days=marks_for)]
        rows += shared_images.put_in_order(site, part, store, dry_run=dry_run)
    too_many = 0
    if keep is not None:
        doomed = {str(row["what"]) for row in rows}
        freed = sum(int(str(row["bytes"])) for row in rows if str(row["kind"]).endswith("image")) if dry_run else 0
        surplus, too_many = quota.find_surplus(
            site.store, keep_bytes=keep, may_be_named=unused, freed=freed, mark_days=marks_for, but=doomed
        )
        for one in surplus:
            if dry_run or quota.take(one, mark_days=marks_for):
                rows.append(_row(one.part, one.garbage))
            else:
                too_many += one.garbage.size
    print_rows(rows, ("kind", "what", "size", "unwanted_for"), format)
    total = sum(int(str(row["bytes"])) for row in rows)
    say(f"{size(total)} {'would be freed' if dry_run else 'freed'}")
    if too_many:
        say(
            f"{size(too_many)} more than --keep-bytes: what is left is used, "
            + ("or was within the hour" if unused else "or has a name (--unused)")
        )


def _forget(site: Site, node: str, dry_run: bool) -> None:
    if not uses.is_node_name(node):
        raise UsageWrong(f"--forget-node {node!r}: not the name of a node", hint="as uname -n prints it there")
    count = 0
    try:
        for part in uses.parts_of(site.store):
            for directory in uses.image_directories(part):
                if dry_run:
                    count += sum(mark.node == node for mark in uses.marks(directory))
                else:
                    count += uses.forget_node(directory, node)
    except OSError as error:
        raise store_unusable(error.filename or site.store, error) from None
    say(f"{count} marks of {node} {'would be removed' if dry_run else 'removed'}")


def _row(part: str, garbage: Garbage) -> dict[str, object]:
    return {
        "kind": garbage.kind,
        "what": f"{part}{garbage.what}",
        "bytes": garbage.size,
        "size": size(garbage.size),
        "seconds": round(garbage.age),
        "unwanted_for": f"{garbage.age / DAY:.1f} days",
    }
