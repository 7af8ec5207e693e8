"""The section ``mounts``: what a runtime cannot build a container without, and what the site adds of the host's.

Everything a program sees of the host beyond that comes with the caller: enter covers /proc and /dev with the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec


class BindMount(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file or directory of the host's in a container: a mount edit whose places have been found."""

    #: On the host, without symbolic links.
    source: str
    #: Inside, where the image and its upper layer have a plain mount point and no link on the way.
    target: str
    kind: Literal["d", "f"]
    #: Of a file these hold what the host's own mount of it has, too.
    is_read_only: bool
    is_noexec: bool
    #: Of the source (:func:`hpcctr.host.trusted.identity_of`).
    identity: str
    #: What names it: a file of the site's.
    origin: str


def mounts(binds: Sequence[BindMount] = ()) -> list[dict[str, object]]:
    """The section. ``binds`` have outer targets before inner ones.

    /proc: runc finds its own descriptors in /proc/self/fd of the new root ("error closing exec fds" without it).
    The instance shows a process nothing but itself, in case it is ever uncovered (procfs.rst: hidepid, subset).
    /dev: runc makes nodes in it and reopens /dev/null there; on the image's own /dev that would be the image's file.
    """
    section: list[dict[str, object]] = [
        {
            "destination": "/proc",
            "type": "proc",
            "source": "proc",
            "options": ["nosuid", "nodev", "noexec", "hidepid=2", "subset=pid"],
        },
        {
            "destination": "/dev",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "noexec", "ro", "mode=755", "size=64k"],
        },
    ]
    for bind in binds:
        section.append({"destination": bind.target, "type": "bind", "source": bind.source, "options": _options(bind)})
    return section


def _options(bind: BindMount) -> list[str]:
    """What is mounted below a directory comes with it: else what root has covered there would be seen.

    The options that begin with ``r`` (runtime-spec, "Linux mount options") are for all of it, and add to what the host
    has set. The others are for one mount, and take away what is not among them; crun has only those for files.
    """
    restrictions = ["nosuid", "nodev"]
    if bind.is_read_only:
        restrictions.append("ro")
    if bind.is_noexec:
        restrictions.append("noexec")
    if bind.kind == "d":
        return ["rbind", "rprivate", *("r" + word for word in restrictions)]
    return ["bind", "private", *restrictions]
