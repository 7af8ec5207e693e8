"""Listings for people and for programs: the same rows as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum

import typer


class Format(StrEnum):
    """What ``--format`` takes."""

    TABLE = "table"
    JSON = "json"


def print_rows(rows: Sequence[Mapping[str, object]], columns: Sequence[str], format: Format) -> None:  # noqa: A002
    """Print rows; the table shows ``columns``, JSON every key."""
    if format is Format.JSON:
        typer.echo(json.dumps(list(rows), indent=2))
        return
    print_table(
        [column.upper().replace("_", " ") for column in columns], [[row[key] for key in columns] for row in rows]
    )


def print_table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Aligned columns, a line a row: nothing is cut or folded, so that names can be copied and grepped."""
    lines = [list(heads), *([printable(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(line[number]) for line in lines) for number in range(len(heads))]
    for line in lines:
        typer.echo("   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def printable(text: str) -> str:
    """The text with what a terminal could obey written as an escape."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def size(count: int) -> str:
    """Bytes for people: ``3.4 GB``, powers of 1000 as in docker."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
