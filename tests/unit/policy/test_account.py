"""Names rules may know a caller by."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from hpcctr.errors import DeadlinePassed
from hpcctr.policy import account
from hpcctr.policy.account import names_for
from hpcctr.policy.rules import Rule
from tests.support.values import a_caller

RULES = (Rule(name="some", action="allow", users=("@staff",)),)


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """What hanging look-ups wait for. Their threads have ended when the test has: a later test counts its own."""
    event = threading.Event()
    yield event
    event.set()
    for thread in threading.enumerate():
        if thread.name.startswith("nss-"):
            thread.join()


def test_root_is_known_by_number_name_and_groups() -> None:
    assert {"0", "root", "@0", "@root"} <= names_for(RULES, a_caller(uid=0, gid=0))


def test_a_uid_no_directory_knows_is_known_by_number() -> None:
    assert names_for(RULES, a_caller(uid=987654, gid=987655, groups=(987656,))) == {"987654", "@987655", "@987656"}


def test_a_user_is_found_by_name_or_number() -> None:
    assert account.uid_of("root", asked_by=1) == 0
    assert account.uid_of("4711", asked_by=1) == 4711
    for nobody in ("no-such-user", "9" * 11, "", "-1"):
        assert account.uid_of(nobody, asked_by=1) is None


def test_a_group_is_found_by_name_or_number() -> None:
    assert account.gid_of("root", asked_by=1) == 0
    assert account.gid_of("4711", asked_by=1) == 4711
    for nothing in ("no-such-group", "9" * 11, "", "-1"):
        assert account.gid_of(nothing, asked_by=1) is None


def test_nobody_is_looked_up_when_no_rule_asks() -> None:
    assert names_for((Rule(name="all", action="allow"),), a_caller(uid=0)) == frozenset()


def test_a_name_service_that_hangs_ends_the_launch_and_not_the_engine(
    monkeypatch: pytest.MonkeyPatch, release: threading.Event
) -> None:
    monkeypatch.setattr(account, "_LOOKUP_SECONDS", 0.05)
    with pytest.raises(DeadlinePassed, match="who uid 4711 is") as raised:
        account.with_deadline(release.wait, uid=4711)
    assert "getent passwd 4711" in raised.value.hint


def test_look_ups_that_hang_stay_few(monkeypatch: pytest.MonkeyPatch, release: threading.Event) -> None:
    monkeypatch.setattr(account, "_LOOKUP_SECONDS", 0.01)
    monkeypatch.setattr(account, "_look_ups", threading.BoundedSemaphore(3))
    for _ in range(10):
        with pytest.raises(DeadlinePassed):
            account.with_deadline(release.wait, uid=4711)
    assert sum(thread.name == "nss-4711" for thread in threading.enumerate()) == 3
