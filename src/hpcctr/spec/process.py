"""The section ``process``: whom the anchor runs as, with nothing to gain.

The anchor is the init of the container, waiting to be started for ever. It has the caller's identity so that it counts
as the caller's (OOM, quota) and so that nothing runs as root beside a user's programs.
"""

from __future__ import annotations

from hpcctr.context import Caller

#: The file at the root of every node container that the spec names as program: runtimes check that it exists and may be
#: executed. It is empty, so that even a started task could run nothing (execve: ENOEXEC).
ANCHOR = "/.hpcctr-anchor"
_CAPABILITY_SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")


def process(caller: Caller) -> dict[str, object]:
    """The section for a caller. The primary group is among the supplementary ones, as after a login."""
    return {
        "user": {
            "uid": caller.uid,
            "gid": caller.gid,
            "additionalGids": sorted({caller.gid, *caller.groups}),
        },
        "args": [ANCHOR],
        "env": [],
        "cwd": "/",
        "capabilities": {name: [] for name in _CAPABILITY_SETS},
        "noNewPrivileges": True,
        # Left out, the value of containerd's shim would stay: -998 under systemd.
        "oomScoreAdj": 0,
    }
