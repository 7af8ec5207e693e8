"""Which of the node's devices this process may open, and whether its limits are what a host feature needs.

/dev inside is the caller's, and so is the device cgroup: what a launch shows of a GPU is libraries and variables, and
the kernel decides about the device itself. So it is asked, by opening the nodes as the program will.
"""

from __future__ import annotations

import errno
import os

from hpcctr.errors import FeatureUnusable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hpcctr.wire import Frame

#: Variables by which a vendor's libraries are told which GPUs to use (CUDA C++ Programming Guide, ROCr's and Level
#: Zero's documentation), and whether they take a UUID.
VISIBLE = {
    "nvidia": (b"CUDA_VISIBLE_DEVICES", True),
    "amd": (b"ROCR_VISIBLE_DEVICES", True),
    "intel": (b"ZE_AFFINITY_MASK", False),
}
#: CUDA numbers GPUs by speed unless it is told otherwise; the node's files number them by bus.
_CUDA_ORDER = (b"CUDA_DEVICE_ORDER", b"PCI_BUS_ID")
#: What says that there is a device, and somebody else has it to themselves.
_BUSY = (errno.EBUSY, errno.ETXTBSY)
_SHARED_DIRECTORY = "/dev/dri/"
_SHM = "/dev/shm"  # noqa: S108 - where POSIX shared memory is (shm_overview(7))
#: linux/resource.h RLIM_INFINITY, as Python's resource module gives it.
_UNLIMITED = -1


class Device:
    """A device node a launch is about, and how opening it ended."""

    __slots__ = ("error", "name", "path")

    def __init__(self, name: str, path: str, error: int) -> None:
        #: Of the device, as it was asked for: a CDI name, or that of a profile.
        self.name = name
        self.path = path
        #: errno, 0 when it could be opened.
        self.error = error

    @property
    def is_usable(self) -> bool:
        return self.error == 0 or self.error in _BUSY

    @property
    def state(self) -> str:
        """For people."""
        return "can be opened" if self.error == 0 else os.strerror(self.error).lower()


class Gpu:
    """A GPU of the node: what its vendor's libraries call it, and its nodes."""

    __slots__ = ("index", "names", "nodes", "uuid", "vendor")

    def __init__(self, vendor: str, index: str, uuid: str, names: Sequence[str]) -> None:
        self.vendor = vendor
        self.index = index
        self.uuid = uuid
        #: All it is called, the two above included.
        self.names = frozenset((index, uuid, *names))
        self.nodes: list[Device] = []

    @property
    def is_usable(self) -> bool:
        """Whether the caller's job has it: nodes in /dev/dri, which jobs often share, decide only where there are no
        others.
        """
        return all(node.is_usable for node in _deciding(self.nodes))


def devices_of(granted: Frame) -> list[Device]:
    """The devices of a grant, each node opened once."""
    tried: dict[str, int] = {}
    devices = []
    for field in granted.every("device"):
        permissions, name, path = os.fsdecode(field).split(" ", 2)
        if path not in tried:
            tried[path] = _open(path, permissions)
        devices.append(Device(name, path, tried[path]))
    return devices


def gpus_of(granted: Frame, devices: Sequence[Device]) -> list[Gpu]:
    """The node's GPUs of the kinds that a grant is about, in the order of their numbers; each node opened once."""
    by_path = {device.path: device for device in devices}
    gpus: dict[tuple[str, str], Gpu] = {}
    for field in granted.every("gpu"):
        vendor, index, uuid, names, path = os.fsdecode(field).split(" ", 4)
        gpu = gpus.setdefault((vendor, index), Gpu(vendor, index, "" if uuid == "-" else uuid, names.split(",")))
        if path not in by_path:
            by_path[path] = Device(index, path, _open(path, "rw"))
        gpu.nodes.append(by_path[path])
    return sorted(gpus.values(), key=lambda gpu: (gpu.vendor, len(gpu.index), gpu.index))


