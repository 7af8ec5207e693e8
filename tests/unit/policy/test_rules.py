"""One rule."""

from __future__ import annotations

from hpcctr.policy.rules import Rule


def test_globs_of_images_cross_slashes() -> None:
    rule = Rule(name="r", action="allow", images=("quay.io/*",))
    assert rule.is_about(user_names=frozenset(), image_name="quay.io/a/b/c:1")
    assert not rule.is_about(user_names=frozenset(), image_name="quay.iox/a:1")


def test_a_group_is_not_a_user() -> None:
    rule = Rule(name="r", action="allow", users=("@staff",))
    assert not rule.is_about(user_names=frozenset({"staff"}), image_name="x")
    assert rule.is_about(user_names=frozenset({"@staff"}), image_name="x")


def test_a_label_names_file_and_rule() -> None:
    assert Rule(name="r", action="deny", file="10-x.toml").label == '10-x.toml, rule "r"'
