"""Listings."""

from __future__ import annotations

import json

import pytest

from hpcctr.cli.table import Format, print_rows, size

ROWS = [{"name": "a[b]\x1b", "more": 3}]


def test_json_has_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(ROWS, ("name",), Format.JSON)
    assert json.loads(capsys.readouterr().out) == ROWS


def test_a_table_has_its_columns_and_nothing_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(ROWS, ("name",), Format.TABLE)
    text = capsys.readouterr().out
    assert "NAME" in text and "a[b]\\x1b" in text and "MORE" not in text
    assert "\x1b" not in text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (3_400_000_000, "3.4 GB")])
def test_sizes_are_for_people(count: int, text: str) -> None:
    assert size(count) == text
