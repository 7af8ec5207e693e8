"""What a CDI file says, as frozen values: every rule of the specification that a file alone can break.

Versions 0.3.0 to 1.1.0 (Container Device Interface, SPEC.md and specs-go/). A file that uses what its version does not
have, or words that no version has, is refused as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from hpcctr.host.cdi_text import Value, Wrong, as_text
from hpcctr.host.cdi_text import parse as parse_text

#: Of one file.
BYTES_MAX = 4 << 20
DEVICES_MAX = 2048

_VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0")
_STAGES = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
_VENDOR_OR_CLASS = re.compile(r"[A-Za-z](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?")
_DEVICE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.:-]*[A-Za-z0-9])?")


@dataclass(frozen=True, kw_only=True)
class DeviceNode:
    """A device node; None is what the file leaves to the node."""

    path: str
    host_path: str
    type: str
    major: int
    minor: int
    permissions: str


@dataclass(frozen=True, kw_only=True)
class NetDevice:
    """A network interface and its name inside."""

    host_interface: str
    name: str


@dataclass(frozen=True, kw_only=True)
class Mount:
    """A mount."""

    host_path: str
    container_path: str
    type: str
    options: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Hook:
    """A program to run while a container is made or ended."""

    stage: str
    path: str
    args: tuple[str, ...]
    env: tuple[str, ...]
    timeout: int | None


@dataclass(frozen=True, kw_only=True)
class Edits:
    """What a device, or every device of a file, adds."""

    env: tuple[tuple[str, str], ...] = ()
    device_nodes: tuple[DeviceNode, ...] = ()
    net_devices: tuple[NetDevice, ...] = ()
    mounts: tuple[Mount, ...] = ()
    hooks: tuple[Hook, ...] = ()
    has_intel_rdt: bool = False
    gids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device by its name in its file."""

    name: str
    edits: Edits


@dataclass(frozen=True, kw_only=True)
class Document:
    """One file."""

    version: str
    #: ``vendor/class``.
    kind: str
    devices: tuple[Device, ...]
    #: Of every device of the file, once.
    edits: Edits


def parse(raw: bytes) -> Document:
    """A file's document. Raises :class:`Wrong`."""
    if len(raw) > BYTES_MAX:
        raise Wrong(f"longer than {BYTES_MAX} bytes")
    top = _Object(parse_text(raw), "the file")
    version = top.text("cdiVersion").removeprefix("v")
    if version not in _VERSIONS:
        raise Wrong(f"cdiVersion {version[:40]!r} is none of 0.3.0 to 1.1.0")
    kind = top.text("kind")
    if problem := kind_problem(kind):
        raise Wrong(problem)
    needs = _Needs()
    needs.at_least("0.6.0", "annotations", top.annotations())
    needs.at_least("0.6.0", "a dot in the class", "." in kind.partition("/")[2])
    edits = _edits(top.object("containerEdits"), needs)
    devices = tuple(_device(one, needs) for one in top.objects("devices"))
    top.close()
    if not devices:
        raise Wrong("no devices")
    if len(devices) > DEVICES_MAX:
        raise Wrong(f"{len(devices)} devices, {DEVICES_MAX} are possible")
    seen: set[str] = set()
    for device in devices:
        if device.name in seen:
            raise Wrong(f"device {device.name!r} is there twice")
        seen.add(device.name)
    needs.require(version)
    return Document(version=version, kind=kind, devices=devices, edits=edits)


def kind_problem(kind: str) -> str:
    """Why these are no ``vendor/class``; empty when they are."""
    vendor, slash, cls = kind.partition("/")
    if not slash or not _VENDOR_OR_CLASS.fullmatch(vendor):
        return f"kind {kind[:80]!r} does not begin with a vendor's name and a slash (vendor.com/class)"
    if not _VENDOR_OR_CLASS.fullmatch(cls):
        return f"kind {kind[:80]!r} does not end with a class (vendor.com/class)"
    return ""


def split_name(qualified: str) -> tuple[str, str] | None:
    """Kind and device of ``vendor/class=name``; None when it is not of that form."""
    kind, equals, device = qualified.partition("=")
    if not equals or kind_problem(kind) or not _DEVICE.fullmatch(device):
        return None
    return kind, device


