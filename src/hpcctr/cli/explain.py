"""``run --explain``: what would be granted, mounted and set, with the origin of each."""

from __future__ import annotations

import os
import shlex

import typer

from hpcctr.cli.table import print_table, printable
from hpcctr.client.carry import KERNEL_TREES
from hpcctr.client.run import Launch


def show(launch: Launch) -> None:
    """Print the plan of a launch that does not happen."""
    granted = launch.granted
    for head, text in (
        ("image", granted.text("name")),
        ("digest", granted.text("digest")),
        ("which is", granted.text("because", "") or "what was asked for"),
        ("allowed by", granted.text("rule")),
        ("command", shlex.join(map(os.fsdecode, launch.command))),
        ("starts in", _text(launch.baggage.directory)),
    ):
        typer.echo(f"{head:11} {printable(text)}")
    for note in granted.every("note"):
        typer.echo(f"{'':11} {printable(os.fsdecode(note))}")
    for text in launch.warnings:
        typer.echo(f"{'warning':11} {printable(text)}")
    mounts: list[tuple[str, ...]] = [
        (_text(tree), _text(tree), "rw", "the node's, as you see it") for tree in KERNEL_TREES
    ]
    for mount in launch.baggage.mounts:
        mounts.append((_text(mount.target), _text(mount.source), "ro" if mount.read_only else "rw", mount.origin))
    typer.echo()
    mounts += [tuple(os.fsdecode(edit).split("\t")) for edit in granted.every("edit")]
    print_table(("INSIDE", "FROM", "MODE", "BECAUSE OF"), mounts)
    if launch.devices:
        typer.echo()
        print_table(
            ("DEVICE", "OF", "FOR YOU"), [(device.path, device.name, device.state) for device in launch.devices]
        )
    origins = {name: os.fsdecode(origin) for name, _, origin in _parts(granted.every("env-origin"))}
    others = [
        (
            _text(name),
            _text(variable.value),
            origins.get(name, "site") if variable.origin == "site" else variable.origin,
        )
        for name, variable in sorted(launch.variables.items())
        if variable.origin != "caller"
    ]
    typer.echo()
    print_table(("VARIABLE", "VALUE", "FROM"), others)
    typer.echo(f"and {len(launch.variables) - len(others)} of your own, unchanged")
    if launch.dropped:
        typer.echo()
        print_table(
            ("NOT TAKEN ALONG", "BECAUSE"), [(_text(name), why) for name, why in sorted(launch.dropped.items())]
        )


def _parts(fields: list[bytes]) -> list[tuple[bytes, bytes, bytes]]:
    return [field.partition(b" ") for field in fields]


def _text(value: bytes) -> str:
    return value.decode(errors="backslashreplace")
