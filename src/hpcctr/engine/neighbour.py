"""containerd as the engine's neighbour: what the engine mounts, containerd must see."""

from __future__ import annotations

import os
import socket
import struct

from hpcctr.errors import ContainerdUnavailable


def require_common_mounts(containerd_socket: str) -> None:
    """Raise :class:`ContainerdUnavailable` when containerd runs in another mount namespace than this process.

    It would look for image mounts and upper layers where there are none, and fail with "no such file or directory".
    A containerd that does not answer, or cannot be looked at, is left to the first call to name.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(containerd_socket)
        except OSError:
            return
        # Who called listen(2): unix(7), SO_PEERCRED.
        pid, _, _ = struct.unpack("iII", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        its, ours = os.stat(f"/proc/{pid}/ns/mnt"), os.stat("/proc/self/ns/mnt")
    except OSError:
        return
    if not os.path.samestat(its, ours):
        raise ContainerdUnavailable(
            f"containerd on {containerd_socket} (pid {pid}) is in another mount namespace than this process",
            hint=f"start it there: nsenter --mount --target {pid} hpcctr …; in units no PrivateTmp=, ProtectSystem= "
            "and the like",
        )
