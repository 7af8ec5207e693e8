"""Mount tables as the kernel shows them: /proc/PID/mountinfo (proc(5))."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Mount:
    """One line of mountinfo; `device` is major:minor, `root` the path within the filesystem, `tags` the propagation."""

    device: str
    root: str
    target: str
    options: str
    tags: tuple[str, ...]
    kind: str
    source: str

    def __str__(self) -> str:
        return f"{self.kind} {self.source} on {self.target}"


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def read_mountinfo(file: Path = Path("/proc/self/mountinfo")) -> tuple[Mount, ...]:
    """All mounts of a namespace, in the kernel's order."""
    mounts = []
    # Names may hold any end of line that Python knows, but for "\n", which the kernel escapes.
    for line in file.read_bytes().decode(errors="surrogateescape").removesuffix("\n").split("\n"):
        before, _, after = line.partition(" - ")
        _, _, device, root, target, options, *tags = before.split(" ")
        kind, source, *_ = after.split(" ")
        mounts.append(
            Mount(
                device=device,
                root=_unescape(root),
                target=_unescape(target),
                options=options,
                tags=tuple(tags),
                kind=kind,
                source=_unescape(source),
            )
        )
    return tuple(mounts)
