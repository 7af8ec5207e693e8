"""Rules that can never decide, because an earlier one matches whatever they match. Only what is certain is told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from hpcctr.policy.rules import Rule, before_glob, is_within


def shadowed(rules: Sequence[Rule]) -> Iterator[tuple[Rule, Rule]]:
    """Each rule that never decides, and the first one that always does so before it."""
    for at, rule in enumerate(rules):
        earlier = next((other for other in rules[:at] if _covers(other, rule)), None)
        if earlier is not None:
            yield rule, earlier


def _covers(earlier: Rule, later: Rule) -> bool:
    """Whether ``earlier`` matches everything that ``later`` matches."""
    is_about_users = "*" in earlier.users or set(later.users) <= set(earlier.users)
    return is_about_users and _covers_image(earlier, later) and _covers_things(earlier, later)


def _covers_image(earlier: Rule, later: Rule) -> bool:
    if earlier.action == "allow" and later.action == "deny":
        # A deny rule may meet an image by a name that the allow rule is not asked about.
        return "*" in earlier.images and earlier.registries is None
    is_about_registries = earlier.registries is None or (
        later.registries is not None and set(later.registries) <= set(earlier.registries)
    )
    return is_about_registries and _have_globs(earlier.images, later.images)


def _covers_things(earlier: Rule, later: Rule) -> bool:
    lists = (
        (earlier.targets, later.targets, _have_paths),
        (earlier.features, later.features, _have_globs),
        (earlier.devices, later.devices, _have_globs),
    )
    for its, others, have in lists:
        if its is None:
            continue
        # Of rules with two actions one looks at everything asked for, and the other at anything; without a list, a rule
        # also matches where nothing is asked for, and where something else is.
        if earlier.action != later.action or others is None or not have(its, others):
            return False
    return True


def _have_paths(its: Sequence[str], others: Sequence[str]) -> bool:
    return all(any(is_within(path.encode(), top.encode()) for top in its) for path in others)


def _have_globs(its: Sequence[str], others: Sequence[str]) -> bool:
    return all(any(_has_glob(one, other) for one in its) for other in others)


def _has_glob(glob: str, other: str) -> bool:
    """Whether ``glob`` certainly matches all that ``other`` does."""
    if glob in ("*", other):
        return True
    literal = before_glob(other)
    if literal == other:
        return fnmatchcase(other, glob)
    beginning = glob.removesuffix("*")
    if beginning == glob or before_glob(beginning) != beginning:
        return False
    return literal.startswith(beginning)
