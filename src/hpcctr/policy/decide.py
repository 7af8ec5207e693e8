"""The decision: pure, from values to a :class:`Grant` or a :class:`PolicyDenied`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hpcctr.context import Caller
from hpcctr.errors import PolicyDenied
from hpcctr.host.edits import HostEdits
from hpcctr.image.record import StoredImage
from hpcctr.policy.grant import Grant
from hpcctr.policy.rules import Asked, Rule
from hpcctr.request import Target

#: Things that a message names; of more, their number.
_NAMED_MAX = 3


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the rules say about something asked."""

    #: The rule that decides; None: no rule matches, which is a denial.
    rule: Rule | None
    #: In words, beginning with the image.
    text: str

    @property
    def is_allowed(self) -> bool:
        return self.rule is not None and self.rule.action == "allow"


def verdict(rules: Sequence[Rule], asked: Asked) -> Verdict:
    """The first rule that matches decides."""
    for rule in rules:
        if rule.matches(asked):
            if rule.action == "allow":
                return Verdict(rule=rule, text=f"{asked.image_name}: allowed by {rule.label}")
            return Verdict(rule=rule, text=f"{_denied(rule, asked)}: denied by {rule.label}")
    return Verdict(rule=None, text=f"{asked.image_name}: {_not_allowed(rules, asked)}")


def decide(
    rules: Sequence[Rule],
    *,
    caller: Caller,
    user_names: frozenset[str],
    image: StoredImage,
    edits: HostEdits,
    targets: Sequence[Target],
    asked_targets: Sequence[Target] | None = None,
    features: Sequence[str] = (),
    devices: Sequence[str] = (),
    other_devices: Sequence[str] = (),
    other_names: Sequence[str] = (),
) -> Grant:
    """The grant of the first rule about this launch. No rule is a denial.

    ``targets`` is what the container gets, ``asked_targets`` what of it the caller asks for (default: all);
    ``other_names`` are further names of the image, which a deny rule may be about.
    """
    rule = allowing(
        rules,
        user_names=user_names,
        image_name=image.policy_name,
        targets=[target.path for target in (targets if asked_targets is None else asked_targets)],
        features=features,
        devices=devices,
        other_devices=other_devices,
        other_names=other_names,
    )
    return Grant(
        caller=caller,
        image=image,
        edits=edits,
        targets=tuple(targets),
        rule=rule,
        asked=(*features, *devices),
    )


def allowing(
    rules: Sequence[Rule],
    *,
    user_names: frozenset[str],
    image_name: str,
    targets: Sequence[bytes] = (),
    features: Sequence[str] = (),
    devices: Sequence[str] = (),
    other_devices: Sequence[str] = (),
    other_names: Sequence[str] = (),
) -> str:
    """The label of the rule that lets this caller have the image; what one may not run, one may not pull either.

    Raises :class:`PolicyDenied`.
    """
    asked = Asked(
        user_names=user_names,
        image_name=image_name,
        other_names=tuple(other_names),
        targets=tuple(targets),
        features=tuple(features),
        devices=tuple(devices),
        other_devices=tuple(other_devices),
    )
    result = verdict(rules, asked)
    if result.rule is None or not result.is_allowed:
        raise PolicyDenied(result.text, hint="ask the administrators of this cluster")
    return result.rule.label


def _denied(rule: Rule, asked: Asked) -> str:
    """The image and what else of the launch a deny rule is about."""
    name = rule.image_met(asked)
    image = asked.image_name if name == asked.image_name else f"{asked.image_name}, which is {name}"
    things = list(map(str, rule.things_met(asked)))
    return f"{image}, with {_listed(things)}" if things else image


def _not_allowed(rules: Sequence[Rule], asked: Asked) -> str:
    """Why no rule allows it: what the allow rule that comes nearest leaves out."""
    about_user = [rule for rule in rules if rule.action == "allow" and rule.is_about_user(asked)]
    if not about_user:
        return "no rule allows it: none is about you"
    about_image = [rule for rule in about_user if rule.image_met(asked)]
    if not about_image:
        return "no rule allows it: none that is about you is about this image"
    left_out = [(rule, list(map(str, rule.things_left(asked)))) for rule in about_image]
    nearest, things = min(left_out, key=lambda pair: len(pair[1]))
    return f"no rule allows it with {_listed(things)}, which {nearest.label} does not cover"


def _listed(things: Sequence[str]) -> str:
    named = ", ".join(things[:_NAMED_MAX])
    return named if len(things) <= _NAMED_MAX else f"{named} and {len(things) - _NAMED_MAX} more"
