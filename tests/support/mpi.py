"""MPI jobs of tests: command lines of both families' launchers, and what tests/programs report."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from tests.support.images import PROGRAMS_IN_IMAGE, native_programs

Family = Literal["openmpi", "mpich"]
Program = Literal["report", "pingpong"]


@cache
def open_mpi_version() -> tuple[int, ...]:
    """Version of the host's Open MPI, as (4, 1, 4)."""
    printed = subprocess.run(["mpirun.openmpi", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\d+(\.\d+)+", printed)
    assert found is not None, printed
    return tuple(int(part) for part in found[0].split("."))


def mpirun(ranks: int, *command: str, flags: Sequence[str] = ()) -> list[str]:
    """Open MPI's launcher of the host.

    A program of Open MPI 4 under the mpirun of Open MPI 5 takes itself for a job of one, in a container or not, unless
    it is told of a daemon (check_launch_environment in Open MPI 4's orte/mca/schizo); nobody need listen there.
    """
    told = ["-x", "OMPI_MCA_orte_local_daemon_uri=0.0;tcp://127.0.0.1:1"] if open_mpi_version() >= (5,) else []
    return ["mpirun.openmpi", "-n", str(ranks), "--oversubscribe", *told, *flags, *command]


def mpiexec(ranks: int, *command: str, flags: Sequence[str] = ()) -> list[str]:
    """MPICH's launcher Hydra of the host; bootstrap `fork` starts local ranks itself, whatever scheduler is about."""
    return ["mpiexec.hydra", "-bootstrap", "fork", "-n", str(ranks), *flags, *command]


LAUNCHERS: dict[Family, Callable[..., list[str]]] = {"openmpi": mpirun, "mpich": mpiexec}


def native(family: Family, program: Program) -> str:
    """The program of this host."""
    return str(native_programs() / family / program)


def contained(family: Family, program: Program) -> str:
    """The program inside the debian images."""
    return str(PROGRAMS_IN_IMAGE / family / program)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one rank of `report` says; see tests/programs/report.c."""

    rank: int
    size: int
    sum: int
    pid: int
    uid: int
    affinity: frozenset[int]
    node_ranks: int
    cma: str
    host: str
    library: str

    @classmethod
    def parse(cls, line: str) -> Report:
        found = re.fullmatch(
            r"rank=(\d+) size=(\d+) sum=(\d+) pid=(\d+) uid=(\d+) affinity=([\d,]*) "
            r"node_ranks=(\d+) cma=(.*?) host=(\S+) library=(.*)",
            line,
        )
        assert found is not None, f"no report: {line!r}"
        rank, size, total, pid, uid, affinity, node_ranks, cma, host, library = found.groups()
        return cls(
            rank=int(rank),
            size=int(size),
            sum=int(total),
            pid=int(pid),
            uid=int(uid),
            affinity=frozenset(int(cpu) for cpu in affinity.split(",")),
            node_ranks=int(node_ranks),
            cma=cma,
            host=host,
            library=" ".join(library.split()),
        )


def reports(output: bytes) -> tuple[Report, ...]:
    """The reports in the output of a job, ordered by rank; other lines are not the programs'."""
    lines = [line for line in output.decode().splitlines() if line.startswith("rank=")]
    return tuple(sorted((Report.parse(line) for line in lines), key=lambda report: report.rank))


def require_one_job(found: Sequence[Report], ranks: int) -> None:
    """All ranks found each other and computed together: no job of `ranks` jobs of one."""
    assert [report.rank for report in found] == list(range(ranks)), found
    assert {report.size for report in found} == {ranks}, found
    assert {report.sum for report in found} == {ranks * (ranks + 1) // 2}, found
    assert len({report.pid for report in found}) == ranks, found


@dataclass(frozen=True, kw_only=True)
class PingPong:
    """What `pingpong` measured: milliseconds, microseconds, 10^6 bytes a second."""

    init_ms: float
    latency_us: float
    bandwidth_mb_s: float

    @classmethod
    def parse(cls, output: bytes) -> PingPong:
        found = re.search(rb"init_ms=([\d.]+) latency_us=([\d.]+) bandwidth_mb_s=([\d.]+)", output)
        assert found is not None, f"no measurement: {output!r}"
        return cls(init_ms=float(found[1]), latency_us=float(found[2]), bandwidth_mb_s=float(found[3]))

    def compared_with(self, native: PingPong) -> str:
        """One line: own numbers and their ratio to the native ones."""
        return (
            f"init {self.init_ms:.1f} ms ({self.init_ms / native.init_ms:.2f} of native), "
            f"latency {self.latency_us:.3f} us ({self.latency_us / native.latency_us:.2f}), "
            f"bandwidth {self.bandwidth_mb_s:.0f} MB/s ({self.bandwidth_mb_s / native.bandwidth_mb_s:.2f})"
        )


def cpus() -> frozenset[int]:
    """The processors these tests may use."""
    return frozenset(os.sched_getaffinity(0))


def script(directory: Path, name: str, text: str) -> Path:
    """An executable shell script everyone may run, for what a launcher can only start as one program."""
    file = directory / name
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file
