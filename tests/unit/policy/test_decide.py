"""The decision over rules."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcctr.errors import PolicyDenied
from hpcctr.host.edits import HostEdits
from hpcctr.policy.decide import allowing, decide, verdict
from hpcctr.policy.rules import BUILT_IN, Asked, Rule
from hpcctr.request import Target
from tests.support.values import a_caller, a_stored_image

DEBIAN = "docker.io/library/debian:12"
NO_ROOT_IMAGES = Rule(name="no-root-images", action="deny", images=("*/root-*",), file="10.toml")
STAFF = Rule(name="staff", action="allow", users=("@staff",), file="20.toml")
ALICE = Rule(name="alice", action="allow", users=("alice", "4711"), images=("docker.io/library/*",), file="20.toml")
NARROW = Rule(name="narrow", action="allow", targets=("/tmp", "/home"), features=("mpi",), file="30.toml")
NO_SCRATCH = Rule(name="no-scratch", action="deny", targets=("/scratch",), file="10.toml")


def _rule(rules: list[Rule] | tuple[Rule, ...], users: set[str], image: str = DEBIAN) -> str:
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


def test_the_sites_own_directories_need_no_rule() -> None:
    grant = decide(
        [NARROW],
        caller=a_caller(),
        user_names=frozenset(),
        image=a_stored_image(),
        edits=HostEdits(),
        targets=[Target("d", b"/scratch"), Target("d", b"/tmp")],
        asked_targets=[Target("d", b"/tmp")],
    )
    assert [target.path for target in grant.targets] == [b"/scratch", b"/tmp"]


@pytest.mark.parametrize(
    ("rules", "asked", "text"),
    [
        (
            [NO_SCRATCH, NARROW],
            {"targets": [b"/tmp", b"/scratch/a"]},
            f'{DEBIAN}, with mount target /scratch/a: denied by 10.toml, rule "no-scratch"',
        ),
        (
            [Rule(name="n", action="deny", images=("*:nightly",), file="1.toml")],
            {"other_names": ["quay.io/a/b:nightly"]},
            f'{DEBIAN}, which is quay.io/a/b:nightly: denied by 1.toml, rule "n"',
        ),
        ([], {}, f"{DEBIAN}: no rule allows it: none is about you"),
        ([NO_SCRATCH], {}, f"{DEBIAN}: no rule allows it: none is about you"),
        (
            [replace(NARROW, images=("quay.io/*",))],
            {},
            f"{DEBIAN}: no rule allows it: none that is about you is about this image",
        ),
        (
            [NARROW, replace(NARROW, name="nearer", targets=("/tmp", "/home", "/data"))],
            {"targets": [b"/tmp", b"/data/x"], "features": ["mpi", "gdr"], "devices": ["v.com/gpu=0"]},
            f'{DEBIAN}: no rule allows it with feature gdr, which 30.toml, rule "nearer" does not cover',
        ),
        (
            [NARROW],
            {"targets": [b"/a", b"/b", b"/c", b"/d", b"/e"]},
            f"{DEBIAN}: no rule allows it with mount target /a, mount target /b, mount target /c and 2 more, which "
            '30.toml, rule "narrow" does not cover',
        ),
    ],
)
def test_a_denial_says_what_it_is_about(rules: list[Rule], asked: dict[str, list[str]], text: str) -> None:
    with pytest.raises(PolicyDenied) as raised:
        allowing(rules, user_names=frozenset({"alice"}), image_name=DEBIAN, **asked)  # type: ignore[arg-type]
    assert raised.value.message == text


USERS = st.sampled_from(["alice", "bob", "@staff", "4711"])
IMAGES = st.sampled_from([DEBIAN, "quay.io/org/app:1", "quay.io/org/app:nightly", "private/localhost/app:1"])
GLOBS = st.sampled_from(["*", "docker.io/*", "quay.io/org/*", "*:nightly", "private/*", DEBIAN])
TARGETS = st.sampled_from(["/tmp", "/home", "/scratch", "/scratch/a", "/"])
FEATURES = st.sampled_from(["mpi", "m*", "gdr"])


def _some(entries: st.SearchStrategy[str], least: int = 0) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(entries, min_size=least, max_size=3).map(tuple)


RULES = st.builds(
    Rule,
    name=st.just("r"),
    action=st.sampled_from(["allow", "deny"]),
    users=_some(USERS, 1) | st.just(("*",)),
    images=_some(GLOBS, 1),
    registries=st.none() | _some(st.sampled_from(["docker.io", "quay.io"]), 1),
    targets=st.none() | _some(TARGETS),
    features=st.none() | _some(FEATURES),
    devices=st.none() | _some(st.just("v.com/gpu=*")),
)
ASKED = st.builds(
    Asked,
    user_names=st.frozensets(USERS),
    image_name=IMAGES,
    other_names=_some(IMAGES),
    targets=_some(TARGETS.filter(lambda path: path != "/")).map(lambda paths: tuple(map(str.encode, paths))),
    features=_some(st.sampled_from(["mpi", "gdr"])),
    devices=_some(st.just("v.com/gpu=0")),
)


@given(rules=st.lists(RULES, max_size=6), more=RULES, asked=ASKED, at=st.integers(0, 6))
def test_another_deny_rule_never_allows_more_and_another_allow_rule_never_less(
    rules: list[Rule], more: Rule, asked: Asked, at: int
) -> None:
    before = verdict(rules, asked).is_allowed
    after = verdict([*rules[:at], more, *rules[at:]], asked).is_allowed
    assert after <= before if more.action == "deny" else after >= before


@given(rules=st.lists(RULES, max_size=6), asked=ASKED)
def test_what_decides_is_the_first_rule_that_would_decide_alone(rules: list[Rule], asked: Asked) -> None:
    alone = [rule for rule in rules if verdict([rule], asked).rule is not None]
    result = verdict(rules, asked)
    assert result.rule is (alone[0] if alone else None)
    assert result.is_allowed == bool(alone and alone[0].action == "allow")


@given(rules=st.lists(RULES, max_size=6), asked=ASKED, more=TARGETS.filter(lambda path: path != "/"))
def test_who_asks_for_more_targets_is_not_allowed_where_only_allow_rules_are(
    rules: list[Rule], asked: Asked, more: str
) -> None:
    allowing_rules = [rule for rule in rules if rule.action == "allow"]
    wider = replace(asked, targets=(*asked.targets, more.encode()))
    assert verdict(allowing_rules, wider).is_allowed <= verdict(allowing_rules, asked).is_allowed
