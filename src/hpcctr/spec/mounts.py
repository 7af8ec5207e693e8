"""The section ``mounts``: only what a runtime cannot build a container without.

Everything a program sees of the host comes with the caller: enter covers both of these with the caller's own.
"""

from __future__ import annotations


def mounts() -> list[dict[str, object]]:
    """The section.

    /proc: runc finds its own descriptors in /proc/self/fd of the new root ("error closing exec fds" without it).
    The instance shows a process nothing but itself, in case it is ever uncovered (procfs.rst: hidepid, subset).
    /dev: runc makes nodes in it and reopens /dev/null there; on the image's own /dev that would be the image's file.
    """
    return [
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
