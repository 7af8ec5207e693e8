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
    for rule in rules:
        if not rule.is_about(user_names=user_names, image_name=image.name):
            continue
        if rule.action == "deny":
            raise PolicyDenied(f"{image.name}: denied by {rule.label}", hint="ask the administrators of this cluster")
        return Grant(caller=caller, image=image, edits=edits, targets=tuple(targets), rule=rule.label)
    raise PolicyDenied(f"{image.name}: no rule allows it", hint="ask the administrators of this cluster")
