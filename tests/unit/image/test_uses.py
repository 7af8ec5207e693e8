"""Marks on images, and the gate: of a removal and a node that begins to use an image exactly one fails."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from hpcctr.image import uses
from hpcctr.image.gc import DAY, collect, find_garbage, take_image
from hpcctr.image.publish import remove, remove_closed_image, remove_image, set_name
from hpcctr.image.record import Platform
from hpcctr.image.reference import ImageRef
from hpcctr.image.store import Store
from tests.unit.image.test_gc import age
from tests.unit.image.test_publish import put

AMD = Platform(os="linux", architecture="amd64")
MOUNT = "0123456789abcdef" * 2
MARK = uses.Mark.file_of("n7", "gateway", MOUNT)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"), writable=True)


def mark(directory: str, file: str = MARK) -> None:
    """As an engine makes one."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        uses.make_mark(descriptor, file)
    finally:
        os.close(descriptor)


def unmark(directory: str, file: str = MARK) -> None:
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        uses.remove_mark(descriptor, file)
    finally:
        os.close(descriptor)


def aged(store: Store, seed: str, days: float = 30) -> str:
    digest = put(store, seed)
    age(store.image_directory(digest), days)
    return digest


def test_a_mark_names_node_engine_and_mount_and_stamps_the_image(store: Store) -> None:
    directory = store.image_directory(aged(store, "a"))
    before = uses.last_used(directory)
    mark(directory)
    (found,) = uses.marks(directory)
    assert (found.node, found.engine, found.mount) == ("n7", "gateway", MOUNT)
    assert uses.last_used(directory) > before + 29 * DAY
    os.utime(f"{directory}/used", (0, 0))
    unmark(directory)
    assert uses.marks(directory) == []
    assert uses.last_used(directory) == uses.last_used_by_server(directory) > before
    # Once more is no harm.
    unmark(directory)


def test_marks_are_the_owners_to_see_and_the_stamp_is_everybodys(store: Store) -> None:
    directory = store.image_directory(aged(store, "a"))
    assert stat.S_IMODE(os.stat(f"{directory}/uses").st_mode) == 0o700
    assert stat.S_IMODE(os.stat(f"{directory}/used").st_mode) == 0o644


@pytest.mark.parametrize("name", ["n7", "node-1.cluster.example", "gpu_node", "x" * 64])
def test_what_hosts_are_called_is_a_nodes_name(name: str) -> None:
    assert uses.is_node_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", ".x", "-x", "a/b", "a+b", "a b", "x" * 65, "é", "a\n", "?"])
def test_what_could_be_a_path_or_another_mark_is_none(name: str) -> None:
    assert not uses.is_node_name(name)


def test_what_a_node_uses_stays_and_goes_after_its_last_mark(store: Store) -> None:
    digest = aged(store, "a")
    directory = store.image_directory(digest)
    other = uses.Mark.file_of("n8", "direct-4711", MOUNT)
    mark(directory)
    mark(directory, other)
    age(directory, 30)
    assert collect(store) == []
    unmark(directory)
    age(directory, 30)
    assert collect(store) == []
    unmark(directory, other)
    # It was used a moment ago.
    assert collect(store) == []
    age(directory, 8)
    assert [one.what for one in collect(store)] == [digest]


def test_days_count_from_the_last_use_and_not_only_from_the_last_name(store: Store) -> None:
    digest = aged(store, "a")
    directory = store.image_directory(digest)
    moment = os.stat(directory).st_mtime + 27 * DAY
    os.utime(f"{directory}/used", (moment, moment))
    assert find_garbage(store) == []
    (garbage,) = find_garbage(store, image_days=2.9)
    assert (garbage.what, round(garbage.age / DAY)) == (digest, 3)


