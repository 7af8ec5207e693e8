"""Reading policy.d."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcctr.errors import PolicyUnusable
from hpcctr.policy import load as module
from hpcctr.policy.load import load, load_file
from hpcctr.policy.rules import BUILT_IN
from hpcctr.policy.written import BYTES_MAX

pytestmark = pytest.mark.root

RULE = '[[rule]]\nname = "a"\naction = "allow"\n'
DENY = '[[rule]]\nname = "a"\naction = "deny"\n\n'


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "policy.d"
    path.mkdir(mode=0o755)
    return path


def test_files_are_read_in_order_of_name(directory: Path) -> None:
    (directory / "20-b.toml").write_text(RULE)
    (directory / "10-a.toml").write_text(RULE.replace('"allow"', '"deny"\nusers = ["bob"]'))
    (directory / "notes.txt").write_text("not policy")
    (directory / ".#20-b.toml").symlink_to("root@node.4711")
    assert [(rule.file, rule.action) for rule in load(str(directory))] == [
        ("10-a.toml", "deny"),
        ("20-b.toml", "allow"),
    ]


def test_no_directory_is_the_built_in_policy_but_an_empty_one_allows_nothing(directory: Path) -> None:
    assert load(str(directory / "none")) == BUILT_IN
    assert load(str(directory)) == ()


def test_a_link_that_leads_nowhere_is_not_the_built_in_policy(directory: Path) -> None:
    (directory / "link").symlink_to("/nowhere/at/all")
    with pytest.raises(PolicyUnusable, match="link"):
        load(str(directory / "link"))


@pytest.mark.parametrize("text", ["[[rule]]\n", RULE + RULE, "[", "\xff"])
def test_a_wrong_file_denies_everything_and_is_named(directory: Path, text: str) -> None:
    (directory / "10-good.toml").write_text(RULE)
    (directory / "50-bad.toml").write_bytes(text.encode("latin-1"))
    for _ in range(2):
        with pytest.raises(PolicyUnusable, match="50-bad.toml"):
            load(str(directory))


@pytest.mark.parametrize("name", ["policy.d", "/etc/../etc/policy.d", "/", "/etc//policy.d", "/etc/policy.d/"])
def test_a_directory_that_is_no_plain_path_denies_everything(name: str) -> None:
    with pytest.raises(PolicyUnusable, match="plain absolute path"):
        load(name)


def test_a_file_others_can_write_denies_everything(directory: Path) -> None:
    (directory / "a.toml").write_text(RULE)
    for mode in (0o666, 0o664):
        (directory / "a.toml").chmod(mode)
        with pytest.raises(PolicyUnusable, match="only root"):
            load(str(directory))


def test_a_directory_others_can_write_denies_everything(directory: Path) -> None:
    for mode in (0o777, 0o775, 0o1777):
        directory.chmod(mode)
        with pytest.raises(PolicyUnusable, match="only root"):
            load(str(directory))
    directory.chmod(0o755)
    os.chown(directory, 1234, 0)
    with pytest.raises(PolicyUnusable):
        load(str(directory))


def _fifo(path: Path) -> None:
    os.mkfifo(path, 0o600)


def _link(path: Path) -> None:
    (path.parent / "elsewhere").write_text(RULE)
    path.symlink_to(path.parent / "elsewhere")


def _device(path: Path) -> None:
    os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))


@pytest.mark.parametrize("make", [_fifo, _link, _device, Path.mkdir])
def test_what_is_no_regular_file_denies_everything_and_stops_nobody(
    directory: Path, make: Callable[[Path], None]
) -> None:
    make(directory / "a.toml")
    with pytest.raises(PolicyUnusable, match="a.toml"):
        load(str(directory))


def test_a_file_of_100_megabytes_is_not_read(directory: Path) -> None:
    with (directory / "a.toml").open("wb") as file:
        file.truncate(100 << 20)
    begin = time.process_time()
    with pytest.raises(PolicyUnusable, match="larger"):
        load(str(directory))
    assert time.process_time() - begin < 0.5


def test_too_many_files_and_rules_are_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        (directory / f"{number}.toml").write_text(RULE)
    monkeypatch.setattr(module, "RULES_MAX", 2)
    with pytest.raises(PolicyUnusable, match="3 rules"):
        load(str(directory))
    monkeypatch.setattr(module, "FILES_MAX", 2)
    with pytest.raises(PolicyUnusable, match="3 files"):
        load(str(directory))


def test_a_way_that_somebody_else_can_change_denies_everything(tmp_path: Path) -> None:
    middle = tmp_path / "theirs"
    directory = middle / "hpcctr/policy.d"
    directory.mkdir(parents=True)
    (directory / "a.toml").write_text(RULE)
    assert load(str(directory))
    os.chown(middle, 1234, 0)
    with pytest.raises(PolicyUnusable, match="theirs"):
        load(str(directory))
    os.chown(middle, 0, 0)
    middle.chmod(0o775)
    with pytest.raises(PolicyUnusable, match="theirs"):
        load(str(directory))


def test_a_sticky_directory_is_a_way_and_no_place_for_policy(tmp_path: Path) -> None:
    sticky = tmp_path / "sticky"
    sticky.mkdir()
    sticky.chmod(0o1777)
    (sticky / "policy.d").mkdir()
    assert load(str(sticky / "policy.d")) == ()


# What was read before is never taken for what is there.


def _in_place(file: Path) -> None:
    file.write_text(DENY)


def _renamed(file: Path) -> None:
    (file.parent / "new").write_text(DENY)
    (file.parent / "new").rename(file)


def _touched_back(file: Path) -> None:
    status = file.stat()
    file.write_text(DENY)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("edit", [_in_place, _renamed, _touched_back])
def test_an_edit_of_the_same_length_is_seen_at_once(directory: Path, edit: Callable[[Path], None]) -> None:
    assert len(DENY) == len(RULE)
    file = directory / "a.toml"
    for _ in range(20):
        file.write_text(RULE)
        assert load(str(directory))[0].action == "allow"
        edit(file)
        assert load(str(directory))[0].action == "deny"


def _group_writes(file: Path) -> None:
    file.chmod(0o664)


def _given_away(file: Path) -> None:
    os.chown(file, 1234, 0)


def _directory_given_away(file: Path) -> None:
    os.chown(file.parent, 1234, 0)


def _parent_given_away(file: Path) -> None:
    os.chown(file.parents[1], 1234, 0)


def _replaced_by_a_link(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


def _broken(file: Path) -> None:
    file.write_text("[")


@pytest.mark.parametrize(
    "edit", [_group_writes, _given_away, _directory_given_away, _parent_given_away, _replaced_by_a_link, _broken]
)
def test_a_change_for_the_worse_denies_everything_from_the_next_launch_on(
    directory: Path, edit: Callable[[Path], None]
) -> None:
    (directory / "a.toml").write_text(RULE)
    load(str(directory))
    edit(directory / "a.toml")
    with pytest.raises(PolicyUnusable):
        load(str(directory))


def test_files_that_come_go_and_change_names_are_seen(directory: Path) -> None:
    (directory / "20.toml").write_text(RULE)
    load(str(directory))
    (directory / "10.toml").write_text(DENY)
    assert [rule.action for rule in load(str(directory))] == ["deny", "allow"]
    (directory / "10.toml").rename(directory / "30.toml")
    assert [rule.file for rule in load(str(directory))] == ["20.toml", "30.toml"]
    (directory / "20.toml").unlink()
    assert [rule.action for rule in load(str(directory))] == ["deny"]
    (directory / "30.toml").unlink()
    directory.rmdir()
    assert load(str(directory)) == BUILT_IN


def test_what_is_unchanged_is_not_parsed_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "a.toml").write_text(RULE)
    first = load(str(directory))
    monkeypatch.setattr(module, "parse", None)
    assert load(str(directory)) is first


def test_a_file_that_is_written_while_it_is_read_is_whole_or_an_error(directory: Path) -> None:
    file = directory / "a.toml"
    texts = [RULE.replace('"a"', f'"{letter * 100}"') * 1 + "#" * 200_000 for letter in "ab"]
    file.write_text(texts[0])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for text in texts:
                with file.open("r+") as opened:
                    opened.write(text)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(30):
            try:
                assert load(str(directory))[0].name in ("a" * 100, "b" * 100)
            except PolicyUnusable as error:
                assert "a.toml" in error.message
    finally:
        stop.set()
        writer.join()


def test_one_file_is_read_by_itself(directory: Path) -> None:
    (directory / "a.toml").write_text(RULE)
    assert [rule.file for rule in load_file(str(directory / "a.toml"))] == ["a.toml"]
    os.chown(directory / "a.toml", 1234, 0)
    with pytest.raises(PolicyUnusable, match="only root"):
        load_file(str(directory / "a.toml"))
    assert load_file(str(directory / "a.toml"), root_owned=False)
    with pytest.raises(PolicyUnusable, match="No such file"):
        load_file(str(directory / "b.toml"))


def test_a_file_of_the_largest_size_is_read(directory: Path) -> None:
    (directory / "a.toml").write_text(RULE + "#" * (BYTES_MAX - len(RULE)))
    assert len(load(str(directory))) == 1
