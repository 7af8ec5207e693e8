"""One rule."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcctr.policy.rules import Asked, Rule, Thing, is_within, registry_of

DEBIAN = "docker.io/library/debian:12"


def asked(
    *,
    users: tuple[str, ...] = (),
    image: str = DEBIAN,
    others: tuple[str, ...] = (),
    targets: tuple[bytes, ...] = (),
    features: tuple[str, ...] = (),
    devices: tuple[str, ...] = (),
) -> Asked:
    return Asked(
        user_names=frozenset(users),
        image_name=image,
        other_names=others,
        targets=targets,
        features=features,
        devices=devices,
    )


def test_globs_of_images_cross_slashes() -> None:
    rule = Rule(name="r", action="allow", images=("quay.io/*",))
    assert rule.matches(asked(image="quay.io/a/b/c:1"))
    assert not rule.matches(asked(image="quay.iox/a:1"))


def test_a_group_is_not_a_user() -> None:
    rule = Rule(name="r", action="allow", users=("@staff",))
    assert not rule.matches(asked(users=("staff",)))
    assert rule.matches(asked(users=("@staff",)))


def test_a_label_names_file_and_rule() -> None:
    assert Rule(name="r", action="deny", file="10-x.toml").label == '10-x.toml, rule "r"'


@pytest.mark.parametrize(
    ("image", "registry"),
    [
        (DEBIAN, "docker.io"),
        ("registry.example.org:5000/a/b:1", "registry.example.org:5000"),
        ("localhost/app:latest", "localhost"),
        ("private/docker.io/library/debian:12", None),
        ("private/sha256:" + "a" * 64, None),
        ("sha256:" + "a" * 64, None),
        ("docker.io", None),
    ],
)
def test_a_registry_is_what_stands_before_the_first_slash_and_no_private_image_has_one(
    image: str, registry: str | None
) -> None:
    assert registry_of(image) == registry


def test_a_registry_is_compared_as_a_whole() -> None:
    rule = Rule(name="r", action="allow", registries=("docker.io",))
    assert rule.matches(asked(image=DEBIAN))
    for image in ("docker.io.evil/a:1", "evil.docker.io/a:1", "docker.io:443/a:1", "private/docker.io/a:1", "docker.i"):
        assert not rule.matches(asked(image=image))


def test_an_allow_rule_matches_what_it_covers_as_a_whole() -> None:
    rule = Rule(name="r", action="allow", targets=("/tmp", "/scratch"), features=("mpi*",), devices=("v.com/gpu=*",))
    assert rule.matches(asked())
    assert rule.matches(
        asked(targets=(b"/tmp", b"/scratch/a\xff"), features=("mpi", "mpich"), devices=("v.com/gpu=0",))
    )
    assert not rule.matches(asked(targets=(b"/tmp", b"/scratch2")))
    assert not rule.matches(asked(features=("mpi", "gdr")))
    assert not rule.matches(asked(devices=("v.com/nic=0",)))


def test_an_empty_list_of_an_allow_rule_allows_to_ask_for_nothing() -> None:
    rule = Rule(name="r", action="allow", targets=(), features=(), devices=())
    assert rule.matches(asked())
    for one in (asked(targets=(b"/a",)), asked(features=("f",)), asked(devices=("d",))):
        assert not rule.matches(one)


def test_a_deny_rule_matches_when_it_meets_any_of_what_is_asked_for() -> None:
    rule = Rule(name="r", action="deny", targets=("/scratch",))
    assert rule.matches(asked(targets=(b"/tmp", b"/scratch/a")))
    assert not rule.matches(asked(targets=(b"/tmp", b"/scratch2")))
    assert not rule.matches(asked())
    both = Rule(name="r", action="deny", targets=("/scratch",), features=("mpi",))
    assert not both.matches(asked(targets=(b"/scratch",)))
    assert both.matches(asked(targets=(b"/scratch",), features=("mpi", "x")))


def test_only_a_deny_rule_is_about_other_names_of_an_image() -> None:
    digest = "sha256:" + "a" * 64
    for action, matches in (("allow", False), ("deny", True)):
        rule = Rule(name="r", action=action, images=("*:nightly",), registries=("quay.io",))  # type: ignore[arg-type]
        assert rule.matches(asked(image=digest, others=("docker.io/x/y:1", "quay.io/a:nightly"))) is matches
        # The glob is about one name and the registry about another.
        assert not rule.matches(asked(image=digest, others=("docker.io/x/y:nightly", "quay.io/a:1")))


def test_what_is_met_and_what_is_left_is_told() -> None:
    rule = Rule(name="r", action="deny", targets=("/a",), features=("f*",))
    one = asked(targets=(b"/a/b", b"/c"), features=("f1", "g"))
    assert list(map(str, rule.things_met(one))) == ["mount target /a/b", "feature f1"]
    assert list(map(str, rule.things_left(one))) == ["mount target /c", "feature g"]


def test_a_thing_is_told_without_what_a_terminal_obeys() -> None:
    assert str(Thing(kind="mount target", name=b"/a\x1b[2J\xff")) == "mount target /a\\x1b[2J\\xff"
    assert len(str(Thing(kind="device", name="d" * 5000))) < 250


COMPONENT = st.sampled_from([b"a", b"b", b"aa", b"a b", b"\xff", "\u00e9".encode(), "e\u0301".encode(), b"*", b"..a"])
PATHS = st.lists(COMPONENT, max_size=4)


@given(path=PATHS, top=PATHS)
def test_within_is_by_components(path: list[bytes], top: list[bytes]) -> None:
    joined = [b"/" + b"/".join(parts) for parts in (path, top)]
    assert is_within(*joined) == (path[: len(top)] == top)


GLOBS = st.text(alphabet="ab/*?[]!-:", min_size=1, max_size=8)


@given(globs=st.lists(GLOBS, min_size=1, max_size=5), name=st.text(alphabet="ab/:", min_size=1, max_size=8))
def test_several_globs_match_as_each_alone(globs: list[str], name: str) -> None:
    rule = Rule(name="r", action="allow", images=tuple(globs))
    assert rule.matches(asked(image=name)) == any(fnmatchcase(name, glob) for glob in globs)
