"""``--gpu`` as CDI devices, and which device nodes are which GPU.

The vendors' generators name devices in their own ways: NVIDIA ``0``, ``1``, a MIG instance ``0:1``, ``GPU-…`` and
``MIG-…``, and ``all``; AMD ``0``, ``1``, ``all``; Intel ``card0`` or
``0000-03-00-0-0x0bd5``, in its documents ``gpu0``, and no ``all``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from hpcctr.errors import FeatureUnknown
from hpcctr.host.cdi import Registry
from hpcctr.host.edits import DeviceEdit

#: The kinds that are GPUs.
KINDS = ("nvidia.com/gpu", "amd.com/gpu", "intel.com/gpu")
_ALL = "all"
_INDEX = re.compile(r"(?:gpu|mig)?([0-9]{1,6}(?::[0-9]{1,6})?)")
_NUMBERED_NODE = re.compile(r"/dev/nvidia([0-9]{1,6})$")
_UUID = re.compile(r"(?:GPU|MIG)-.+")
#: The nodes that programs compute with and jobs are given, of NVIDIA a GPU's and a MIG instance's. The others are the
#: driver's (/dev/kfd, /dev/nvidiactl) or for displays (/dev/dri/card0), which a job may lack.
_NODES = {
    "nvidia.com/gpu": re.compile(r"/dev/nvidia[0-9]+|/dev/nvidia-caps/.+"),
    "amd.com/gpu": re.compile(r"/dev/dri/renderD[0-9]+"),
    "intel.com/gpu": re.compile(r"/dev/dri/renderD[0-9]+"),
}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU, or one MIG instance: all names that mean the same device nodes."""

    #: ``vendor/class``.
    kind: str
    #: Names of it in that kind, as ``("0", "GPU-8a56…")``.
    names: tuple[str, ...]
    #: What the vendor's variables call it: ``0``, ``0:1``; where nothing has a number its place among its kind.
    index: str
    #: ``GPU-…`` or ``MIG-…``; empty when no file tells.
    uuid: str
    #: Its own nodes: who may open all of them may use it. Empty: the files name none.
    paths: tuple[str, ...]

    @property
    def device(self) -> str:
        """A qualified name."""
        return f"{self.kind}={self.names[0]}"


def names(selection: str, registry: Registry) -> tuple[str, ...]:
    """Qualified names for ``all``, ``none``, or numbers and UUIDs with commas. Raises :class:`FeatureUnknown`."""
    if selection == "none":
        return ()
    known = gpus(registry)
    if selection == _ALL:
        return _all(known, registry)
    chosen: list[str] = []
    for word in selection.split(","):
        chosen.append(_one(word.strip(), known, registry))
    return tuple(dict.fromkeys(chosen))


def gpus(registry: Registry) -> tuple[Gpu, ...]:
    """Every GPU that files describe one by one, by kind and index."""
    found: list[Gpu] = []
    for kind in KINDS:
        found += _gpus_of(kind, registry)
    return tuple(found)


def used(devices: Iterable[DeviceEdit], known: Iterable[Gpu]) -> tuple[Gpu, ...]:
    """The GPUs whose nodes are all among the devices of a launch, so that ``all`` comes to the single ones."""
    paths = {edit.path for edit in devices}
    return tuple(gpu for gpu in known if gpu.paths and paths.issuperset(gpu.paths))


def gpu_of(edit: DeviceEdit, known: Iterable[Gpu]) -> tuple[Gpu, ...]:
    """The GPUs a device's node is of: none for a driver's node, several for one that MIG instances share."""
    return tuple(gpu for gpu in known if edit.path in gpu.paths)


def _all(known: tuple[Gpu, ...], registry: Registry) -> tuple[str, ...]:
    chosen: list[str] = []
    for kind in KINDS:
        name = f"{kind}={_ALL}"
        if name in registry.devices or name in registry.conflicts:
            chosen.append(name)
        else:
            chosen += [gpu.device for gpu in known if gpu.kind == kind]
    if not chosen:
        raise _none_described(registry)
    return tuple(chosen)


def _one(word: str, known: tuple[Gpu, ...], registry: Registry) -> str:
    described = [f"{kind}={word}" for kind in KINDS]
    found = [name for name in described if name in registry.devices or name in registry.conflicts]
    if not found:
        found = [gpu.device for gpu in known if gpu.index == word]
    if len(found) > 1:
        raise FeatureUnknown(
            f"GPU {word} is {' as well as '.join(found)}", hint=f"say which: --device {found[0]}; both: --gpu=all"
        )
    if found:
        return found[0]
    if not known and not any(name.partition("=")[0] in KINDS for name in registry.devices):
        raise _none_described(registry)
    shown = ", ".join(name for gpu in known for name in gpu.names) or _ALL
    raise FeatureUnknown(
        f"GPU {word[:80]!r}: no CDI file of this node describes it", hint=f"known here: {shown[:1000]}"
    )


def _none_described(registry: Registry) -> FeatureUnknown:
    text = f"no CDI file in {', '.join(registry.directories)} describes a GPU"
    if registry.errors:
        text += f"; {registry.errors[0].path} is not used: {registry.errors[0].reason}"
    return FeatureUnknown(text, hint=registry.how_to_describe())


def _gpus_of(kind: str, registry: Registry) -> list[Gpu]:
    #: Names that mean the same nodes are one GPU; a device without nodes (Tegra) is one of its own.
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, described in registry.devices.items():
        device = described.device.name
        if described.file.document.kind != kind or device == _ALL:
            continue
        paths = {node.path for node in described.device.edits.device_nodes if _NODES[kind].fullmatch(node.path)}
        groups.setdefault(tuple(sorted(paths)) or (name,), []).append(device)
    made: list[Gpu] = []
    for position, (paths_or_name, members) in enumerate(groups.items()):
        members.sort(key=lambda member: _INDEX.fullmatch(member) is None)
        # A file of UUIDs alone has no numbers; the nodes have.
        numbered = _INDEX.fullmatch(members[0]) or _NUMBERED_NODE.match(paths_or_name[0])
        made.append(
            Gpu(
                kind=kind,
                names=tuple(members),
                index=numbered[1] if numbered else str(position),
                uuid=next((member for member in members if _UUID.fullmatch(member)), ""),
                paths=tuple(path for path in paths_or_name if path.startswith("/dev/")),
            )
        )
    return made
