"""The capabilities the engine needs, demanded at its start and not missed at the first launch.

``etc/systemd/hpcctr-engine.service`` gives exactly these.
"""

from __future__ import annotations

import os

from hpcctr.context import read_status
from hpcctr.errors import CapabilitiesMissing

#: Bit (linux/capability.h) and use of each.
NEEDED = {
    "CAP_DAC_OVERRIDE": (1, "a storekeeper goes to its user's cgroup, which may have been delegated to them"),
    "CAP_KILL": (5, "a storekeeper that does not end is another account's process by then"),
    "CAP_SETGID": (6, "the store is read, and images are fetched and converted, as other accounts"),
    "CAP_SETUID": (7, "the store is read, and images are fetched and converted, as other accounts"),
    "CAP_SETPCAP": (8, "the converter empties its bounding set"),
    "CAP_SYS_PTRACE": (19, "who asks, and who is inside, is read below /proc/PID of other users' processes"),
    "CAP_SYS_ADMIN": (21, "images and upper layers are mounted, and the converter gets namespaces of its own"),
    "CAP_SYS_NICE": (23, "a storekeeper takes over the niceness of its user's process"),
}


def require_capabilities() -> None:
    """Raise :class:`CapabilitiesMissing` unless this process has all of them, and what it starts can have them."""
    status = read_status(os.getpid())
    # A program of root's gets, at execve(2), what is in the bounding set: capabilities(7).
    mine = int(status["CapEff"], 16) & int(status["CapBnd"], 16)
    missing = {name: use for name, (bit, use) in NEEDED.items() if not mine >> bit & 1}
    if missing:
        uses = "; ".join(f"{name}: {use}" for name, use in missing.items())
        raise CapabilitiesMissing(
            f"the engine was started without {', '.join(missing)} ({uses})",
            hint="in its unit: CapabilityBoundingSet= of etc/systemd/hpcctr-engine.service; docs/install.md",
        )
