"""What containerd, its shims and the OCI runtime leave of a container when they are killed, or a call is broken off, in
the middle of it: containerd has no record of it any more, and nobody else knows its random id.

Everything is found by that id, after containerd has said that the container is gone. In the ordinary case nothing is.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator

from hpcctr.engine.mounts import read_mounts, unmount
from hpcctr.spec.linux import cgroup_of

#: Where shims have runc and crun keep their state (containerd, pkg/process, RuncRoot), by containerd's namespace.
_RUNTIME_ROOT = "/run/containerd/runc/hpcctr"
_RUNTIME_SECONDS = 10.0
#: Seconds for killed processes to leave a cgroup.
_CGROUP_SECONDS = 2.0


def clear_remains(container_id: str, *, runtime: str) -> None:
    """Remove what is left; what cannot be removed stays. Raises nothing: there is nobody to whom it would matter."""
    for pid in _shims_of(container_id):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        _clear_runtime_state(container_id, runtime)
    with contextlib.suppress(OSError):
        for entry in reversed(read_mounts()):
            if any(option.endswith(f"/containers/{container_id}/upper") for option in entry.super_options):
                unmount(entry.target)
        for directory in _cgroups_of(container_id):
            _clear_cgroup(directory)


def _shims_of(container_id: str) -> Iterator[int]:
    wanted = os.fsencode(container_id)
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        # It may end at any time; and what users write into their command lines counts for nothing.
        with contextlib.suppress(OSError, ValueError):
            with open(f"/proc/{name}/cmdline", "rb") as file:
                words = file.read(4096).split(b"\0")
            is_shim = os.path.basename(words[0]).startswith(b"containerd-shim-")
            if is_shim and words[words.index(b"-id") + 1] == wanted and os.stat(f"/proc/{name}").st_uid == 0:
                yield int(name)


def _clear_runtime_state(container_id: str, runtime: str) -> None:
    place = os.path.join(_RUNTIME_ROOT, container_id)
    if not os.path.isdir(place):
        return
    subprocess.run(
        [runtime, "--root", _RUNTIME_ROOT, "delete", "--force", container_id],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=_RUNTIME_SECONDS,
        check=False,
    )
    # Of a container whose state was not written yet the runtime knows nothing.
    shutil.rmtree(place, ignore_errors=True)


def _cgroups_of(container_id: str) -> Iterator[str]:
    for entry in read_mounts():
        directory = entry.target + cgroup_of(container_id)
        if entry.kind in ("cgroup", "cgroup2") and os.path.isdir(directory):
            yield directory


def _clear_cgroup(directory: str) -> None:
    """Only an anchor has ever been in it."""
    late = time.monotonic() + _CGROUP_SECONDS
    while time.monotonic() < late:
        with contextlib.suppress(OSError, ValueError), open(f"{directory}/cgroup.procs", encoding="ascii") as file:
            for line in file:
                os.kill(int(line), signal.SIGKILL)
        try:
            os.rmdir(directory)
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.02)
        else:
            return
