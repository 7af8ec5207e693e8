"""The decision over rules."""

from __future__ import annotations

import pytest

from hpcctr.errors import PolicyDenied
from hpcctr.host.edits import HostEdits
from hpcctr.policy.decide import decide
from hpcctr.policy.rules import BUILT_IN, Rule
from hpcctr.request import Target
from tests.support.values import a_caller, a_stored_image

NO_ROOT_IMAGES = Rule(name="no-root-images", action="deny", images=("*/root-*",), file="10.toml")
STAFF = Rule(name="staff", action="allow", users=("@staff",), file="20.toml")
ALICE = Rule(name="alice", action="allow", users=("alice", "4711"), images=("docker.io/library/*",), file="20.toml")


def _rule(rules: list[Rule] | tuple[Rule, ...], users: set[str], image: str = "docker.io/library/debian:12") -> str:
    return decide(
        rules,
        caller=a_caller(),
        user_names=frozenset(users),
        image=a_stored_image(name=image),
        edits=HostEdits(),
        targets=[Target("d", b"/home/u")],
    ).rule


def test_the_first_rule_about_caller_and_image_decides() -> None:
    rules = [NO_ROOT_IMAGES, STAFF, ALICE]
    assert _rule(rules, {"1", "bob", "@staff"}) == '20.toml, rule "staff"'
    assert _rule(rules, {"4711", "alice"}) == '20.toml, rule "alice"'


def test_a_denial_names_its_rule() -> None:
    with pytest.raises(PolicyDenied, match='denied by 10.toml, rule "no-root-images"'):
        _rule([NO_ROOT_IMAGES, STAFF], {"@staff"}, "docker.io/x/root-kit:1")


def test_no_rule_is_a_denial() -> None:
    with pytest.raises(PolicyDenied, match="no rule allows it"):
        _rule([ALICE], {"bob"})
    with pytest.raises(PolicyDenied):
        _rule([ALICE], {"alice"}, "quay.io/x/y:1")
    with pytest.raises(PolicyDenied):
        _rule([], {"alice"})


def test_the_built_in_policy_allows_what_the_store_has() -> None:
    assert _rule(BUILT_IN, {"anybody"}) == 'built-in policy, rule "shared-store"'