def test_the_mark_of_a_vanished_node_counts_for_so_many_days(store: Store) -> None:
    digest = aged(store, "a", 70)
    directory = store.image_directory(digest)
    mark(directory)
    age(directory, 59)
    assert collect(store) == []
    age(directory, 61)
    assert find_garbage(store) != []
    assert find_garbage(store, mark_days=62) == []
    assert [one.what for one in collect(store)] == [digest]


def test_an_old_mark_that_its_node_has_made_anew_is_put_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = store.image_directory(aged(store, "a"))
    mark(directory)
    age(directory, 61)
    before = os.stat(directory).st_mtime + DAY
    seen = uses.marks(directory)
    mark(directory)
    with monkeypatch.context() as patch:
        patch.setattr(uses, "marks", lambda _: seen)
        uses.drop_old_marks(directory, before=before)
    assert [one.file for one in uses.marks(directory)] == [MARK]
    assert not uses.close_gate(directory)


def test_a_dead_nodes_marks_are_forgotten_and_no_others(store: Store) -> None:
    directory = store.image_directory(aged(store, "a"))
    files = [uses.Mark.file_of(node, "gateway", MOUNT) for node in ("n7", "n70", "n8")]
    for file in files:
        mark(directory, file)
    assert uses.forget_node(directory, "n7") == 1
    assert [one.node for one in uses.marks(directory)] == ["n70", "n8"]
    assert uses.forget_node(directory, "n7") == 0


def test_what_is_in_a_gate_and_is_no_mark_keeps_the_image_as_long_as_one(store: Store) -> None:
    digest = aged(store, "a")
    directory = store.image_directory(digest)
    Path(directory, "uses/.nfs0001").touch()
    age(directory, 30)
    assert collect(store) == []
    age(directory, 61)
    assert [one.what for one in collect(store)] == [digest]


# the two that race


def test_of_a_removal_and_a_mark_exactly_one_fails(store: Store) -> None:
    directory = store.image_directory(aged(store, "a"))
    for _ in range(300):
        barrier = threading.Barrier(2)
        made: list[bool] = []

        def use() -> None:
            barrier.wait()  # noqa: B023
            try:
                mark(directory)
            except FileNotFoundError:
                made.append(False)  # noqa: B023
            else:
                made.append(True)  # noqa: B023

        thread = threading.Thread(target=use)
        thread.start()
        barrier.wait()
        is_closed = uses.close_gate(directory)
        thread.join()
        assert made == [not is_closed]
        if is_closed:
            uses.open_gate_again(directory)
        else:
            unmark(directory)


def test_a_mark_that_comes_after_gc_has_looked_keeps_the_image(store: Store) -> None:
    digest = aged(store, "a")
    assert [one.what for one in find_garbage(store)] == [digest]
    mark(store.image_directory(digest))
    age(store.image_directory(digest), 30)
    assert not take_image(store, digest)
    assert store.is_whole(digest)


def test_a_mark_that_comes_after_the_gate_is_closed_is_refused_and_makes_no_directory(store: Store) -> None:
    directory = store.image_directory(aged(store, "a"))
    held = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    assert uses.close_gate(directory)
    with pytest.raises(FileNotFoundError):
        uses.make_mark(held, MARK)
    os.close(held)
    assert not uses.has_gate(directory)


def test_a_mark_through_a_directory_that_was_removed_and_published_anew_is_refused(store: Store) -> None:
    """What a client that remembers the old directory does on NFS."""
    digest = aged(store, "a")
    held = os.open(f"{store.image_directory(digest)}", os.O_PATH | os.O_DIRECTORY)
    assert remove_image(store, digest) is not None
    put(store, "a")
    with pytest.raises(FileNotFoundError):
        uses.make_mark(held, MARK)
    os.close(held)
    assert uses.marks(store.image_directory(digest)) == []


