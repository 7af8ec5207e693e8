"""The program of tests/native/spawn.c, compiled with this host's Open MPI, and what it prints."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "native/spawn.c"


def compiled(directory: Path) -> Path:
    """The program in DIRECTORY, for everyone to run."""
    program = directory / "spawn"
    subprocess.run(["mpicc.openmpi", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-o", program, SOURCE], check=True)
    return program


@dataclass(frozen=True, kw_only=True)
class Spawned:
    """One run: where the parent was, where its children were, and whether they computed together."""

    parent: str
    children: tuple[str, ...]
    sum: int

    @classmethod
    def parse(cls, output: bytes) -> Spawned:
        parent = re.search(rb"role=parent root=(\w+) children=\d+ sum=(\d+)", output)
        assert parent is not None, output
        children = re.findall(rb"role=child root=(\w+)", output)
        return cls(parent=parent[1].decode(), children=tuple(child.decode() for child in children), sum=int(parent[2]))
