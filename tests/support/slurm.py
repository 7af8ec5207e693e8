"""Slurm for tests: munge, slurmctld and one slurmd a node, without an init system; each node is a Host.

Nodes have host names, addresses on a wire of their own, and their own /run, /tmp and /dev/shm: Open MPI chooses its
transports by host name and address, and names its rendezvous and shared-memory files after them. The spool directory
lies outside /tmp, so that what a step needs from it has to be carried in by name.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support import namespace_ids
from tests.support.host import Host
from tests.support.polling import wait_until
from tests.support.users import User

_CONF = """
ClusterName=hpcctr
SlurmctldHost=n1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/socket
StateSaveLocation={root}/slurm/state
SlurmdSpoolDir={root}/slurm/spool.%n
SlurmctldPidFile={root}/slurm/slurmctld.pid
SlurmdPidFile={root}/slurm/slurmd.%n.pid
SlurmctldLogFile={root}/slurm/slurmctld.log
SlurmdLogFile={root}/slurm/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
ProctrackType=proctrack/cgroup
TaskPlugin=task/affinity,task/cgroup
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
KillWait=5
MessageTimeout=30
InactiveLimit=0
SchedulerParameters=sched_interval=1,batch_sched_delay=0
PartitionName=all Nodes=ALL Default=YES MaxTime=10 State=UP OverSubscribe=FORCE:4
"""

_CGROUP_CONF = """
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
ConstrainCores=yes
ConstrainRAMSpace=yes
ConstrainDevices=yes
"""


@dataclass(kw_only=True)
class Slurm:
    """A running cluster. `nodes` maps node name to its Host; commands are given on the first."""

    root: Path
    nodes: Mapping[str, Host]
    daemons: list[subprocess.Popen[bytes]]

    @property
    def login(self) -> Host:
        return next(iter(self.nodes.values()))

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.root / "slurm/slurm.conf")}

    def run(
        self,
        argv: Sequence[str],
        *,
        user: User | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 90,
        check: bool | int = True,
    ) -> subprocess.CompletedProcess[bytes]:
        """A command of Slurm's, as `srun -n 2 hostname`, on the first node; a failure shows the daemons' logs."""
        try:
            return self.login.run(
                argv, user=user, env={**self.environment, **(env or {})}, timeout=timeout, check=check
            )
        except AssertionError as error:
            error.add_note(self.logs())
            raise

    def states(self) -> dict[str, str]:
        """Node name to state, as `idle`."""
        output = self.run(["sinfo", "--noheader", "--Node", "--format=%N %t"], check=False).stdout.decode()
        return dict(line.split() for line in output.splitlines() if line.strip())

    def wait_until_idle(self) -> None:
        """All nodes up and without a job, its cgroups and epilogue included."""
        wait_until(
            lambda: self.states() == dict.fromkeys(self.nodes, "idle"),
            seconds=60,
            what=lambda: f"idle nodes; {self.states()}\n{self.logs()}",
        )

    def logs(self, lines: int = 40) -> str:
        """The end of every daemon's log."""
        # A daemon that fails early has written to its standard error only.
        logs = [log for pattern in ("slurm/*.log", "munge/*.log") for log in sorted(self.root.glob(pattern))]
        logs += [output for output in sorted(self.root.glob("slurm/*.out")) if not output.with_suffix(".log").exists()]
        return "\n".join(
            f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) for log in logs
        )

    def stop(self) -> None:
        """End every job, then the daemons: node daemons first, munge last."""
        with contextlib.suppress(AssertionError):
            self.run(["scancel", "--user=root"], check=False, timeout=20)
            self.wait_until_idle()
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        _remove_cgroups()


def _remove_cgroups() -> None:
    """slurmd leaves the top of its tree in each hierarchy (cgroup/v1), as it would for the next slurmd."""
    for top in Path("/sys/fs/cgroup").glob("*/slurm*"):
        for directory, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                Path(directory).rmdir()


_PRIVATE_TMP = """
JobContainerType=job_container/tmpfs
PrologFlags=Contain
"""

_JOB_CONTAINER_CONF = """
AutoBasePath=true
BasePath=/run/slurm-tmp
"""


