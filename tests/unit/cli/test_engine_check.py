"""What engine check reads and answers; tests/e2e/test_policy.py compares it with launches."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcctr.cli.engine_check import Checked, WhatIf, read, show, tell, would_decide
from hpcctr.cli.table import Format
from hpcctr.errors import PolicyUnusable, SiteFileWrong
from hpcctr.policy.rules import Rule
from hpcctr.site import Site
from tests.support.values import a_stored_image, publish_for_test

pytestmark = pytest.mark.root

RULE = '[[rule]]\nname = "a"\naction = "allow"\n'
NIGHTLY = Rule(name="no-nightlies", action="deny", images=("*:nightly",), file="1.toml")
ALL = Rule(name="all", action="allow", file="1.toml")


@pytest.fixture(autouse=True)
def site_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The node's site, with a store of its own."""
    path = tmp_path / "node.toml"
    path.write_text(f'store = "{tmp_path}/store"\npolicy-directory = "{tmp_path}/policy.d"\n')
    monkeypatch.setenv("HPCCTR_SITE", str(path))
    return path


def _checked(tmp_path: Path, *rules: Rule) -> Checked:
    return Checked(what="rules", rules=rules, site=Site(store=f"{tmp_path}/store"))


def test_site_policy_file_and_directory_are_told_apart(tmp_path: Path, site_file: Path) -> None:
    directory = tmp_path / "policy.d"
    directory.mkdir()
    (directory / "10.toml").write_text(RULE)
    for file, what in (
        (site_file, "a site file"),
        (directory, "a policy directory, 1 rules"),
        (directory / "10.toml", "a policy file, 1 rules"),
    ):
        checked = read(str(file))
        assert what in checked.what and [rule.file for rule in checked.rules] == ["10.toml"]
        assert checked.site.store == f"{tmp_path}/store"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", None),
        ("rule = []", None),
        ("rule = 3", PolicyUnusable),
        ("[[rule]", PolicyUnusable),
        ("[[ 'rule' ]]\nname = ", PolicyUnusable),
        ("[registry.rule]\nplain-http = 3", SiteFileWrong),
        ("stoer = 3", SiteFileWrong),
        ("store = [", SiteFileWrong),
        ("\xff", SiteFileWrong),
    ],
)
def test_a_wrong_file_is_an_error_of_its_kind(tmp_path: Path, text: str, error: type[Exception] | None) -> None:
    (tmp_path / "x.toml").write_bytes(text.encode("latin-1"))
    if error is None:
        read(str(tmp_path / "x.toml"))
        return
    with pytest.raises(error, match="x.toml"):
        read(str(tmp_path / "x.toml"))


def test_what_is_no_regular_file_stops_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for name in ("fifo", "none"):
        with pytest.raises((SiteFileWrong, PolicyUnusable), match=name):
            read(str(tmp_path / name))


def test_a_table_shows_what_was_written_and_what_never_decides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show(_checked(tmp_path, Rule(name="x", action="allow", targets=(), file="1.toml"), ALL, NIGHTLY), Format.TABLE)
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert lines[1] == ["allow", "x", "1.toml", "*", "*", "*", "-", "*", "*"]
    assert lines[3] == ["deny", "no-nightlies", "1.toml", "*", "*:nightly", "*", "*", "*", "*"]
    assert err == (
        'warning: 1.toml, rule "no-nightlies" never decides: 1.toml, rule "all" does before it\nrules, otherwise deny\n'
    )


def test_the_status_is_that_of_the_launch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checked = _checked(tmp_path, NIGHTLY, ALL)
    assert tell(checked, WhatIf(user="root", image="debian:12"), Format.TABLE) == 0
    assert tell(checked, WhatIf(user="root", image="debian:nightly"), Format.TABLE) == 126
    assert capsys.readouterr().out == (
        'docker.io/library/debian:12: allowed by 1.toml, rule "all"\n'
        'docker.io/library/debian:nightly: denied by 1.toml, rule "no-nightlies"\n'
    )


@pytest.mark.parametrize(
    ("image", "is_private", "name"),
    [
        ("debian", False, "docker.io/library/debian:latest"),
        ("Quay.io/a/b:1", False, "quay.io/a/b:1"),
        ("debian", True, "private/docker.io/library/debian:latest"),
        ("@root/app:1", False, "private/docker.io/library/app:1"),
        ("@0/sha256:" + "a" * 64, False, "private/sha256:" + "a" * 64),
        ("oci-archive:/x/tool.tar", True, "private/localhost/tool:latest"),
    ],
)
def test_an_image_that_is_not_there_is_known_as_it_will_be(
    tmp_path: Path, image: str, is_private: bool, name: str
) -> None:
    result = would_decide(_checked(tmp_path, ALL), WhatIf(user="root", image=image, is_private=is_private))
    assert result.text == f'{name}: allowed by 1.toml, rule "all"'


def test_an_image_of_the_store_is_known_by_all_its_names(tmp_path: Path) -> None:
    publish_for_test(f"{tmp_path}/store", a_stored_image(name="quay.io/org/app:nightly"))
    result = would_decide(_checked(tmp_path, NIGHTLY, ALL), WhatIf(user="root", image="sha256:" + "a" * 64))
    assert result.rule is NIGHTLY and "which is quay.io/org/app:nightly" in result.text
