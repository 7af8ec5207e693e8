"""Reading policy.d."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcctr.errors import PolicyUnusable
from hpcctr.policy.load import load
from hpcctr.policy.rules import BUILT_IN

pytestmark = pytest.mark.root

RULE = '[[rule]]\nname = "a"\naction = "allow"\n'


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "policy.d"
    path.mkdir(mode=0o755)
    return path


def test_files_are_read_in_order_of_name(directory: Path) -> None:
    (directory / "20-b.toml").write_text(RULE)
    (directory / "10-a.toml").write_text(RULE.replace('"allow"', '"deny"\nusers = ["bob"]'))
    (directory / "notes.txt").write_text("not policy")
    assert [(rule.file, rule.action) for rule in load(str(directory))] == [
        ("10-a.toml", "deny"),
        ("20-b.toml", "allow"),
    ]


def test_no_directory_is_the_built_in_policy_but_an_empty_one_allows_nothing(directory: Path) -> None:
    assert load(str(directory / "none")) == BUILT_IN
    assert load(str(directory)) == ()


@pytest.mark.parametrize(
    "text",
    ["[[rule]]\n", "rule = 3", RULE + RULE, RULE + "colour = 1\n", "[[rule]]\nname=''\naction='allow'\n", "[", "\xff"],
)
def test_a_wrong_file_denies_everything_and_is_named(directory: Path, text: str) -> None:
    (directory / "10-good.toml").write_text(RULE)
    (directory / "50-bad.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(PolicyUnusable, match="50-bad.toml"):
        load(str(directory))


def test_a_file_others_can_write_denies_everything(directory: Path) -> None:
    (directory / "a.toml").write_text(RULE)
    (directory / "a.toml").chmod(0o666)
    with pytest.raises(PolicyUnusable, match="only root"):
        load(str(directory))


def test_a_directory_others_can_write_denies_everything(directory: Path) -> None:
    directory.chmod(0o777)
    with pytest.raises(PolicyUnusable, match="only root"):
        load(str(directory))
    directory.chmod(0o755)
    os.chown(directory, 1234, 0)
    with pytest.raises(PolicyUnusable):
        load(str(directory))
