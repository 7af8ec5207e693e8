"""The decision: pure, from values to a :class:`Grant` or a :class:`PolicyDenied`."""

from __future__ import annotations

from collections.abc import Sequence

from hpcctr.context import Caller
from hpcctr.errors import PolicyDenied
from hpcctr.host.edits import HostEdits
from hpcctr.image.record import StoredImage
from hpcctr.policy.grant import Grant
from hpcctr.policy.rules import Rule
from hpcctr.request import Target


def decide(
    rules: Sequence[Rule],
    *,
    caller: Caller,
    user_names: frozenset[str],
    image: StoredImage,
    edits: HostEdits,
    targets: Sequence[Target],
) -> Grant:
    """The grant of the first rule about this caller and image. No rule is a denial."""
    rule = allowing(rules, user_names=user_names, image_name=image.policy_name)
    return Grant(caller=caller, image=image, edits=edits, targets=tuple(targets), rule=rule)


def allowing(rules: Sequence[Rule], *, user_names: frozenset[str], image_name: str) -> str:
    """The label of the rule that lets this caller have the image; what one may not run, one may not pull either.

    Raises :class:`PolicyDenied`.
    """
    for rule in rules:
        if not rule.is_about(user_names=user_names, image_name=image_name):
            continue
        if rule.action == "deny":
            raise PolicyDenied(f"{image_name}: denied by {rule.label}", hint="ask the administrators of this cluster")
        return rule.label
    raise PolicyDenied(f"{image_name}: no rule allows it", hint="ask the administrators of this cluster")
