"""What becomes of a failed call: every gRPC status is one of hpcctr's errors."""

from __future__ import annotations

import grpc

from hpcctr.errors import (
    ContainerdFailed,
    ContainerdUnavailable,
    ContainerExists,
    ContainerNotFound,
    DeadlinePassed,
    HpcctrError,
)

_CLASSES: dict[grpc.StatusCode, type[HpcctrError]] = {
    grpc.StatusCode.CANCELLED: ContainerdUnavailable,
    grpc.StatusCode.UNKNOWN: ContainerdFailed,
    grpc.StatusCode.INVALID_ARGUMENT: ContainerdFailed,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlinePassed,
    grpc.StatusCode.NOT_FOUND: ContainerNotFound,
    grpc.StatusCode.ALREADY_EXISTS: ContainerExists,
    grpc.StatusCode.PERMISSION_DENIED: ContainerdFailed,
    grpc.StatusCode.UNAUTHENTICATED: ContainerdFailed,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ContainerdFailed,
    grpc.StatusCode.FAILED_PRECONDITION: ContainerdFailed,
    grpc.StatusCode.ABORTED: ContainerdFailed,
    grpc.StatusCode.OUT_OF_RANGE: ContainerdFailed,
    grpc.StatusCode.UNIMPLEMENTED: ContainerdFailed,
    grpc.StatusCode.INTERNAL: ContainerdFailed,
    grpc.StatusCode.UNAVAILABLE: ContainerdUnavailable,
    grpc.StatusCode.DATA_LOSS: ContainerdFailed,
}

#: Parts of the texts of containerd, its shim and the runtimes, and what an administrator can do about each.
_REMEDIES = (
    ("cgroup mounts", 'crun needs cgroup v2 only; set runtime = "runc" in /etc/hpcctr/site.toml'),
    ("cgroups in hybrid mode", 'crun needs cgroup v2 only; set runtime = "runc" in /etc/hpcctr/site.toml'),
    (
        "executable file not found in $PATH",
        "install that OCI runtime, or set runtime in /etc/hpcctr/site.toml",
    ),
    ("containerd-shim-runc-v2", "install containerd with its shim containerd-shim-runc-v2 in the daemon's PATH"),
    ("no space left on device", "make room below containerd's state directory, /run/containerd"),
)
_TEXT_MAX = 600


def of_rpc_error(error: grpc.RpcError, *, socket: str, what: str) -> HpcctrError:
    """The error that ``error`` means, for a call that was to do ``what`` (``create the task``)."""
    code: grpc.StatusCode = error.code()
    text = one_line(error.details() or code.name)
    cls = _CLASSES.get(code, ContainerdFailed)
    if cls is ContainerdUnavailable:
        return unavailable(socket, text.rpartition("last error: ")[2])
    if cls is DeadlinePassed:
        return DeadlinePassed(
            f"containerd did not {what} in time", hint=f"look at containerd on {socket}: journalctl -u containerd"
        )
    hint = next((remedy for part, remedy in _REMEDIES if part in text), "journalctl -u containerd")
    return cls(f"containerd did not {what}: {text}", hint=hint)


def unavailable(socket: str, reason: str) -> ContainerdUnavailable:
    """The error of a containerd that cannot be reached on ``socket``."""
    return ContainerdUnavailable(
        f"containerd does not answer on {socket}: {reason}",
        hint="systemctl start containerd, or set containerd.socket in /etc/hpcctr/site.toml",
    )


def one_line(untrusted_text: str) -> str:
    """A text of another program as one line of printable characters: it may quote what an image says."""
    text = "".join(character if character.isprintable() else " " for character in untrusted_text[: 2 * _TEXT_MAX])
    text = " ".join(text.split())
    return text if len(text) <= _TEXT_MAX else text[: _TEXT_MAX - 1] + "…"
