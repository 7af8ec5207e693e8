"""The half of ``hpcctr doctor`` about what launches can get of this node: GPUs, fabric, profiles, MPI, scheduler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from hpcctr.cli.finding import Finding
from hpcctr.errors import HpcctrError
from hpcctr.site import Site

#: PCI vendors of GPUs, and what writes the CDI file of theirs.
_GPU_VENDORS = {
    "0x10de": ("NVIDIA", "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"),
    "0x1002": ("AMD", "amd-ctk cdi generate --output=/etc/cdi/amd.json"),
}
#: Display controllers (0x0300, 0x0302, 0x0380) and processing accelerators (0x1200), as in pci.ids.
_GPU_CLASSES = ("0x0300", "0x0302", "0x0380", "0x1200")
#: Where drivers of fabrics show their adapters: verbs (InfiniBand, RoCE, Omni-Path, EFA), Slingshot.
_FABRICS = (("/sys/class/infiniband", "verbs"), ("/sys/class/cxi", "Slingshot"))


def devices(site: Site) -> Iterator[Finding]:
    """CDI: what is described, what is wrong with it, and GPUs that nobody has described."""
    from hpcctr.host import cdi

    registry = cdi.Registry.load(site.cdi.directories, root_owned=os.getuid() == 0)
    names = registry.names()
    kinds = sorted({name.partition("=")[0] for name in names})
    counted = ", ".join(f"{kind} ({sum(name.startswith(kind + '=') for name in names)})" for kind in kinds)
    where = ", ".join(site.cdi.directories)
    yield Finding(thing="devices", is_good=True, what=f"CDI in {where}: {counted or 'none'}")
    for problem in registry.problems(allowed_hooks=site.cdi.hooks):
        text = problem.text if problem.path in problem.text else f"{problem.path}: {problem.text}"
        yield Finding(thing="devices", is_good=False, what=text, remedy=problem.hint)
    for vendor, count in gpus_of(Path("/sys/bus/pci/devices")).items():
        name, remedy = _GPU_VENDORS[vendor]
        is_described = any(kind == f"{name.lower()}.com/gpu" for kind in kinds)
        what = f"{count} of {name}'s, {'described' if is_described else 'and no CDI file describes them'}"
        yield Finding(thing="GPUs", is_good=is_described, what=what, remedy="" if is_described else remedy)


def profiles(site: Site) -> Iterator[Finding]:
    """Site profiles that can be read, and those every launch gets."""
    from hpcctr.host import profiles

    try:
        known = profiles.load(site.profile_directory, root_owned=os.getuid() == 0)
    except HpcctrError as error:
        yield Finding(thing="profiles", is_good=False, what=error.message, remedy=error.hint)
        return
    missing = [name for name in site.features if name not in known]
    default = f"; for every launch: {', '.join(site.features)}" if site.features else ""
    what = f"{site.profile_directory}: {', '.join(sorted(known)) or 'none'}{default}"
    remedy = f"features of site.toml names {', '.join(missing)}: docs/profiles.md" if missing else ""
    yield Finding(thing="profiles", is_good=not missing, what=what, remedy=remedy)


def fabric(_: Site) -> Iterator[Finding]:
    """Adapters of a fabric, and whether programs may lock memory for them."""
    found = [
        f"{kind}: {', '.join(sorted(names))}"
        for place, kind in _FABRICS
        if (names := os.listdir(place) if Path(place).is_dir() else [])
    ]
    yield Finding(thing="fabric", is_good=True, what="; ".join(found) or "none")
    if found:
        yield from _memlock()


def mpi(site: Site) -> Iterator[Finding]:
    """MPI and launchers of the node."""
    from hpcctr.host import mpi, profiles
    from hpcctr.host.ldcache import HostCache

    try:
        profile = profiles.load(site.profile_directory, root_owned=os.getuid() == 0).get("mpi")
    except HpcctrError:
        # What is wrong with profiles is told of them.
        profile = None
    yield Finding(thing="MPI", is_good=True, what=mpi.on_node(profile, HostCache.load()))


def scheduler(_: Site) -> Iterator[Finding]:
    """Slurm's version and the ways in which it starts MPI."""
    srun = shutil.which("srun")
    if srun is None:
        yield Finding(thing="Slurm", is_good=True, what="no srun here")
        return
    version = re.search(r"^slurm\S* \S+$", _said([srun, "--version"]), re.MULTILINE)
    kinds = [line.strip() for line in _said([srun, "--mpi=list"]).splitlines() if re.fullmatch(r"\s*[\w/]+", line)]
    what = version[0] if version else f"{srun}, which finds no configuration of a cluster"
    yield Finding(thing="Slurm", is_good=True, what=f"{what}; --mpi={'|'.join(kinds)}" if kinds else what)


def _memlock() -> Iterator[Finding]:
    import resource

    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    good = limit == resource.RLIM_INFINITY
    yield Finding(
        thing="locked memory",
        is_good=good,
        what="no limit in this shell" if good else f"{limit} bytes in this shell; RDMA locks what it sends",
        remedy="" if good else "LimitMEMLOCK=infinity for slurmd and sshd, memlock in /etc/security/limits.conf",
    )


def gpus_of(place: Path) -> dict[str, int]:
    """Number of GPUs by PCI vendor."""
    found: dict[str, int] = {}
    for device in sorted(place.iterdir()) if place.is_dir() else ():
        try:
            kind, vendor = ((device / name).read_text().strip() for name in ("class", "vendor"))
        except OSError:
            continue
        if kind[:6] in _GPU_CLASSES and vendor in _GPU_VENDORS:
            found[vendor] = found.get(vendor, 0) + 1
    return found


def _said(words: list[str]) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr
