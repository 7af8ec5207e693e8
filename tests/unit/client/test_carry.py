"""What a caller takes along."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcctr.client.carry import gather, is_carried, shown, volume
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


def test_a_slash_at_the_end_of_a_target_says_nothing(place: bytes) -> None:
    assert volume(place + b"/data/:/d/").target == b"/d"
    assert volume(place + b"/data/").target == place + b"/data"


@pytest.mark.parametrize("device", [b"/dev/null", b"/dev/tty"])
def test_a_device_file_is_no_volume(device: bytes) -> None:
    with pytest.raises(SourceMissing, match="device file"):
        volume(device + b":/x")


def test_a_relative_source_needs_a_working_directory(place: bytes) -> None:
    Path(os.fsdecode(place + b"/home/work")).rmdir()
    with pytest.raises(WorkingDirectoryMissing):
        gather({}, workdir=b"/", volumes=[b"relative:/x"])


def test_two_sources_for_one_target_contradict_each_other(place: bytes) -> None:
    with pytest.raises(UsageWrong, match="both to be mounted on /x"):
        gather({}, volumes=[place + b"/data:/x", place + b"/home:/x"])
    with pytest.raises(UsageWrong, match="both to be mounted on /x"):
        gather({}, volumes=[place + b"/data:/x", place + b"/data:/x:ro"])
    assert len(gather({}, volumes=[place + b"/data:/x", place + b"/data:/x/"]).mounts) == 2
    # What comes along by itself gives way.
    baggage = gather({b"HOME": place + b"/home"}, volumes=[place + b"/data:" + place + b"/home/work"])
    assert [mount.source for mount in baggage.mounts] == [place + b"/home", place + b"/data"]


def test_a_target_behind_a_link_of_another_volume_is_refused_with_the_place_it_leads_to(place: bytes) -> None:
    os.symlink(b"data", place + b"/link")
    with pytest.raises(TargetImpossible, match="symbolic link") as raised:
        gather({}, volumes=[place + b":/m", place + b"/data:/m/link"])
    assert os.fsdecode(place + b"/data") in raised.value.hint


def test_where_a_directory_variables_link_leads_comes_in_too(place: bytes) -> None:
    os.symlink(place + b"/data", place + b"/home/scratch")
    baggage = gather({b"HOME": place + b"/home", b"TMPDIR": place + b"/home/scratch"})
    assert [mount.target for mount in baggage.mounts] == [place + b"/data", place + b"/home"]


def test_a_word_in_a_message_is_short_and_harmless() -> None:
    assert shown(b"/a\x1b[31m\nb\xff\xc3\xa9") == "/a?[31m?b\udcff\u00e9"
    assert len(shown(b"/" + b"x" * 4000)) < 500


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
