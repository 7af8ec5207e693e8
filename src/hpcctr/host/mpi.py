"""Whose MPI library a program gets: the image's, or the node's in its place.

An MPI library can take another's place where both have one binary interface: MPICH from 3.1 on and what is built from
it (Intel MPI, Cray MPICH, MVAPICH), whatever their SONAME (mpich.org/abi); Open MPI within a major version, whose parts
fit only each other; the standard's own interface (MPI 5.0, libmpi_abi). The node's comes with all that it needs: its
parts, the libraries for its fabric, and the directories of plug-ins that these load by path.

Files of the node are read as :mod:`hpcctr.host.libraries` reads them; the image's side is what conversion noted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from hpcctr.errors import FeatureUnusable, MpiUnfit
from hpcctr.host import check, libraries, node_mpi
from hpcctr.host.edits import HostEdits, MountEdit, joined
from hpcctr.host.ldcache import HostCache
from hpcctr.host.libraries import FOLDER
from hpcctr.host.loading import told
from hpcctr.host.node_mpi import MPICH_NAMES, HostMpi, host_mpis, places, plugin_files, shown, variables
from hpcctr.host.profile_written import is_never
from hpcctr.host.profiles import Profile
from hpcctr.image import mpilib
from hpcctr.image.record import ImageFacts, MpiLibrary

#: What the node's MPI must have from the node: it is built for the node's fabric, and for its own plug-ins.
_TRANSPORTS = (
    "libuc[mpst].so.*", "libucs_signal.so.*", "libfabric.so.*", "libpsm*.so.*", "libcxi.so.*", "libpmix.so.*",
    "libpals.so.*", "libpmi.so.*", "libpmi2.so.*",
)  # fmt: skip
_ORIGIN = "MPI of the node"


@dataclass(frozen=True, kw_only=True)
class MpiPlan:
    """Whose MPI a container has, and why."""

    is_host: bool
    #: For people, without "MPI:" before it.
    text: str
    edits: HostEdits = field(default_factory=HostEdits)
    #: The one that programs load; None where the image has none, or of several families.
    library: MpiLibrary | None = None


def decide(
    choice: str,
    *,
    asked: bool,
    facts: ImageFacts | None,
    profile: Profile | None,
    host: HostCache,
    root_owned: bool = True,
) -> MpiPlan:
    """The plan for ``choice``: ``container``, ``host``, or ``auto``, which takes the node's only where its profile
    ``mpi`` prefers it and it fits.

    ``asked``: by this launch, not by the site. Raises :class:`MpiUnfit`, and :class:`FeatureUnusable` for a profile
    that this node cannot give.
    """
    theirs = () if facts is None else facts.mpi
    if choice == "container":
        return _of_image(theirs, "as asked for" if asked else "as the site says")
    if choice == "auto" and (profile is None or profile.mpi is None or profile.mpi.prefer != "host"):
        return _of_image(theirs, "no profile mpi of this node prefers the node's")
    try:
        return _of_node(asked, facts, profile, host, root_owned)
    except (MpiUnfit, FeatureUnusable) as error:
        if choice == "host":
            raise
        return _of_image(theirs, str(error))


def on_node(profile: Profile | None, host: HostCache) -> str:
    """One line: MPI, PMIx and launchers of this node."""
    mpis = [f"{shown(mpi.library)} ({mpi.library.path})" for mpi in host_mpis(profile, host)]
    pmix = host.find("libpmix.so.2")
    if pmix:
        version = mpilib.pmix_version(node_mpi.content(os.path.realpath(pmix)))
        mpis.append(f"PMIx {version or 'of an unknown version'}")
    directories = ("/usr/local/bin", "/usr/bin", "/bin")
    launchers = [
        name
        for name in ("mpirun.openmpi", "mpiexec.hydra", "mpirun", "mpiexec", "prterun", "srun")
        if any(os.access(f"{directory}/{name}", os.X_OK) for directory in directories)
    ]
    return f"{', '.join(mpis) or 'no MPI library'}; launchers: {', '.join(launchers) or 'none'}"


def _of_image(theirs: Sequence[MpiLibrary], because: str) -> MpiPlan:
    if not theirs:
        return MpiPlan(is_host=False, text=f"none in the image ({because})")
    names = ", ".join(dict.fromkeys(map(shown, theirs)))
    return MpiPlan(is_host=False, text=f"the image's, {names} ({because})", library=_only(theirs))


def _only(several: Sequence[MpiLibrary]) -> MpiLibrary | None:
    """The library, where all are of one family and version."""
    kinds = {(library.family, library.version) for library in several}
    return several[0] if len(kinds) == 1 else None


def _of_node(
    asked: bool, facts: ImageFacts | None, profile: Profile | None, host: HostCache, root_owned: bool
) -> MpiPlan:
    if facts is None:
        raise MpiUnfit(
            "the image was stored before its MPI was noted, so nobody knows what the node's would replace",
            hint="hpcctr rm IMAGE, hpcctr pull IMAGE; or --mpi=container",
        )
    if not facts.mpi:
        if asked:
            raise MpiUnfit(
                "no MPI library was found in the image, so there is nothing that the node's could replace",
                hint="leave --mpi=host out; a program linked statically to its MPI has the image's always",
            )
        return _of_image((), "and nothing to replace")
    ours = host_mpis(profile, host)
    if not ours:
        raise MpiUnfit(
            "this node has no MPI library that its ld.so finds, and no profile mpi names one",
            hint="name it in mpi.toml of the site's profiles (docs/mpi.md), or --mpi=container",
        )
    pairs = [(library, mpi) for library in facts.mpi if (mpi := _fitting(library, ours)) is not None]
    kept = [library for library in facts.mpi if _fitting(library, ours) is None]
    if not pairs:
        raise _unfit(facts.mpi, ours)
    _require_distinct(pairs, kept)
    chosen = tuple({mpi.library.path: mpi for _, mpi in pairs}.values())
    origin = profile.path if profile is not None else _ORIGIN
    edits = _edits(pairs, chosen, facts, profile, host, origin, root_owned)
    refused = [problem for problem in check.problems(told(edits, facts), facts) if problem.level == "refuse"]
    if refused:
        raise MpiUnfit(f"the node's {shown(chosen[0].library)} does not load: {refused[0].text}", hint=refused[0].hint)
    text = "; ".join(
        f"the node's {shown(mpi.library)} ({mpi.library.path}) in place of the image's "
        + ", ".join(dict.fromkeys(shown(library) for library, other in pairs if other is mpi))
        for mpi in chosen
    )
    stay = ", ".join(dict.fromkeys(map(shown, kept)))
    warnings = (f"MPI: {stay} stays the image's: the node's MPI has another binary interface",) if stay else ()
    mpis = [mpi.library for mpi in chosen] + kept
    return MpiPlan(is_host=True, text=text, edits=joined([edits, HostEdits(warnings=warnings)]), library=_only(mpis))


def _fitting(library: MpiLibrary, ours: Sequence[HostMpi]) -> HostMpi | None:
    return next((mpi for mpi in ours if _is_fit(library, mpi.library)), None)


def _is_fit(image: MpiLibrary, node: MpiLibrary) -> bool:
    if image.family != node.family or image.family == "unknown":
        return False
    if image.family == "mpich":
        # The number is libtool's, which counts interfaces: one for all since MPICH 3.1.
        return _number(image.soname) == _number(node.soname)
    if image.family == "openmpi":
        return image.soname == node.soname and _major(image) == _major(node) != ""
    return image.soname == node.soname


def _number(soname: str) -> str:
    return soname.partition(".so.")[2]


def _major(library: MpiLibrary) -> str:
    return library.version.partition(".")[0]


def _unfit(theirs: Sequence[MpiLibrary], ours: Sequence[HostMpi]) -> MpiUnfit:
    image = " and ".join(dict.fromkeys(f"{shown(library)} ({library.soname})" for library in theirs))
    node = " and ".join(dict.fromkeys(f"{shown(mpi.library)} ({mpi.library.soname})" for mpi in ours))
    wanted = " or ".join(dict.fromkeys(_fits(mpi.library) for mpi in ours))
    return MpiUnfit(
        f"the image has {image}, the node has {node}: not one binary interface",
        hint=f"--mpi=container keeps the image's; the node's takes the place of {wanted} (docs/mpi.md)",
    )


def _require_distinct(pairs: Sequence[tuple[MpiLibrary, HostMpi]], kept: Sequence[MpiLibrary]) -> None:
    """ld.so looks for a name: what stays must not go by one that is the node's from now on."""
    names = {name for library, mpi in pairs for name in (*_names(library.soname), mpi.library.soname)}
    both = next((library for library in kept if library.soname in names), None)
    if both is not None:
        other = next(library for library, _ in pairs)
        raise MpiUnfit(
            f"the image has {shown(other)}, which the node's could replace, and {shown(both)}, which it could not, by "
            f"the name {both.soname}",
            hint="use an image with one of them, or --mpi=container",
        )