def test_a_pull_that_names_the_image_while_gc_looks_keeps_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name itself is not seen yet: a client remembers what was not there."""
    digest = aged(store, "a")
    assert find_garbage(store) != []
    assert uses.is_renewed(store.image_directory(digest))
    set_name(store, ImageRef.parse("app:1"), AMD, digest)
    monkeypatch.setattr("hpcctr.image.gc._named", lambda _: set())
    assert not take_image(store, digest)
    assert store.is_whole(digest)


def test_a_pull_that_comes_after_the_gate_is_closed_knows_that_the_image_goes(store: Store) -> None:
    digest = aged(store, "a")
    assert uses.close_gate(store.image_directory(digest))
    assert not uses.is_renewed(store.image_directory(digest))
    assert not store.is_whole(digest)
    assert not uses.is_renewed(f"{store.path}/images/none")


def test_an_image_published_while_its_predecessor_is_removed_stays(store: Store) -> None:
    digest = aged(store, "a")
    directory = store.image_directory(digest)
    assert uses.close_gate(directory)
    put(store, "a", content=b"hsqs new")
    # The first remover goes on, by the same path.
    assert remove_closed_image(store, directory) is None
    assert store.is_whole(digest)
    assert Path(store.image(digest).path).read_bytes() == b"hsqs new"


def test_of_two_removers_one_removes(store: Store) -> None:
    digest = aged(store, "a")
    directory = store.image_directory(digest)
    assert uses.close_gate(directory) and uses.close_gate(directory)
    assert [remove_closed_image(store, directory), remove_closed_image(store, directory)] == [4, None]


def test_a_gate_that_a_killed_gc_left_closed_is_opened_again_for_a_name(store: Store) -> None:
    digest = aged(store, "a")
    set_name(store, ImageRef.parse("app:1"), AMD, digest)
    directory = store.image_directory(digest)
    uses.close_gate(directory)
    collect(store)
    assert not uses.has_gate(directory)
    age(directory, 1)
    collect(store)
    assert store.is_whole(digest)


# removal of what is used


def test_an_image_removed_while_a_node_uses_it_is_set_aside_until_it_does_not(store: Store) -> None:
    digest = put(store, "a", "app:1", content=b"x" * 100)
    inode = os.stat(store.image(digest).path).st_ino
    held = os.open(store.image_directory(digest), os.O_PATH | os.O_DIRECTORY)
    uses.make_mark(held, MARK)
    removed = remove(store, "app:1")
    assert (removed.digests, removed.freed, removed.used_on) == ((digest,), 0, ("n7",))
    assert store.digests() == []
    (aside,) = Path(store.path, "leaving").iterdir()
    assert (aside / "root.squashfs").stat().st_ino == inode
    assert collect(store, image_days=0) == []
    # The engine's mark goes by the directory it has open, wherever that is now; then so does the file, at once.
    uses.remove_mark(held, MARK)
    os.close(held)
    (garbage,) = collect(store)
    assert (garbage.kind, garbage.what) == ("removed image", f"leaving/{aside.name}")
    assert list(Path(store.path, "leaving").iterdir()) == []


def test_what_replaces_a_damaged_image_leaves_the_file_to_who_runs_it(store: Store) -> None:
    digest = put(store, "a")
    mark(store.image_directory(digest))
    os.truncate(store.image(digest).path, 1)
    put(store, "a")
    assert store.is_whole(digest)
    assert uses.marks(store.image_directory(digest)) == []
    (aside,) = Path(store.path, "leaving").iterdir()
    assert [one.node for one in uses.marks(str(aside))] == ["n7"]


def test_every_image_of_every_part_is_found(store: Store) -> None:
    mine = Store.open(f"{store.path}/users/4711", writable=True)
    first, second = put(store, "a"), put(mine, "b")
    third = put(store, "c")
    mark(store.image_directory(third))
    remove_image(store, third)
    found = [path for part in uses.parts_of(store.path) for path in uses.image_directories(part)]
    assert found[0] == store.image_directory(first)
    assert found[2] == mine.image_directory(second)
    assert Path(found[1]).parent == Path(store.path, "leaving")
