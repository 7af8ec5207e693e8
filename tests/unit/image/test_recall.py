"""Small files read once for many."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from hpcctr.image import recall
from hpcctr.image.recall import Recall


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that are opened."""
    paths: list[str] = []
    true_open = os.open

    def spy(path: str, flags: int, *rest: int) -> int:
        paths.append(path)
        return true_open(path, flags, *rest)

    monkeypatch.setattr(os, "open", spy)
    return paths


def test_a_file_is_opened_once_for_all_that_come_at_once(tmp_path: Path, opened: list[str]) -> None:
    path = tmp_path / "record"
    path.write_bytes(b"one")
    kept = Recall()
    assert [kept.read(str(path), 100) for _ in range(5)] == [b"one"] * 5
    assert opened == [str(path)]


def test_of_many_that_want_a_file_at_once_one_opens_it(tmp_path: Path, opened: list[str]) -> None:
    """Also when that fails: then each learns of it by itself."""
    path = tmp_path / "record"
    path.write_bytes(b"one")
    kept, start = Recall(), threading.Barrier(8)
    seen: list[bytes] = []

    def want() -> None:
        start.wait()
        seen.append(kept.read(str(path), 100))

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen == [b"one"] * 8 and len(opened) == 1
    assert kept._turns == {}
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            kept.read(str(tmp_path / "nothing"), 100)
    assert kept._turns == {}


def test_what_this_node_changed_is_seen_at_once(tmp_path: Path) -> None:
    path, new = tmp_path / "record", tmp_path / "new"
    path.write_bytes(b"one")
    kept = Recall()
    assert kept.read(str(path), 100) == b"one"
    new.write_bytes(b"two")
    new.rename(path)
    assert kept.read(str(path), 100) == b"two"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        kept.read(str(path), 100)


def test_what_looks_the_same_is_read_again_after_a_moment(
    tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record"
    path.write_bytes(b"one")
    kept = Recall()
    kept.read(str(path), 100)
    monkeypatch.setattr(recall, "FRESH_SECONDS", 0.0)
    kept.read(str(path), 100)
    assert len(opened) == 2
    # But not what is never changed, for longer.
    kept.read(str(path), 100, is_settled=True)
    assert len(opened) == 2
    monkeypatch.setattr(recall, "SETTLED_SECONDS", 0.0)
    kept.read(str(path), 100, is_settled=True)
    assert len(opened) == 3


def test_links_and_what_is_no_file_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(OSError, match="symbolic link"):
        Recall().read(str(tmp_path / "link"), 9)
    with pytest.raises(IsADirectoryError):
        Recall().read(str(tmp_path), 9)


def test_memory_is_bounded(tmp_path: Path, opened: list[str]) -> None:
    kept = Recall()
    for number in range(300):
        (tmp_path / str(number)).write_bytes(b"x")
        kept.read(str(tmp_path / str(number)), 9)
    assert len(kept._kept) == 256
    (tmp_path / "large").write_bytes(bytes(2 << 20))
    assert len(kept.read(str(tmp_path / "large"), 1 << 30)) == 2 << 20
    assert str(tmp_path / "large") not in kept._kept