def require_usable(devices: Sequence[Device], gpus: Sequence[Gpu], *, gpu: str, asked: Iterable[str]) -> None:
    """Raise :class:`FeatureUnusable` when what was asked for by name cannot be opened, or no GPU can.

    ``gpu`` is the choice of ``--gpu``, ``asked`` the names of ``--device``.
    """
    usable = [one for one in gpus if one.is_usable]
    if gpu == "all" and gpus and not usable:
        raise _unusable("--gpu: none of the node's GPUs can be opened", _first_bad(gpus[0]), "ask for GPUs in your job")
    if gpu not in ("", "all"):
        wanted = gpu.split(",")
        for one in gpus:
            if one.names.intersection(wanted) and not one.is_usable:
                yours = ",".join(each.index for each in usable)
                raise _unusable(
                    f"--gpu={gpu}: GPU {one.index} cannot be opened",
                    _first_bad(one),
                    f"your job has: --gpu={yours}" if yours else "ask for GPUs in your job",
                )
    for name in asked:
        bad = next((node for node in _deciding([d for d in devices if d.name == name]) if not node.is_usable), None)
        if bad is not None:
            raise _unusable(f"--device {name}: it cannot be opened", bad, f"ls -l {bad.path}; does your job have it?")


def visible(gpus: Sequence[Gpu], choice: str) -> dict[bytes, bytes]:
    """The variables that say to the vendors' libraries which GPUs were chosen; none for all, which the caller's own
    variables may narrow down.

    Libraries number the GPUs a process may open, so a number is a place among those.
    """
    if choice in ("", "all"):
        return {}
    wanted = choice.split(",")
    variables: dict[bytes, bytes] = {}
    for vendor in dict.fromkeys(gpu.vendor for gpu in gpus):
        usable = [gpu for gpu in gpus if gpu.vendor == vendor and gpu.is_usable]
        chosen = [(at, gpu) for at, gpu in enumerate(usable) if gpu.names.intersection(wanted)]
        if not chosen or vendor not in VISIBLE:
            continue
        name, takes_uuid = VISIBLE[vendor]
        if takes_uuid and all(gpu.uuid for _, gpu in chosen):
            variables[name] = ",".join(gpu.uuid for _, gpu in chosen).encode()
            continue
        if any(":" in gpu.index for gpu in usable):
            # Parts of a GPU (MIG) go by their UUIDs alone.
            continue
        variables[name] = ",".join(str(at) for at, _ in chosen).encode()
        if vendor == "nvidia":
            variables[_CUDA_ORDER[0]] = _CUDA_ORDER[1]
    return variables


def lacking(granted: Frame) -> list[str]:
    """What of the caller's limits is less than a host feature needs, in words."""
    texts = []
    for field in granted.every("need"):
        what, least, origin = os.fsdecode(field).split(" ", 2)
        text = _memlock_lacking(int(least)) if what == "memlock" else _shm_lacking(int(least))
        if text:
            texts.append(f"{origin}: {text}")
    return texts


def _memlock_lacking(least: int) -> str:
    import resource

    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == _UNLIMITED or (least != _UNLIMITED and limit >= least):
        return ""
    wanted = "no limit" if least == _UNLIMITED else f"{least} bytes"
    return (
        f"you may lock {limit} bytes of memory, and it needs {wanted}: connections may fail or fall back to TCP; "
        "ulimit -l unlimited, or in Slurm PropagateResourceLimitsExcept=MEMLOCK"
    )


def _shm_lacking(least: int) -> str:
    try:
        size = os.statvfs(_SHM)
    except OSError as error:
        return f"{_SHM}: {(error.strerror or str(error)).lower()}"
    has = size.f_blocks * size.f_frsize
    return "" if has >= least else f"{_SHM} has {has} bytes, and it needs {least}: mount -o remount,size= {_SHM}"


def _open(path: str, permissions: str) -> int:
    """errno of opening a device as the site's files say it is used; 0 when it can be."""
    mode = (
        os.O_RDWR if "w" in permissions and "r" in permissions else os.O_WRONLY if "w" in permissions else os.O_RDONLY
    )
    try:
        # Neither becoming a terminal's owner nor waiting for a carrier or a peer.
        os.close(os.open(path, mode | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _deciding(nodes: Sequence[Device]) -> Sequence[Device]:
    """The nodes by which a device is had or not: display nodes beside render nodes, and both beside a driver's own,
    are often not a job's to give.
    """
    own = [node for node in nodes if not node.path.startswith(_SHARED_DIRECTORY)]
    return own or [node for node in nodes if "/renderD" in node.path] or nodes


def _first_bad(gpu: Gpu) -> Device:
    return next(node for node in _deciding(gpu.nodes) if not node.is_usable)


def _unusable(what: str, node: Device, hint: str) -> FeatureUnusable:
    return FeatureUnusable(f"{what}: {node.path}: {node.state}", hint=hint)
