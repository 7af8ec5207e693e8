"""Rules that never decide."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcctr.policy.decide import verdict
from hpcctr.policy.rules import Asked, Rule
from hpcctr.policy.shadow import shadowed
from tests.unit.policy.test_decide import ASKED, RULES


def _allow(**words: tuple[str, ...]) -> Rule:
    return Rule(name="a", action="allow", **words)  # type: ignore[arg-type]


def _deny(**words: tuple[str, ...]) -> Rule:
    return Rule(name="d", action="deny", **words)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        (_allow(), _deny(images=("*:nightly",))),
        (_allow(users=("alice", "bob")), _allow(users=("bob",))),
        (_allow(images=("quay.io/*",)), _allow(images=("quay.io/org/*", "quay.io/a:1"))),
        (_deny(registries=("quay.io", "docker.io")), _allow(registries=("quay.io",))),
        (_allow(targets=("/scratch", "/tmp")), _allow(targets=("/scratch/a",))),
        (_deny(targets=("/scratch",)), _deny(targets=("/scratch/a",))),
        (_allow(features=("m*",)), _allow(features=("mpi",))),
        (_allow(targets=("/tmp",)), _allow(targets=())),
    ],
)
def test_a_rule_behind_a_wider_one_is_told(earlier: Rule, later: Rule) -> None:
    assert list(shadowed([earlier, later])) == [(later, earlier)]


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        (_allow(users=("alice",)), _allow()),
        (_allow(images=("quay.io/*",)), _deny(images=("quay.io/org/*",))),  # by another name of the image
        (_deny(targets=("/",)), _allow(targets=("/tmp",))),  # nothing asked for
        (_allow(targets=("/tmp",)), _deny(targets=("/tmp",))),  # something else asked for as well
        (_allow(targets=("/scratch",)), _allow(targets=("/scratch2",))),
        (_allow(images=("quay.io/?",)), _allow(images=("quay.io/*",))),
        (_allow(registries=("quay.io",)), _allow(images=("quay.io/*",))),
    ],
)
def test_what_may_decide_after_all_is_not_told(earlier: Rule, later: Rule) -> None:
    assert list(shadowed([earlier, later])) == []


@given(rules=st.lists(RULES, max_size=5), asked=ASKED)
def test_a_rule_that_is_told_of_never_decides(rules: list[Rule], asked: Asked) -> None:
    never = [rule for rule, _ in shadowed(rules)]
    decides = verdict(rules, asked).rule
    assert all(decides is not rule for rule in never)
