"""Slurm without an init system: munge, slurmctld and one slurmd a host, and what they are told.

The spool directory lies outside /tmp, so that what a step needs from it has to be carried in by name.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster import accounting
from tests.support.host import Host
from tests.support.polling import wait_until
from tests.support.users import User

_CONF = """
ClusterName=hpcctr
SlurmctldHost={first}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
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
DefMemPerNode=600
JobAcctGatherType=jobacct_gather/cgroup
JobAcctGatherFrequency=task=1
MpiDefault=none
ReturnToService=2
KillWait=5
MessageTimeout=30
InactiveLimit=0
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=2
PartitionName=all Nodes=ALL Default=YES MaxTime=10 State=UP OverSubscribe=FORCE:4
"""

_CGROUP_CONF = {
    "v1": """
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
ConstrainCores=yes
ConstrainRAMSpace=yes
ConstrainDevices=yes
""",
    # Without an init system there is nobody to make scopes. Controllers that a hybrid machine keeps in version 1 are
    # missing from this view, and with them every constraint.
    "v2": """
CgroupPlugin=cgroup/v2
IgnoreSystemd=yes
""",
}

_WITHOUT_CONTROLLERS = """
JobAcctGatherType=jobacct_gather/linux
"""

_PRIVATE_TMP = """
JobContainerType=job_container/tmpfs
PrologFlags=Contain
"""

_JOB_CONTAINER_CONF = """
AutoBasePath=true
BasePath=/run/slurm-tmp
"""


_MUNGE = Path("/run/munge")
"""Where Debian's libmunge looks for the socket."""


@dataclass(kw_only=True)
class Slurm:
    """The running daemons. `hosts` maps node name to its Host; commands are given on the first."""

    root: Path
    hosts: Mapping[str, Host]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def login(self) -> Host:
        return next(iter(self.hosts.values()))

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

    def text(self, *argv: str) -> str:
        """What a query as root prints, as `squeue --noheader`."""
        return self.run(argv, timeout=30).stdout.decode()

    def states(self) -> dict[str, str]:
        """Node name to state, as `idle`."""
        output = self.run(["sinfo", "--noheader", "--Node", "--format=%N %t"], check=False).stdout.decode()
        return dict(line.split() for line in output.splitlines() if line.strip())

    def wait_until_idle(self) -> None:
        """All nodes up and without a job, its cgroups and epilogue included."""
        wait_until(
            lambda: self.states() == dict.fromkeys(self.hosts, "idle"),
            seconds=60,
            what=lambda: f"idle nodes; {self.states()}\n{self.logs()}",
        )

    def remove_empty_job_cgroups(self) -> None:
        """Once no step runs: what Slurm has left of jobs. A cgroup with a process or a step's cgroup in it stays.

        With Contain a job's external step and its last one end at the same time, and in version 1 of cgroups the job's
        directory may be left by both to each other: that of one native job in fourteen with Slurm 24.11.
        """
        wait_until(
            lambda: not any(p.name == "slurmstepd" for host in self.hosts.values() for p in host.processes()),
            what="the end of all steps",
        )
        for name in self.hosts:
            for directory in Path("/sys/fs/cgroup").glob(f"*/slurm_{name}/uid_*/job_*"):
                with contextlib.suppress(OSError):
                    directory.rmdir()

    def logs(self, lines: int = 40) -> str:
        """The end of every daemon's log."""
        # A daemon that fails early has written to its standard error only.
        logs = [log for pattern in ("slurm/*.log", "munge/*.log") for log in sorted(self.root.glob(pattern))]
        logs += [output for output in sorted(self.root.glob("slurm/*.out")) if not output.with_suffix(".log").exists()]
        return "\n".join(
            f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) for log in logs
        )

    def start_daemon(self, host: Host, name: str, argv: Sequence[str]) -> None:
        """Start a daemon in a Host; what it writes goes to ROOT/slurm/NAME.out."""
        with (self.root / f"slurm/{name}.out").open("wb") as log:
            self.daemons[name] = host.popen(argv, env=self.environment, stdout=log, stderr=log)

    def stop(self) -> None:
        """End every job, then the daemons: node daemons first, munge last."""
        with contextlib.suppress(AssertionError):
            jobs = self.text("squeue", "--noheader", "--format=%A").split()
            if jobs:
                self.run(["scancel", *jobs], check=False, timeout=20)
            self.wait_until_idle()
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for name in self.hosts:
            remove_cgroups(name)


