"""Names rules may know a caller by."""

from __future__ import annotations

from hpcctr.policy.account import names_of
from tests.support.values import a_caller


def test_root_is_known_by_number_name_and_groups() -> None:
    assert {"0", "root", "@0", "@root"} <= names_of(a_caller(uid=0, gid=0))


def test_a_uid_no_directory_knows_is_known_by_number() -> None:
    assert names_of(a_caller(uid=987654, gid=987655, groups=(987656,))) == {"987654", "@987655", "@987656"}
