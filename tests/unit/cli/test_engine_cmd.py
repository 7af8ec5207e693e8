"""The words of hpcctr engine check."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hpcctr.cli.engine_cmd import app
from hpcctr.errors import HpcctrError

pytestmark = pytest.mark.root

IMAGE = ("--image", "debian:12")


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file with one rule, on a node without a store."""
    (tmp_path / "node.toml").write_text(f'store = "{tmp_path}/store"\n')
    monkeypatch.setenv("HPCCTR_SITE", str(tmp_path / "node.toml"))
    (tmp_path / "10.toml").write_text('[[rule]]\nname = "a"\naction = "allow"\nfeatures = ["mpi"]\n')
    return str(tmp_path / "10.toml")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--as", "root"), "a user and an image"),
        (IMAGE, "a user and an image"),
        (("--target", "/x"), "nobody is named"),
        (("--private",), "nobody is named"),
        (("--as", "no-such-user", *IMAGE), "no such user"),
        (("--as", "root", *IMAGE, "--group", "no-such-group"), "no such group"),
        (("--as", "987654", *IMAGE), "knows no group of theirs"),
        (("--as", "root", *IMAGE, "--target", "x"), "is not an absolute path"),
        (("--as", "root", *IMAGE, "--target", "/a/../b"), "is not a plain path"),
        (("--as", "root", *IMAGE, "--target", "/proc/1"), "is at or below /proc"),
        (("--as", "root", "--image", "a//b"), "has an empty part"),
        (("--as", "root", "--image", "@/x"), "not @OWNER/NAME"),
    ],
)
def test_a_question_that_is_none_is_refused(policy: str, words: tuple[str, ...], problem: str) -> None:
    error = CliRunner().invoke(app, ["check", policy, *words]).exception
    assert isinstance(error, HpcctrError) and problem in error.message and error.hint


def test_rules_are_listed_and_asked(policy: str) -> None:
    listed = CliRunner().invoke(app, ["check", policy, "--format", "json"])
    (row,) = json.loads(listed.stdout)
    assert listed.exit_code == 0 and row["features"] == ["mpi"] and row["targets"] is None
    words = ["check", policy, "--as", "root", *IMAGE]
    allowed = CliRunner().invoke(app, [*words, "--feature", "mpi"])
    assert (allowed.exit_code, allowed.stdout) == (
        0,
        'docker.io/library/debian:12: allowed by 10.toml, rule "a"\n',
    )
    denied = CliRunner().invoke(app, [*words, "--feature", "gdr", "--format", "json"])
    assert denied.exit_code == 126 and json.loads(denied.stdout)["decision"] == "deny"
