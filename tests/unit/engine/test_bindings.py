"""The record of the host's files in a container, and what the kernel's table must say of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcctr.engine import bindings
from hpcctr.engine.bindings import NotAsAsked
from hpcctr.errors import FeatureUnusable
from hpcctr.host.trusted import identity_of
from hpcctr.mounttable import MountEntry, mount_number, read_mounts
from hpcctr.spec.mounts import BindMount


def _bind(
    target: str, *, kind: str = "f", read_only: bool = True, noexec: bool = False, identity: str = ""
) -> BindMount:
    return BindMount(
        source="/opt/source",
        target=target,
        kind="d" if kind == "d" else "f",
        is_read_only=read_only,
        is_noexec=noexec,
        identity=identity,
        origin="site",
    )


def _entry(target: str, *words: str) -> MountEntry:
    options = frozenset(words or ("ro", "nosuid", "nodev"))
    return MountEntry(target=target, options=options, super_options=(), propagation=(), kind="ext4", source="x")


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    binds = (_bind("/a b\n"), _bind("/d", kind="d", read_only=False, noexec=True, identity="1:2"))
    bindings.write(str(tmp_path), binds)
    assert bindings.read(str(tmp_path)) == binds
    with pytest.raises(FileExistsError):
        bindings.write(str(tmp_path), binds)


def test_nothing_is_written_for_nothing_and_read_as_that(tmp_path: Path) -> None:
    bindings.write(str(tmp_path), ())
    assert list(tmp_path.iterdir()) == []
    assert bindings.read(str(tmp_path)) == ()


@pytest.mark.parametrize(
    "text",
    [b"", b"[", b"{}", b'[{"target":"/a"}]', b"[1]"],
)
def test_what_is_no_record_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / bindings.RECORD).write_bytes(text)
    with pytest.raises(NotAsAsked, match="cannot be read"):
        bindings.read(str(tmp_path))


@pytest.mark.parametrize(
    "change", [(b'"kind":"f"', b'"kind":"x"'), (b'"origin"', b'"more":1,"origin"'), (b"true", b"1")]
)
def test_a_record_with_something_else_in_it_is_refused(tmp_path: Path, change: tuple[bytes, bytes]) -> None:
    bindings.write(str(tmp_path), (_bind("/a"),))
    file = tmp_path / bindings.RECORD
    changed = file.read_bytes().replace(*change)
    assert changed != file.read_bytes()
    file.write_bytes(changed)
    with pytest.raises(NotAsAsked, match="cannot be read"):
        bindings.read(str(tmp_path))


def test_a_record_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / bindings.RECORD).symlink_to("/etc/passwd")
    with pytest.raises(OSError):
        bindings.read(str(tmp_path))


def test_exactly_what_was_asked_for_is_accepted() -> None:
    bindings.require_as_asked([], [])
    binds = [_bind("/a"), _bind("/d", kind="d"), _bind("/w", read_only=False), _bind("/n", noexec=True)]
    bindings.require_as_asked(
        [
            _entry("/a"),
            _entry("/d"),
            _entry("/d/of/the/host"),
            _entry("/w", "rw", "nosuid", "nodev"),
            _entry("/n", "ro", "nosuid", "nodev", "noexec", "relatime"),
        ],
        binds,
    )


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([], "nothing is mounted on /a"),
        ([_entry("/a"), _entry("/d"), _entry("/x")], "something is mounted on /x"),
        ([_entry("/a"), _entry("/a"), _entry("/d")], "two things are mounted on /a"),
        ([_entry("/a"), _entry("/d"), _entry("/a/below")], "something is mounted on /a/below"),
        ([_entry("/a"), _entry("/d"), _entry("/dx")], "something is mounted on /dx"),
        ([_entry("/a", "rw", "nosuid", "nodev"), _entry("/d")], "/a is not ro"),
        ([_entry("/a", "ro", "nodev"), _entry("/d")], "/a is not nosuid"),
        ([_entry("/a", "ro", "nosuid"), _entry("/d")], "/a is not nodev"),
        ([_entry("/a"), _entry("/d"), _entry("/d/sub", "rw", "nodev")], "/d/sub is not nosuid, ro"),
    ],
)
def test_anything_else_is_refused(entries: list[MountEntry], reason: str) -> None:
    with pytest.raises(NotAsAsked, match=f"^{reason}$"):
        bindings.require_as_asked(entries, [_bind("/a"), _bind("/d", kind="d")])


def _root() -> MountEntry:
    descriptor = os.open("/", os.O_PATH)
    try:
        mine = mount_number(descriptor)
    finally:
        os.close(descriptor)
    return next(entry for entry in read_mounts() if entry.number == mine)


def test_what_is_there_is_compared_with_what_was_looked_at(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    bind = _bind(str(file), identity=identity_of(file.stat()))
    bindings.require_unchanged(os.getpid(), _root(), [bind])
    os.utime(file, ns=(1, 1))
    with pytest.raises(FeatureUnusable, match="^site: /opt/source changed while it was mounted$"):
        bindings.require_unchanged(os.getpid(), _root(), [bind])
    file.unlink()
    with pytest.raises(FeatureUnusable, match="changed while it was mounted"):
        bindings.require_unchanged(os.getpid(), _root(), [bind])


def test_a_link_in_its_place_is_another_thing(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("x")
    link.symlink_to("file")
    with pytest.raises(FeatureUnusable, match="changed while it was mounted"):
        bindings.require_unchanged(os.getpid(), _root(), [_bind(str(link), identity=identity_of(file.stat()))])


def test_another_root_is_noticed(tmp_path: Path) -> None:
    other = next(entry for entry in read_mounts() if entry.number != _root().number)
    with pytest.raises(NotAsAsked, match="root has been replaced"):
        bindings.require_unchanged(os.getpid(), other, [_bind("/etc/passwd")])