def _names(soname: str) -> tuple[str, ...]:
    return next((group for group in MPICH_NAMES if soname in group), (soname,))


def _fits(library: MpiLibrary) -> str:
    if library.family == "mpich":
        return "MPICH 3.1 or newer, or one built from it"
    if library.family == "openmpi":
        return f"Open MPI {_major(library)}"
    return library.soname


def _edits(
    pairs: Sequence[tuple[MpiLibrary, HostMpi]],
    chosen: Sequence[HostMpi],
    facts: ImageFacts,
    profile: Profile | None,
    host: HostCache,
    origin: str,
    root_owned: bool,
) -> HostEdits:
    wanted = [path for mpi in chosen for path in (mpi.library.path, *mpi.parts.values())]
    beside = list(places(wanted, origin, root_owned))
    plugins = [path for place in beside for path in plugin_files(place.source)]
    # Once more with what only the plug-ins need; the fabric's libraries in any case, also where the image has some.
    everything = libraries.inject(wanted, facts=None, origin=origin, host=host, beside=plugins, root_owned=root_owned)
    fabric = [mount.source for mount in everything.mounts if _is_transport(mount.target)]
    beside += places(fabric, origin, root_owned)
    plugins = [path for place in beside for path in plugin_files(place.source)]
    injected = libraries.inject(
        [*wanted, *fabric], facts=facts, origin=origin, host=host, beside=plugins,
        replace=_TRANSPORTS, root_owned=root_owned,
    )  # fmt: skip
    edits = HostEdits(mounts=tuple(beside), env=tuple(variables(beside, origin)))
    given = () if profile is None else (profile.edits(facts, host, is_asked=True),)
    mounts = {mount.source: mount for mount in injected.mounts}
    over = HostEdits(
        mounts=tuple(
            MountEdit(source=real, target=target, kind="f", origin=origin, identity=mounts[real].identity)
            for target, source in _over(pairs, facts)
            if (real := os.path.realpath(source)) in mounts
        )
    )
    return joined([*given, edits, injected, over])


