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
from collections.abc import Callable, Iterator

from hpcctr.context import read_status
from hpcctr.engine.mounts import unmount
from hpcctr.mounttable import cgroup_hierarchies, read_mounts
from hpcctr.spec.linux import cgroup_of

#: Where shims have runc and crun keep their state (containerd, pkg/process, RuncRoot), by containerd's namespace.
_RUNTIME_ROOT = "/run/containerd/runc/hpcctr"
_RUNTIME_SECONDS = 10.0
#: Seconds for killed processes to leave a cgroup.
_CGROUP_SECONDS = 2.0


def clear_remains(container_id: str, *, runtime: str) -> None:
    """Remove what is left; what cannot be removed stays. Raises nothing: there is nobody to whom it would matter."""
    _kill_shims(container_id)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        _clear_runtime_state(container_id, runtime)
    with contextlib.suppress(OSError):
        for entry in reversed(read_mounts()):
            if any(option.endswith(f"/containers/{container_id}/upper") for option in entry.super_options):
                unmount(entry.target)
        for directory in _cgroups_of(container_id):
            _clear_cgroup(directory)


def _kill_shims(container_id: str) -> None:
    for name in os.listdir("/proc"):
        if name.isdigit():
            _kill_if(int(name), lambda pid: _is_shim(pid, os.fsencode(container_id)))


def _is_shim(pid: int, wanted: bytes) -> bool:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        words = file.read(4096).split(b"\0")
    is_called_so = os.path.basename(words[0]).startswith(b"containerd-shim-")
    # What users write into command lines counts for nothing, not even into that of a set-user-ID program.
    return (
        is_called_so
        and words[words.index(b"-id") + 1] == wanted
        and read_status(pid)["Uid"].split() == ["0", "0", "0", "0"]
    )


def _kill_if(pid: int, is_meant: Callable[[int], bool]) -> None:
    """Kill the very process that was looked at: it may end at any time, and its number be another's."""
    with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
        pidfd = os.pidfd_open(pid)
        try:
            if is_meant(pid):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)


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
    for top in set(cgroup_hierarchies(read_mounts()).values()):
        directory = top + cgroup_of(container_id)
        if os.path.isdir(directory):
            yield directory


def _clear_cgroup(directory: str) -> None:
    """Only an anchor has ever been in it."""
    late = time.monotonic() + _CGROUP_SECONDS
    while time.monotonic() < late:
        for pid in _pids_in(directory):
            _kill_if(pid, lambda pid: pid in _pids_in(directory))
        try:
            os.rmdir(directory)
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.02)
        else:
            return


def _pids_in(directory: str) -> set[int]:
    with contextlib.suppress(OSError, ValueError), open(f"{directory}/cgroup.procs", encoding="ascii") as file:
        return set(map(int, file))
    return set()