class _Needs:
    """The version that what a file uses came with."""

    def __init__(self) -> None:
        self._least = _VERSIONS.index("0.3.0")
        self._what = "devices"

    def at_least(self, version: str, what: str, is_used: bool) -> None:
        if is_used and _VERSIONS.index(version) > self._least:
            self._least, self._what = _VERSIONS.index(version), what

    def require(self, version: str) -> None:
        if _VERSIONS.index(version) < self._least:
            raise Wrong(f"cdiVersion {version} has no {self._what}: that came with {_VERSIONS[self._least]}")


class _Object:
    """A mapping whose keys are asked for one by one; one that nobody asked for is an error.

    Go's encoding/json takes keys in any case, so files have them so.
    """

    def __init__(self, value: Value, where: str) -> None:
        if not isinstance(value, dict):
            raise Wrong(f"{where} is no mapping")
        self.where = where
        self._left: dict[str, tuple[str, Value]] = {}
        for key, item in value.items():
            if key.lower() in self._left:
                raise Wrong(f"{where}: {key[:80]!r} is there twice")
            self._left[key.lower()] = (key, item)

    def take(self, key: str) -> Value:
        """None for what is not there, as for null."""
        return self._left.pop(key.lower(), (key, None))[1]

    def close(self) -> None:
        for key, _ in self._left.values():
            raise Wrong(f"{self.where}: {key[:80]!r} is no key of CDI")

    def text(self, key: str) -> str:
        value = self.take(key)
        return "" if value is None else _text(value, f"{self.where}: {key}")

    def texts(self, key: str) -> tuple[str, ...]:
        return tuple(
            "" if item is None else _text(item, f"{self.where}: {key}[{index}]")
            for index, item in enumerate(self._list(key))
        )

    def number(self, key: str, low: int, high: int) -> int | None:
        value = self.take(key)
        if value is None:
            return None
        return _number(value, low, high, f"{self.where}: {key}")

    def numbers(self, key: str, low: int, high: int) -> tuple[int, ...]:
        return tuple(
            0 if item is None else _number(item, low, high, f"{self.where}: {key}[{index}]")
            for index, item in enumerate(self._list(key))
        )

    def flag(self, key: str) -> bool:
        value = self.take(key)
        if value is not None and not isinstance(value, bool):
            raise Wrong(f"{self.where}: {key} is neither true nor false")
        return bool(value)

    def object(self, key: str) -> _Object | None:
        value = self.take(key)
        return None if value is None else _Object(value, key if self.where == "the file" else f"{self.where}: {key}")

    def objects(self, key: str) -> Iterator[_Object]:
        where = "" if self.where == "the file" else f"{self.where}: "
        for index, item in enumerate(self._list(key)):
            yield _Object(item, f"{where}{key}[{index}]")

    def annotations(self) -> bool:
        """Whether there are any; they mean nothing to a container."""
        value = self.object("annotations")
        if value is None:
            return False
        keys = [key for key, _ in value._left.values()]
        for key in keys:
            value.text(key)
        return bool(keys)

    def _list(self, key: str) -> list[Value]:
        value = self.take(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise Wrong(f"{self.where}: {key} is no list")
        return value


def _text(value: Value, where: str) -> str:
    text = as_text(value)
    if text is None:
        raise Wrong(f"{where} is no text")
    # A NUL ends a word of the kernel's, and half of a surrogate pair is no character at all.
    if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
        raise Wrong(f"{where} has a character that cannot be")
    return text


def _number(value: Value, low: int, high: int, where: str) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise Wrong(f"{where} is no whole number")
    if not low <= value <= high:
        raise Wrong(f"{where} is not between {low} and {high}")
    return value


def _device(one: _Object, needs: _Needs) -> Device:
    name = one.text("name")
    if not _DEVICE.fullmatch(name):
        raise Wrong(f"{one.where}: {name[:80]!r} is no name of a device (letters, digits, and _ - . : within)")
    needs.at_least("0.5.0", "devices whose names begin with a digit", name[0].isdigit())
    needs.at_least("0.6.0", "annotations", one.annotations())
    edits = _edits(one.object("containerEdits"), needs)
    one.close()
    if edits == Edits():
        raise Wrong(f"{one.where}: device {name!r} has no containerEdits")
    return Device(name=name, edits=edits)


def _edits(one: _Object | None, needs: _Needs) -> Edits:
    if one is None:
        return Edits()
    edits = Edits(
        env=tuple(_variable(entry, one.where) for entry in one.texts("env")),
        device_nodes=tuple(_node(node, needs) for node in one.objects("deviceNodes")),
        net_devices=tuple(_net_device(net) for net in one.objects("netDevices")),
        mounts=tuple(_mount(mount, needs) for mount in one.objects("mounts")),
        hooks=tuple(_hook(hook) for hook in one.objects("hooks")),
        has_intel_rdt=_intel_rdt(one.object("intelRdt"), needs),
        gids=one.numbers("additionalGids", 0, 2**32 - 1),
    )
    one.close()
    needs.at_least("1.1.0", "netDevices", bool(edits.net_devices))
    needs.at_least("0.7.0", "additionalGids", bool(edits.gids))
    for names in ([net.host_interface for net in edits.net_devices], [net.name for net in edits.net_devices]):
        if len(set(names)) != len(names):
            raise Wrong(f"{one.where}: netDevices name an interface twice")
    return edits


def _variable(entry: str, where: str) -> tuple[str, str]:
    name, equals, value = entry.partition("=")
    if not equals or not name:
        raise Wrong(f"{where}: {entry[:80]!r} is no variable (NAME=value)")
    return name, value


def _node(one: _Object, needs: _Needs) -> DeviceNode:
    node = DeviceNode(
        path=one.text("path"),
        host_path=one.text("hostPath"),
        type=one.text("type"),
        major=one.number("major", -(2**63), 2**63 - 1) or 0,
        minor=one.number("minor", -(2**63), 2**63 - 1) or 0,
        permissions=one.text("permissions"),
    )
    # Nodes are not made here, so their owner and mode are nobody's.
    for key in ("fileMode", "uid", "gid"):
        one.number(key, 0, 2**32 - 1)
    one.close()
    needs.at_least("0.5.0", "hostPath of device nodes", node.host_path != "")
    if not node.path:
        raise Wrong(f"{one.where} has no path")
    if node.type not in ("", "b", "c", "u", "p"):
        raise Wrong(f"{one.where}: type {node.type[:20]!r} is none of b, c, u, p")
    if node.permissions != "none" and node.permissions.strip("rwm"):
        raise Wrong(f"{one.where}: permissions {node.permissions[:20]!r} are not of r, w, m, nor none")
    return node


def _net_device(one: _Object) -> NetDevice:
    net = NetDevice(host_interface=one.text("hostInterfaceName"), name=one.text("name"))
    one.close()
    if not net.host_interface or not net.name:
        raise Wrong(f"{one.where} lacks hostInterfaceName or name")
    return net


def _mount(one: _Object, needs: _Needs) -> Mount:
    mount = Mount(
        host_path=one.text("hostPath"),
        container_path=one.text("containerPath"),
        type=one.text("type"),
        options=one.texts("options"),
    )
    one.close()
    needs.at_least("0.4.0", "type of mounts", mount.type != "")
    if not mount.host_path or not mount.container_path:
        raise Wrong(f"{one.where} lacks hostPath or containerPath")
    return mount


def _hook(one: _Object) -> Hook:
    hook = Hook(
        stage=one.text("hookName"),
        path=one.text("path"),
        args=one.texts("args"),
        env=one.texts("env"),
        timeout=one.number("timeout", -(2**63), 2**63 - 1),
    )
    one.close()
    if hook.stage not in _STAGES:
        raise Wrong(f"{one.where}: hookName {hook.stage[:40]!r} is none of {', '.join(_STAGES)}")
    if not hook.path:
        raise Wrong(f"{one.where} has no path")
    for entry in hook.env:
        _variable(entry, one.where)
    return hook


def _intel_rdt(one: _Object | None, needs: _Needs) -> bool:
    """Whether there is any. Its words are read for their form: programs stay in the resctrl group of their job."""
    if one is None:
        return False
    clos = one.text("closID")
    one.text("l3CacheSchema")
    one.text("memBwSchema")
    schemata = one.take("schemata")
    if schemata is not None:
        _Object({"schemata": schemata}, one.where).texts("schemata")
    is_monitoring = one.flag("enableMonitoring")
    one.close()
    needs.at_least("0.7.0", "intelRdt", True)
    needs.at_least("1.1.0", "schemata and enableMonitoring of intelRdt", schemata is not None or is_monitoring)
    if clos != "/" and (len(clos) >= 4096 or clos in (".", "..") or "/" in clos or "\n" in clos):
        raise Wrong(f"{one.where}: closID is no name of a directory")
    return True
