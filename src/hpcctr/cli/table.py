"""Listings for people and for programs: the same rows as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum

import typer
from rich.console import Console
from rich.table import Table


class Format(StrEnum):
    """What ``--format`` takes."""

    TABLE = "table"
    JSON = "json"


def print_rows(rows: Sequence[Mapping[str, object]], columns: Sequence[str], format: Format) -> None:  # noqa: A002
    """Print rows; the table shows ``columns``, JSON every key."""
    if format is Format.JSON:
        typer.echo(json.dumps(list(rows), indent=2))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in columns:
        table.add_column(column.upper().replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(_plain(row[column]) for column in columns))
    Console(highlight=False, markup=False, soft_wrap=True).print(table)


def size(count: int) -> str:
    """Bytes for people: ``3.4 GB``, powers of 1000 as in docker."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def _plain(value: object) -> str:
    text = str(value)
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
