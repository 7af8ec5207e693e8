"""The processes of this machine, from /proc (proc(5))."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

#: A program of Python's whose first thread ends at once; another prints a line and waits for the end of its input.
ENDED_LEADER = """
import ctypes, os, sys, threading
def work():
    print(flush=True)
    sys.stdin.read()
    os._exit(0)
threading.Thread(target=work).start()
ctypes.CDLL(None).pthread_exit(None)
"""


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process at the moment it was read. `start` (clock ticks since boot) and `pid` together are unique."""

    pid: int
    ppid: int
    start: int
    state: str
    uid: int
    name: str
    mount_namespace: int
    environment: bytes
    command: str

    @classmethod
    def read(cls, pid: int) -> Process:
        """Raise FileNotFoundError or ProcessLookupError when it has ended meanwhile."""
        place = Path(f"/proc/{pid}")
        name, _, rest = (place / "stat").read_text(errors="replace").partition("(")[2].rpartition(")")
        fields = rest.split()
        state, ppid, start = fields[0], int(fields[1]), int(fields[19])
        try:
            mount_namespace = os.stat(place / "ns/mnt").st_ino
        except OSError:
            # A zombie has none.
            mount_namespace = 0
        try:
            environment = (place / "environ").read_bytes()
        except OSError:
            environment = b""
        return cls(
            pid=pid,
            ppid=ppid,
            start=start,
            state=state,
            uid=place.stat().st_uid,
            name=name,
            mount_namespace=mount_namespace,
            environment=environment,
            command=(place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip(),
        )

    @property
    def is_zombie(self) -> bool:
        return self.state in "ZX"

    def environment_has(self, assignment: str) -> bool:
        return assignment.encode() in self.environment.split(b"\0")

    def __str__(self) -> str:
        return f"{self.pid} {self.name} ({self.command or 'no command line'}), state {self.state}, uid {self.uid}"


def processes() -> tuple[Process, ...]:
    """Every process of the machine, kernel threads excepted."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            process = Process.read(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
        # kthreadd is 2, and every kernel thread is its child.
        if process.pid != 2 and process.ppid != 2:
            found.append(process)
    return tuple(found)
