"""What a launch asks of the node, and the edits that come of it: the story of ``host/``.

In this order, of which the later counts where two want the same place: the site's variables, the profiles every launch
gets, profiles that were asked for, CDI devices, MPI. Then what ld.so is told, and whether all of it fits the image.
A launch that asks for nothing, at a site that adds nothing, reads nothing here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from hpcctr.context import Caller
from hpcctr.errors import FeatureUnknown, LibrariesUnfit
from hpcctr.host import cdi, check, gpu, ldcache, loading, mpi, profiles
from hpcctr.host.edits import GpuEdit, HostEdits, joined, of_site
from hpcctr.host.kept import Kept, with_entries
from hpcctr.host.ldcache import HostCache
from hpcctr.image.facts import facts_of
from hpcctr.image.record import ImageFacts, MpiLibrary, StoredImage
from hpcctr.request import LaunchRequest
from hpcctr.site import Site

#: The name policy knows the node's MPI by, and that of the profile which describes it.
MPI = "mpi"


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a launch gets of the node, and by which names it asked for it."""

    edits: HostEdits
    #: Profiles and CDI devices that the caller asked for, as policy knows them.
    names: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    #: Devices whose nodes all come with those: ``nvidia.com/gpu=1`` with ``nvidia.com/gpu=all``.
    other_devices: tuple[str, ...] = ()


_kept: Kept[Features] = Kept()


def features_of(request: LaunchRequest, caller: Caller, site: Site, image: StoredImage) -> Features:
    """The edits for a request.

    Raises :class:`FeatureUnknown`, :class:`FeatureUnusable`, :class:`LibrariesUnfit`, :class:`MpiUnfit`.
    """
    whose_mpi = request.mpi or site.mpi
    if not (request.gpu or request.devices or request.features or site.features or whose_mpi != "container"):
        return Features(edits=joined([of_site(site), HostEdits(mpi=_told(image))]))
    gids = (caller.gid, *caller.groups)
    asked = (request.gpu, request.devices, request.features, request.mpi)
    told = (site.profile_directory, site.features, site.mpi, site.cdi, tuple(site.env.items()))

    def worked_out() -> tuple[Features, Iterable[str]]:
        features = _worked_out(request, gids, site, image, whose_mpi)
        return features, _made_of(features.edits, site)

    return _kept.get((image.record.digest, gids, asked, told), worked_out)


def _worked_out(
    request: LaunchRequest, gids: Sequence[int], site: Site, image: StoredImage, whose_mpi: str
) -> Features:
    facts = facts_of(image)
    host = HostCache.load()
    parts = [of_site(site), HostEdits(mpi=_told(image)), *_profiles(request, site, facts, host)]
    devices: tuple[str, ...] = ()
    other_devices: tuple[str, ...] = ()
    if request.gpu or request.devices:
        registry = cdi.Registry.load(site.cdi.directories)
        devices, given = _devices(request, gids, site, image, registry)
        other_devices = tuple(name for name in _with_nodes_of(given, registry) if name not in devices)
        parts.append(given)
    if whose_mpi != "container":
        parts.append(_mpi(whose_mpi, request, site, facts, host))
    edits = _fitting(loading.told(joined(parts), facts), facts)
    names = (*request.features, MPI) if request.mpi == "host" else request.features
    return Features(edits=edits, names=names, devices=devices, other_devices=other_devices)


def _made_of(edits: HostEdits, site: Site) -> Iterator[str]:
    """Every path of the node that tells whether the same would come out again."""
    yield from with_entries((*site.cdi.directories, site.profile_directory))
    yield ldcache.PATH
    for mount in edits.mounts:
        yield mount.source
        yield os.path.dirname(mount.source)
    yield from (device.path for device in edits.devices)
    yield from (one.path for one in edits.gpus)


def _with_nodes_of(edits: HostEdits, registry: cdi.Registry) -> Iterator[str]:
    """Devices that have nodes of their own, all of which are among those of the edits."""
    given = {edit.path for edit in edits.devices}
    for name, described in registry.devices.items():
        nodes = {node.path for node in described.device.edits.device_nodes}
        if nodes and nodes <= given:
            yield name


def _devices(
    request: LaunchRequest, gids: Sequence[int], site: Site, image: StoredImage, registry: cdi.Registry
) -> tuple[tuple[str, ...], HostEdits]:
    """(qualified names of the devices that are asked for, their edits)."""
    chosen = gpu.names(request.gpu, registry) if request.gpu else ()
    devices = tuple(dict.fromkeys((*chosen, *request.devices)))
    edits = registry.inject(
        devices,
        allowed_hooks=site.cdi.hooks,
        caller_gids=gids,
        image_env=image.record.config.env,
    )
    kinds = {name.partition("=")[0] for name in chosen}
    # All of a kind: libraries number those that the process may open.
    gpus = [
        GpuEdit(
            vendor=one.kind.partition(".")[0],
            index=one.index,
            uuid=one.uuid,
            names=",".join(one.names),
            path=path,
        )
        for one in gpu.gpus(registry)
        if one.kind in kinds
        for path in one.paths
    ]
    return devices, replace(edits, gpus=tuple(gpus))


def _profiles(request: LaunchRequest, site: Site, facts: ImageFacts | None, host: HostCache) -> list[HostEdits]:
    wanted = [name for name in dict.fromkeys((*site.features, *request.features)) if name != MPI]
    if not wanted:
        return []
    known = profiles.load(site.profile_directory)
    for name in wanted:
        if name not in known:
            where = "" if name in request.features else ", which features of site.toml names"
            raise FeatureUnknown(
                f"host feature {name}{where}: no profile of that name in {site.profile_directory}",
                hint=f"known here: {', '.join(sorted(known)) or 'none'}; docs/profiles.md",
            )
    return [known[name].edits(facts, host, is_asked=name in request.features) for name in wanted]


def _mpi(whose: str, request: LaunchRequest, site: Site, facts: ImageFacts | None, host: HostCache) -> HostEdits:
    profile = profiles.load(site.profile_directory).get(MPI)
    plan = mpi.decide(whose, asked=bool(request.mpi), facts=facts, profile=profile, host=host)
    told = _words(plan.library, "" if plan.is_host or facts is None else facts.pmix) if plan.library else ""
    return replace(plan.edits, notes=(*plan.edits.notes, f"MPI: {plan.text}"), mpi=told)


def _told(image: StoredImage) -> str:
    """What the client is told of the image's MPI: nothing of an image that has several."""
    summary = image.record.facts
    if summary is None or len({(one.family, one.version) for one in summary.mpi}) != 1:
        return ""
    return _words(summary.mpi[0], summary.pmix)


def _words(library: MpiLibrary, pmix: str) -> str:
    return "\t".join((library.family, library.version, ",".join(library.pmi), pmix, library.product))


def _fitting(edits: HostEdits, facts: ImageFacts | None) -> HostEdits:
    """The edits with the warnings and notes of the check. Raises :class:`LibrariesUnfit`."""
    problems = check.problems(edits, facts)
    refused = [problem for problem in problems if problem.level == "refuse"]
    if refused:
        more = f"; and {len(refused) - 1} more" if len(refused) > 1 else ""
        raise LibrariesUnfit(refused[0].text + more, hint=refused[0].hint)
    return replace(
        edits,
        warnings=(*edits.warnings, *(_text(problem) for problem in problems if problem.level == "warn")),
        notes=(*edits.notes, *(_text(problem) for problem in problems if problem.level == "note")),
    )


def _text(problem: check.Problem) -> str:
    return f"{problem.text} (hint: {problem.hint})" if problem.hint else problem.text