def _start_munge(host: Host, root: Path) -> subprocess.Popen[bytes]:
    directory = root / "munge"
    directory.mkdir(mode=0o755)
    key = directory / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    argv = [
        "munged",
        "--foreground",
        f"--socket={directory}/socket",
        f"--key-file={key}",
        f"--log-file={directory}/munged.log",
        f"--pid-file={directory}/munged.pid",
        f"--seed-file={directory}/munged.seed",
    ]
    with (directory / "munged.out").open("wb") as log:
        daemon = host.popen(argv, stdout=log, stderr=log)
    wait_until((directory / "socket").exists, what="munge's socket")
    return daemon


def _start_daemon(host: Host, root: Path, name: str, argv: Sequence[str]) -> subprocess.Popen[bytes]:
    with (root / f"slurm/{name}.out").open("wb") as log:
        return host.popen(argv, env={"SLURM_CONF": str(root / "slurm/slurm.conf")}, stdout=log, stderr=log)


def _wire(hosts: Mapping[str, Host]) -> None:
    """Connect the nodes by a bridge in the first one. 192.0.2.0/24 is for documentation (RFC 5737): nobody has it."""
    first, *others = hosts.values()
    first.run(["ip", "link", "add", "wire", "type", "bridge"])
    first.run(["ip", "address", "add", "192.0.2.1/24", "dev", "wire"])
    first.run(["ip", "link", "set", "wire", "up"])
    for number, other in enumerate(others, 2):
        near = f"to-n{number}"
        peer = ["peer", "name", "wire", "netns", str(other.holder.pid)]
        first.run(["ip", "link", "add", near, "type", "veth", *peer])
        first.run(["ip", "link", "set", near, "master", "wire", "up"])
        other.run(["ip", "address", "add", f"192.0.2.{number}/24", "dev", "wire"])
        other.run(["ip", "link", "set", "wire", "up"])


def _own_directories(host: Host, root: Path) -> None:
    for directory in ("/tmp", "/dev/shm"):
        host.run(["mount", "-t", "tmpfs", "-o", "mode=1777,nosuid,nodev", "tmpfs", directory])
    host.run(["mount", "--bind", str(root / "hosts"), "/etc/hosts"])


@contextlib.contextmanager
def slurm(root: Path, *, nodes: int = 1, memory_mb: int = 1500, private_tmp: bool = False) -> Iterator[Slurm]:
    """Start a cluster of so many nodes, called n1, n2 …, below ROOT; it ends with its jobs.

    With `private_tmp` each job has a /tmp of its own, in a mount namespace of its own (job_container/tmpfs).
    """
    names = [f"n{number}" for number in range(1, nodes + 1)]
    (root / "slurm/state").mkdir(mode=0o755, parents=True)
    lines = [f"192.0.2.{number} {name}" for number, name in enumerate(names, 1)]
    (root / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
    cpus = len(os.sched_getaffinity(0))
    described = f"NodeName=DEFAULT CPUs={cpus} RealMemory={memory_mb} State=UNKNOWN\n"
    with contextlib.ExitStack() as stack:
        # Cgroups are named after the nodes and the machine has one tree of them: one cluster at a time.
        lock = stack.enter_context((root.parent / "slurm.lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        hosts = {}
        for name in names:
            (root / name).mkdir(mode=0o755)
            (root / f"slurm/spool.{name}").mkdir(mode=0o755)
            with namespace_ids.lowest():
                host = Host.start(root / name, own_network=True, hostname=name)
            hosts[name] = stack.enter_context(host)
            _own_directories(hosts[name], root)
            described += f"NodeName={name}\n"
        _wire(hosts)
        described += _CONF.format(root=root) + (_PRIVATE_TMP if private_tmp else "")
        (root / "slurm/slurm.conf").write_text(described)
        (root / "slurm/job_container.conf").write_text(_JOB_CONTAINER_CONF)
        (root / "slurm/cgroup.conf").write_text(_CGROUP_CONF)
        cluster = Slurm(root=root, nodes=hosts, daemons=[])
        stack.callback(cluster.stop)
        # All nodes reach the one munge: its socket is a file, and the directory is the same in all of them.
        cluster.daemons.append(_start_munge(cluster.login, root))
        cluster.daemons.append(_start_daemon(cluster.login, root, "slurmctld", ["slurmctld", "-D"]))
        for name, node in hosts.items():
            cluster.daemons.append(_start_daemon(node, root, f"slurmd.{name}", ["slurmd", "-D", "-N", name]))
        cluster.wait_until_idle()
        yield cluster
