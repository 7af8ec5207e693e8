"""scripts/bench slurm: how long it takes from srun until MPI_Init has ended on every rank, in containers and natively,
and what ranks ask of the shared filesystem.

The same program of Open MPI is started both ways in turns, so that the machine's other work meets both alike.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.cluster import Cluster, cluster
from tests.support import images
from tests.support.mpi import open_mpi_version
from tests.support.polling import wait_until
from tests.support.scratch import scratch
from tests.support.users import User, users

HOSTS = (1, 2, 4, 8)
RANKS = {1: (1, 2, 4, 8, 16, 32, 64), 2: (1, 2, 4, 8), 4: (1, 2, 4, 8), 8: (1, 2, 4, 8)}
"""Hosts to ranks a host. Beyond the machine's processors it is Slurm's --overcommit and everyone's waiting."""

# Ranks that wait give way, or a machine with fewer processors than ranks measures its time slices.
_ENV = {"OMPI_MCA_mpi_yield_when_idle": "1"}
_NAME = "localhost/bench:1"


@dataclass(kw_only=True)
class Measured:
    """Milliseconds of each run, of one layout."""

    hosts: int
    ranks: int
    native: list[float] = field(default_factory=list)
    contained: list[float] = field(default_factory=list)

    def row(self) -> str:
        native, contained = statistics.median(self.native), statistics.median(self.contained)
        # Neighbours in time, so that each pair met the same machine.
        ratio = statistics.median(b / a for a, b in zip(self.native, self.contained, strict=True))
        return f"| {self.hosts} | {self.ranks} | {native:.0f} | {contained:.0f} | {ratio:.2f} | {len(self.native)} |"


def _initialised(on: Cluster, user: User, hosts: int, ranks: int, words: Sequence[str]) -> float:
    """Milliseconds from srun's start to the last rank's end of MPI_Init."""
    layout = [f"-N{hosts}", f"-n{hosts * ranks}", "--distribution=cyclic", "--overcommit", "--mpi=pmix"]
    start = time.monotonic_ns()
    done = on.srun(*layout, *words, user=user, env=_ENV, timeout=180)
    ends = [int(end) for end in re.findall(rb"initialised (\d+) of %d\n" % (hosts * ranks), done.stdout)]
    assert len(ends) == hosts * ranks, done.stdout
    return (max(ends) - start) / 1e6


def _compiled(user: User) -> str:
    """The program, in the user's home: one file for both ways."""
    binary = Path(user.home) / "init"
    source = Path(__file__).with_name("init.c")
    subprocess.run(["mpicc.openmpi", "-std=gnu11", "-O2", "-o", binary, source], check=True, capture_output=True)
    return str(binary)


def _operations(on: Cluster, user: User, image: str) -> str:
    """Markdown: operations the filesystem was asked for by the first rank of a node, and by those after it."""
    assert on.gluster is not None
    node = on.nodes["n2"]
    command = on.inside(image, "true")
    # As etc/slurm/task-prolog says it, or Slurm itself.
    env = {"HPCCTR_AS_OF": str(int(time.time()))}
    rows = []
    with on.gluster.counting() as counter:
        for what, ranks in (("first rank of a node", 1), ("64 further ranks of it", 64)):
            on.srun("-w", "n2", f"-n{ranks}", "--overcommit", *command, user=user, env=env, timeout=180)
            counts = counter.counted()
            shown = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()) if count) or "none"
            rows.append(f"| {what} | {counts.get('OPEN', 0)} | {sum(counts.values())} | {shown} |")
            assert node.containerd.containers()
    head = ["| | files opened | operations | which |", "|---|---|---|---|"]
    return "\n".join([*head, *rows])


def slurm(rounds: int) -> str:
    """Markdown: both tables."""
    image = images.debian_mpi("trixie" if open_mpi_version() >= (5,) else "bookworm")
    measured = []
    with (
        scratch("bench") as root,
        users("hpcctr-bench") as (user,),
        cluster(
            root, nodes=max(HOSTS), store="gluster", memory_mb=4000, conf="DefMemPerNode=3000", linger_seconds=600
        ) as on,
    ):
        program = _compiled(user)
        on.nodes["n1"].hpcctr("pull", "--name", _NAME, image)
        image = _NAME
        operations = _operations(on, user, image)
        # Node containers everywhere.
        on.srun(f"-N{max(HOSTS)}", *on.inside(image, "true"), user=user)
        for hosts in HOSTS:
            for ranks in RANKS[hosts]:
                layout = Measured(hosts=hosts, ranks=ranks)
                for number in range((rounds if hosts * ranks <= 8 else max(3, rounds // 3)) + 1):
                    for samples, words in (
                        (layout.native, [program]),
                        (layout.contained, on.inside(image, program)),
                    ):
                        sample = _initialised(on, user, hosts, ranks, words)
                        # The first round fills caches; it is nobody's number.
                        if number:
                            samples.append(sample)
                measured.append(layout)
        wait_until(lambda: set(on.slurm.states().values()) == {"idle"}, seconds=60, what="idle nodes")
    head = ["| hosts | ranks a host | native, ms | hpcctr, ms | ratio | runs |", "|---|---|---|---|---|---|"]
    table = "\n".join([*head, *(each.row() for each in measured)])
    return "\n\n".join(
        ["From srun to the end of MPI_Init on the last rank:", table, "Asked of the shared filesystem:", operations]
    )