def _over(pairs: Sequence[tuple[MpiLibrary, HostMpi]], facts: ImageFacts) -> Iterator[tuple[str, str]]:
    """(path inside, file of the node): every name by which the image's programs ask for what is replaced, in the
    folder of the node's libraries, and every file that the image's search paths lead to.
    """
    known = {os.path.dirname(library.path) for library in facts.libraries}
    for library, mpi in pairs:
        names = dict(mpi.parts)
        names[library.soname] = names[mpi.library.soname] = mpi.library.path
        if library.family == "mpich":
            for group in MPICH_NAMES:
                path = next((names[name] for name in group if name in names), None)
                names.update({name: path for name in group if path is not None})
        for name, path in names.items():
            yield f"{FOLDER}/{name}", path
        for other in facts.libraries:
            if other.soname in names and not is_never(other.path):
                yield other.path, names[other.soname]
        if is_never(library.path):
            continue
        directory = os.path.dirname(library.path)
        if directory not in known:
            # Which of its parts are there was not noted; a name more does no harm.
            for name, path in mpi.parts.items():
                if "-gfortran." not in name and not name.startswith("libompitrace"):
                    for alias in _aliases(name, library):
                        yield f"{directory}/{alias}", path
        yield library.path, mpi.library.path


def _aliases(name: str, library: MpiLibrary) -> tuple[str, ...]:
    """What a part is called beside an image's MPI library."""
    names = _names(name)
    if len(names) == 1:
        return names
    return names[1:] if library.soname.startswith("libmpich.") else names[:1]


def _is_transport(target: str) -> bool:
    name = os.path.basename(target)
    return any(fnmatchcase(name, pattern) for pattern in _TRANSPORTS)
