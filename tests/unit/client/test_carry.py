"""What a caller takes along."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcctr.client.carry import gather, is_carried, volume
from hpcctr.errors import SourceMissing, TargetImpossible, UsageWrong, WorkingDirectoryMissing


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A directory tree ``home/work`` and ``data``, the caller standing in ``home/work``; not below /tmp, which is
    always carried.
    """
    (tmp_path / "home/work").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file").write_text("x")
    monkeypatch.chdir(tmp_path / "home/work")
    monkeypatch.setattr(
        "hpcctr.client.carry.os.path.isdir", lambda path: path != b"/tmp" and Path(os.fsdecode(path)).is_dir()
    )
    return os.fsencode(tmp_path)


def test_home_and_working_directory_come_in_once(place: bytes) -> None:
    baggage = gather({b"HOME": place + b"/home"})
    assert [(mount.source, mount.target) for mount in baggage.mounts] == [(place + b"/home",) * 2]
    assert baggage.directory == place + b"/home/work"


def test_without_home_the_working_directory_still_comes_in(place: bytes) -> None:
    baggage = gather({b"HOME": place + b"/home"}, no_home=True)
    assert [mount.target for mount in baggage.mounts] == [place + b"/home/work"]


def test_directories_named_by_variables_come_in_where_they_exist(place: bytes) -> None:
    baggage = gather(
        {b"TMPDIR": place + b"/data/", b"PMIX_SERVER_TMPDIR": place + b"/gone", b"XDG_RUNTIME_DIR": b"relative"}
    )
    assert place + b"/data" in [mount.target for mount in baggage.mounts]
    assert not any(b"gone" in mount.target for mount in baggage.mounts)


def test_the_sites_directories_come_in_where_they_exist(place: bytes) -> None:
    baggage = gather({}, site_directories=[place + b"/data", place + b"/nowhere"])
    assert place + b"/data" in [mount.target for mount in baggage.mounts]
    assert place + b"/nowhere" not in [mount.target for mount in baggage.mounts]


def test_outer_mounts_come_before_inner_ones(place: bytes) -> None:
    baggage = gather({b"HOME": place + b"/home"}, volumes=[place + b"/data:" + place + b"/home/work:ro"])
    assert [mount.target for mount in baggage.mounts] == [place + b"/home", place + b"/home/work"]
    assert baggage.mounts[1].read_only
    assert [target.path for target in baggage.targets()] == [place + b"/home"]


def test_a_place_inside_another_mount_must_exist_there(place: bytes) -> None:
    with pytest.raises(TargetImpossible, match="does not exist in"):
        gather({b"HOME": place + b"/home"}, volumes=[place + b"/data:" + place + b"/home/none"])


def test_what_a_read_only_outer_shows_is_mounted_again_writable(place: bytes) -> None:
    baggage = gather({}, volumes=[place + b"/home:" + place + b"/home:ro"])
    assert [(mount.target, mount.read_only) for mount in baggage.mounts] == [
        (place + b"/home", True),
        (place + b"/home/work", False),
    ]


def test_workdir_is_where_it_starts(place: bytes) -> None:
    assert gather({}, workdir=b"/opt/app").directory == b"/opt/app"
    with pytest.raises(UsageWrong):
        gather({}, workdir=b"app")


def test_a_working_directory_that_is_gone_is_named(place: bytes) -> None:
    Path(os.fsdecode(place + b"/home/work")).rmdir()
    with pytest.raises(WorkingDirectoryMissing):
        gather({})
    assert gather({}, workdir=b"/").directory == b"/"


def test_a_volume_has_source_target_and_mode(place: bytes) -> None:
    mount = volume(place + b"/data:/d:ro")
    assert (mount.source, mount.target, mount.kind, mount.read_only) == (place + b"/data", b"/d", "d", True)
    assert mount.source_word == place + b"/data/."
    mount = volume(place + b"/data/file")
    assert (mount.target, mount.kind, mount.source_word) == (place + b"/data/file", "f", place + b"/data/file")


def test_a_relative_source_is_the_callers(place: bytes) -> None:
    mount = volume(b"../../data:/d")
    assert mount.source == place + b"/home/work/../../data"
    assert volume(b"../../data").target == place + b"/data"


@pytest.mark.parametrize("word", [b"", b":/x", b"/tmp:/x:rx", b"/tmp:/x:ro:z"])
def test_a_volume_of_another_form_is_refused(word: bytes) -> None:
    with pytest.raises(UsageWrong):
        volume(word)


@pytest.mark.parametrize(
    "word", [b"/tmp:/", b"/tmp:/proc/x", b"/tmp:rel", b"/tmp:/dev/shm", b"/tmp:/run/hpcctr", b"/tmp:/a/../b"]
)
def test_a_target_nothing_can_be_mounted_on_is_refused_before_the_engine(word: bytes) -> None:
    with pytest.raises(TargetImpossible):
        volume(word)


def test_a_source_that_is_missing_is_named() -> None:
    with pytest.raises(SourceMissing, match="No such file"):
        volume(b"/nowhere/at/all:/x")


@pytest.mark.parametrize(
    ("path", "carried"),
    [
        (b"/home/u", True),
        (b"/scratch", True),
        (b"/opt/x", True),
        (b"/var/tmp/x", True),
        (b"/run/user/1", True),
        (b"/", False),
        (b"/usr", False),
        (b"/usr/share", False),
        (b"/etc", False),
        (b"/opt", False),
        (b"/var", False),
        (b"/lib64/x", False),
        (b"/proc/self", False),
        (b"/run/hpcctr", False),
        (b"", False),
    ],
)
def test_the_images_system_is_not_covered_by_the_hosts(path: bytes, carried: bool) -> None:
    assert is_carried(path) is carried
