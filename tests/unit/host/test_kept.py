"""Values that are kept while the files they were made of are what they were."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcctr.host import kept
from hpcctr.host.kept import Kept, with_entries


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("one")
    return path


def _reader(path: Path, calls: list[str]) -> Callable[[], tuple[str, list[str]]]:
    def read() -> tuple[str, list[str]]:
        calls.append("read")
        return path.read_text(), [str(path), str(path.parent)]

    return read


def _rewrite(path: Path) -> None:
    path.write_text("two")
    os.utime(path, ns=(0, 0))


def _replace(path: Path) -> None:
    new = path.with_name("new")
    new.write_text("two")
    new.rename(path)


@pytest.mark.parametrize("change", [_rewrite, _replace])
def test_a_value_is_made_once_until_a_file_changes(file: Path, change: Callable[[Path], None]) -> None:
    values: Kept[str] = Kept()
    calls: list[str] = []
    make = _reader(file, calls)
    assert [values.get("key", make), values.get("key", make)] == ["one", "one"]
    assert calls == ["read"]
    change(file)
    assert values.get("key", make) == "two"


@pytest.mark.parametrize("change", [lambda path: path.chmod(0o666), lambda path: os.chown(path, 61999, -1)])
def test_a_file_that_others_may_write_now_is_looked_at_anew(file: Path, change: Callable[[Path], None]) -> None:
    values: Kept[str] = Kept()
    calls: list[str] = []
    values.get("key", _reader(file, calls))
    change(file)
    values.get("key", _reader(file, calls))
    assert calls == ["read", "read"]


def test_a_value_is_made_anew_after_a_while(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "SECONDS", 0.0)
    values: Kept[str] = Kept()
    calls: list[str] = []
    for _ in range(2):
        values.get("key", _reader(file, calls))
    assert calls == ["read", "read"]


def test_of_those_who_ask_at_once_one_works_it_out(file: Path) -> None:
    values: Kept[str] = Kept()
    calls: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> tuple[str, list[str]]:
        calls.append("made")
        begun.set()
        assert go_on.wait(10)
        return "value", [str(file)]

    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(values.get("key", slow))) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert begun.wait(10)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert found == ["value"] * 8
    assert len(calls) <= 2


def test_an_error_is_not_kept(file: Path) -> None:
    values: Kept[str] = Kept()
    with pytest.raises(FileNotFoundError):
        values.get("key", lambda: ((file.parent / "gone").read_text(), []))
    assert values.get("key", _reader(file, [])) == "one"


def test_a_file_that_appears_or_goes_is_seen(tmp_path: Path) -> None:
    before = kept.looked_at(with_entries([str(tmp_path)]))
    (tmp_path / "new").touch()
    assert kept.looked_at(with_entries([str(tmp_path)])) != before
    assert kept.looked_at([str(tmp_path / "absent")]) == ((),)
    assert with_entries([str(tmp_path / "absent")]) == [str(tmp_path / "absent")]


def test_no_more_than_a_bounded_number_of_values_is_kept(file: Path) -> None:
    values: Kept[str] = Kept()
    for number in range(1000):
        values.get(number, lambda: ("x", [str(file)]))
    calls: list[str] = []
    values.get(0, _reader(file, calls))
    values.get(999, _reader(file, calls))
    assert calls == ["read"]
