"""The engine's half of a launch as a story: who asks for what, what they are granted, where they may go in."""

from __future__ import annotations

from collections.abc import Sequence

from hpcctr.context import Caller, machine
from hpcctr.engine.nodes import NodeContainer, NodeContainers
from hpcctr.engine.view import View
from hpcctr.host.edits import HostEdits, of_site
from hpcctr.host.features import features_of
from hpcctr.image import shelves
from hpcctr.image.record import Platform, StoredImage
from hpcctr.policy import account
from hpcctr.policy.aliases import other_names
from hpcctr.policy.decide import decide
from hpcctr.policy.grant import Grant
from hpcctr.policy.load import load
from hpcctr.policy.rules import Rule
from hpcctr.request import ExecRequest, LaunchRequest, Target
from hpcctr.site import Site


def prepare(request: LaunchRequest, caller: Caller, site: Site) -> Grant:
    """Image, host features and policy: a grant, or the error that says why not."""
    rules = load(site.policy_directory)
    image = shelves.find(
        site.store,
        caller.uid,
        request.image,
        Platform(os="linux", architecture=machine()),
        gids=(caller.gid, *caller.groups),
        as_of=request.as_of,
    )
    features = features_of(request, caller, site, image)
    # What the site adds, nobody has to be allowed.
    return _decided(
        rules,
        caller,
        site,
        image,
        edits=features.edits,
        targets=request.targets_with(site.carry),
        asked_targets=request.targets,
        features=features.names,
        devices=features.devices,
        other_devices=features.other_devices,
    )


def follow(request: ExecRequest, view: View, caller: Caller, site: Site) -> Grant:
    """The same for a process that goes where another of its user's is: policy decides again, nothing is built."""
    rules = load(site.policy_directory)
    image = shelves.image_known_as(
        site.store, caller.uid, view.place.image_digest, request.image, gids=(caller.gid, *caller.groups)
    )
    return _decided(rules, caller, site, image, edits=of_site(site), targets=(), asked_targets=())


def _decided(
    rules: Sequence[Rule],
    caller: Caller,
    site: Site,
    image: StoredImage,
    *,
    edits: HostEdits,
    targets: Sequence[Target],
    asked_targets: Sequence[Target],
    features: Sequence[str] = (),
    devices: Sequence[str] = (),
    other_devices: Sequence[str] = (),
) -> Grant:
    return decide(
        rules,
        caller=caller,
        user_names=account.names_for(rules, caller),
        image=image,
        other_names=other_names(rules, site.store, image),
        edits=edits,
        targets=targets,
        asked_targets=asked_targets,
        features=features,
        devices=devices,
        other_devices=other_devices,
    )


def build(grant: Grant, site: Site, nodes: NodeContainers) -> NodeContainer:
    """The node container of a grant, found or built; containerd makes it and never starts it."""
    return nodes.get(grant, open_image=lambda: shelves.open_image_file(site.store, grant.image))
