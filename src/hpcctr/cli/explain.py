"""``run --explain``: what would be granted, mounted and set, with the origin of each."""

from __future__ import annotations

import os
import shlex

from rich.console import Console
from rich.table import Table

from hpcctr.client.carry import KERNEL_TREES
from hpcctr.client.run import Launch


def show(launch: Launch) -> None:
    """Print the plan of a launch that does not happen."""
    console = Console(highlight=False, soft_wrap=True)
    granted = launch.granted
    console.print(f"image     {granted.text('name')}", markup=False)
    console.print(f"digest    {granted.text('digest')}", markup=False)
    console.print(f"allowed   {granted.text('rule')}", markup=False)
    console.print(f"command   {shlex.join(map(os.fsdecode, launch.command))}", markup=False)
    console.print(f"starts in {_shown(launch.baggage.directory)}\n", markup=False)
    mounts = _table("inside", "from", "mode", "because of")
    for tree in KERNEL_TREES:
        mounts.add_row(_shown(tree), _shown(tree), "rw", "the node's own, as you see it")
    for mount in launch.baggage.mounts:
        mounts.add_row(_shown(mount.target), _shown(mount.source), "ro" if mount.read_only else "rw", mount.origin)
    console.print(mounts)
    variables = _table("variable", "value", "from")
    for name, variable in sorted(launch.variables.items()):
        if variable.origin != "caller":
            variables.add_row(_shown(name), _shown(variable.value), variable.origin)
    kept = sum(variable.origin == "caller" for variable in launch.variables.values())
    console.print(variables)
    console.print(f"{kept} variables are yours, unchanged", markup=False)
    if launch.dropped:
        dropped = _table("not taken along", "because")
        for name, reason in sorted(launch.dropped.items()):
            dropped.add_row(_shown(name), reason)
        console.print(dropped)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _shown(value: bytes) -> str:
    """Bytes as text for a terminal: what is not printable is escaped, and nothing is taken for markup."""
    text = value.decode(errors="backslashreplace")
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text).replace("[", r"\[")
