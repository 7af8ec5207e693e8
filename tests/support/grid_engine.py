"""Grid Engine for tests: master and execution daemon of one Host, without an init system, from Debian's packages."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.host import Host
from tests.support.polling import wait_until
from tests.support.users import User

NAME = "n1"
_ADDRESS = "192.0.2.1"
_ENVIRONMENT = {"SGE_ROOT": "/var/lib/gridengine", "SGE_CELL": "default", "SGE_ND": "1"}
_STATE = ("/var/lib/gridengine", "/var/spool/gridengine")

# What is not named here is as Debian's configuration or the daemon itself has it: sge_pe(5), queue_conf(5).
_PARALLEL = """
pe_name            mpi
slots              99
user_lists         NONE
xuser_lists        NONE
start_proc_args    NONE
stop_proc_args     NONE
allocation_rule    $fill_up
control_slaves     TRUE
job_is_first_task  FALSE
urgency_slots      min
accounting_summary FALSE
qsort_args         NONE
"""


@dataclass(frozen=True, kw_only=True)
class GridEngine:
    """The running daemons of one Host, which is where commands are given and jobs run."""

    host: Host

    def run(
        self, argv: Sequence[str], *, user: User | None = None, env: Mapping[str, str] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[bytes]:
        """A command of Grid Engine's to its end."""
        return self.host.run(argv, user=user, env={**_ENVIRONMENT, **(env or {})}, check=check)

    def submit(self, *words: str, user: User, env: Mapping[str, str] | None = None, status: int = 0) -> str:
        """`qsub WORDS` until the job has ended with ``status``; what it printed."""
        output = user.home / "grid-engine.out"
        self.host.run(["rm", "-f", str(output)], user=user)
        argv = ["qsub", "-sync", "y", "-j", "y", "-o", str(output), "-V", *words]
        done = self.run(argv, user=user, env=env, check=False)
        printed = self.host.run(["cat", str(output)], user=user, check=False).stdout.decode(errors="replace")
        assert done.returncode == status, f"{done}\n{printed}"
        return printed


def _prepare(host: Host, root: Path) -> None:
    (root / "hosts").write_text(f"127.0.0.1 localhost\n{_ADDRESS} {NAME}\n")
    host.run(["mount", "--bind", str(root / "hosts"), "/etc/hosts"])
    wire = f"ip link add wire type bridge && ip address add {_ADDRESS}/24 dev wire && ip link set wire up"
    host.run(["sh", "-c", wire])
    for directory in _STATE:
        copy = root / directory.replace("/", ".").lstrip(".")
        host.run(["cp", "-a", directory, str(copy)])
        host.run(["mount", "--bind", str(copy), directory])
    Path(root / "var.lib.gridengine/default/common/act_qmaster").write_text(f"{NAME}\n")


def _set_up(engine: GridEngine, root: Path, slots: int) -> None:
    def edited(show: str, changes: Mapping[str, str]) -> Path:
        lines = engine.run(["qconf", *show.split()]).stdout.decode().replace("\\\n", " ").splitlines()
        kept = [line for line in lines if line.split() and line.split()[0] not in changes]
        file = root / "qconf"
        file.write_text("\n".join([*kept, *(f"{name} {value}" for name, value in changes.items()), ""]))
        return file

    engine.run(["qconf", "-as", NAME])
    hosts = edited("-se template", {"hostname": NAME})
    engine.run(["qconf", "-Ae", str(hosts)], check=False)
    # Jobs begin at once instead of every quarter of a minute: sched_conf(5).
    quick = {"schedule_interval": "0:0:1", "flush_submit_sec": "1", "flush_finish_sec": "1"}
    engine.run(["qconf", "-Msconf", str(edited("-ssconf", quick))])
    (root / "parallel").write_text(_PARALLEL)
    engine.run(["qconf", "-Ap", str(root / "parallel")])
    queue = {
        "qname": "all.q", "hostlist": NAME, "slots": str(slots), "pe_list": "mpi", "shell": "/bin/sh",
        "shell_start_mode": "unix_behavior", "load_thresholds": "NONE",
    }  # fmt: skip
    engine.run(["qconf", "-Aq", str(edited("-sq", queue))])


@contextlib.contextmanager
def grid_engine(root: Path, *, slots: int = 4) -> Iterator[GridEngine]:
    """Start a Host called n1 below ROOT with a queue of so many slots; it ends with its jobs."""
    with Host.start(root, own_network=True, hostname=NAME) as host:
        _prepare(host, root)
        engine = GridEngine(host=host)
        for daemon in ("sge_qmaster", "sge_execd"):
            with (root / f"{daemon}.log").open("wb") as log:
                host.popen([f"/usr/sbin/{daemon}"], env=_ENVIRONMENT, stdout=log, stderr=log)
            if daemon == "sge_qmaster":
                wait_until(lambda: engine.run(["qconf", "-sh"], check=False).returncode == 0, what="the master")
                _set_up(engine, root, slots)
        wait_until(
            lambda: b"lx-amd64" in engine.run(["qhost"]).stdout.split(b"n1")[-1],
            seconds=60,
            what=lambda: f"the node; {engine.run(['qhost']).stdout.decode()}",
        )
        yield engine