def remove_cgroups(node: str) -> bool:
    """slurmd leaves the top of its tree in each hierarchy, as it would for the next slurmd; whether all is gone."""
    mounts = Path("/sys/fs/cgroup")
    tops = [*mounts.glob(f"*/slurm_{node}"), *mounts.glob(f"**/system.slice/{node}_slurmstepd.scope")]
    for top in tops:
        for directory, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                Path(directory).rmdir()
        if top.parent.name == "system.slice":
            with contextlib.suppress(OSError):
                top.parent.rmdir()
    return not any(top.exists() for top in tops)


def _start_munge(slurm: Slurm) -> None:
    directory = slurm.root / "munge"
    directory.mkdir(mode=0o755)
    key = directory / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    argv = [
        "munged",
        "--foreground",
        f"--socket={_MUNGE}/munge.socket.2",
        f"--key-file={key}",
        f"--log-file={directory}/munged.log",
        f"--pid-file={directory}/munged.pid",
        f"--seed-file={directory}/munged.seed",
    ]
    # All nodes reach the one munge: its socket is a file, and the directory is the same in all of them.
    for host in slurm.hosts.values():
        host.run(["mkdir", str(_MUNGE)])
        host.run(["mount", "--bind", str(directory), str(_MUNGE)])
    slurm.start_daemon(slurm.login, "munged", argv)
    wait_until((directory / "munge.socket.2").exists, what="munge's socket")


def _configure(
    slurm: Slurm,
    *,
    memory_mb: int,
    node_conf: str,
    conf: str,
    files: Mapping[str, str],
    private_tmp: bool,
    version: str,
) -> None:
    directory = slurm.root / "slurm"
    cpus = len(os.sched_getaffinity(0))
    text = f"NodeName=DEFAULT CPUs={cpus} RealMemory={memory_mb} State=UNKNOWN {node_conf}\n"
    text += "".join(f"NodeName={name}\n" for name in slurm.hosts)
    text += _CONF.format(root=slurm.root, first=slurm.login.root.name)
    text += _PRIVATE_TMP if private_tmp else ""
    text += _WITHOUT_CONTROLLERS if version == "v2" else ""
    # A key given twice means the later value.
    written = {
        "slurm.conf": f"{text}\n{conf}\n",
        "job_container.conf": _JOB_CONTAINER_CONF,
        "cgroup.conf": _CGROUP_CONF[version],
        **files,
    }
    for name, content in written.items():
        (directory / name).write_text(content)


def _cgroup2_view(root: Path) -> Path:
    """The library that shows slurmd only cgroup2."""
    library = root / "cgroup2_view.so"
    source = Path(__file__).with_name("cgroup2_view.c")
    subprocess.run(["gcc", "-std=gnu11", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


@contextlib.contextmanager
def slurm(
    root: Path,
    hosts: Mapping[str, Host],
    *,
    memory_mb: int = 1500,
    node_conf: str = "",
    conf: str = "",
    files: Mapping[str, str] | None = None,
    private_tmp: bool = False,
    cgroup2_only: bool = False,
    accounted: bool = False,
) -> Iterator[Slurm]:
    """Start Slurm on these Hosts with its files below ROOT; it ends with its jobs.

    `node_conf` is said of every node, `conf` follows slurm.conf, `files` lie beside it. With `private_tmp` each job has
    a /tmp of its own, in a mount namespace of its own (job_container/tmpfs). `accounted`: with a database, for sacct.
    """
    for directory in ("slurm/state", *(f"slurm/spool.{name}" for name in hosts)):
        (root / directory).mkdir(mode=0o755, parents=True)
    started = Slurm(root=root, hosts=hosts)
    _configure(
        started,
        memory_mb=memory_mb,
        node_conf=node_conf,
        conf=conf,
        files=files or {},
        private_tmp=private_tmp,
        version="v2" if cgroup2_only else "v1",
    )
    view = []
    if cgroup2_only:
        view = ["env", f"LD_PRELOAD={_cgroup2_view(root)}"]
        # An init system would have made it.
        started.login.run(["mkdir", "-p", "/sys/fs/cgroup/system.slice"])
    with contextlib.ExitStack() as stack:
        stack.callback(started.stop)
        _start_munge(started)
        if accounted:
            accounting.start(started)
        started.start_daemon(started.login, "slurmctld", ["slurmctld", "-D"])
        for name, host in hosts.items():
            started.start_daemon(host, f"slurmd.{name}", [*view, "slurmd", "-D", "-N", name])
        started.wait_until_idle()
        yield started
