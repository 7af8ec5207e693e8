"""The section process."""

from __future__ import annotations

from hpcctr.spec.process import process
from tests.support.values import a_caller


def test_the_anchor_runs_as_the_caller_with_the_callers_groups_only() -> None:
    user = process(a_caller(uid=4711, gid=100, groups=(20, 44)))["user"]
    assert user == {"uid": 4711, "gid": 100, "additionalGids": [20, 44, 100]}


def test_the_anchor_can_gain_nothing() -> None:
    section = process(a_caller())
    assert section["noNewPrivileges"] is True
    assert section["capabilities"] == {
        "bounding": [],
        "effective": [],
        "inheritable": [],
        "permitted": [],
        "ambient": [],
    }


def test_the_anchor_has_neither_environment_nor_terminal_nor_arguments() -> None:
    section = process(a_caller())
    assert section["env"] == []
    assert section["args"] == ["/.hpcctr-anchor"]
    assert not section.get("terminal")


def test_the_daemons_out_of_memory_protection_is_not_inherited() -> None:
    assert process(a_caller())["oomScoreAdj"] == 0
