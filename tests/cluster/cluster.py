"""The test cluster: hosts on one machine, each a node with containerd, engine and slurmd, and one store for all.

    with cluster(root, nodes=2, conf="MinJobAge=10", files={"oci.conf": "..."}) as c:
        c.pull(image)
        c.srun("-N2", "-n4", "--mpi=pmix", *c.inside(image, "report"), user=alice)
        c.nodes["n2"].containerd.containers()

Every node has the settings at /etc/hpcctr/site.toml, and `hpcctr` is in the PATH of what is run here. Nothing but the
store holds images; ROOT/NAME is what a node keeps for itself.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.cluster.gluster import Gluster, gluster
from tests.cluster.hosts import SITE_DIRECTORY, hosts
from tests.cluster.slurm import Slurm, slurm
from tests.support.engine import HPCCTR
from tests.support.host import PATH, Host
from tests.support.leftovers import Leftovers
from tests.support.node import Node, equipped
from tests.support.polling import wait_until
from tests.support.users import User

Store = Literal["directory", "gluster"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A batch job that has ended: one state (as COMPLETED) and exit code (as 0:0, status and signal) a task."""

    number: int
    states: tuple[str, ...]
    exit_codes: tuple[str, ...]
    output: str
    #: What Slurm's daemons had written last at its end.
    logs: str = field(repr=False)

    def require_completed(self) -> Job:
        assert set(self.states) == {"COMPLETED"}, f"{self}\n{self.logs}"
        return self


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Slurm, and hpcctr on each of its nodes. Commands are given on the first node; no user means root."""

    root: Path
    slurm: Slurm
    nodes: Mapping[str, Node]
    store: Path
    #: None when the store is a plain directory.
    gluster: Gluster | None

    @property
    def login(self) -> Host:
        return self.slurm.login

    @property
    def environment(self) -> dict[str, str]:
        return {
            **self.slurm.environment,
            "HPCCTR_SITE": str(SITE_DIRECTORY / "site.toml"),
            # Last: the virtual environment has a python of its own.
            "PATH": f"{PATH}:{HPCCTR.parent}",
        }

    def run(
        self,
        argv: Sequence[str],
        *,
        user: User | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 90,
        check: bool | int = True,
    ) -> subprocess.CompletedProcess[bytes]:
        """A command to its end, as `["sbatch", "job"]`; a failure shows the daemons' logs."""
        try:
            return self.slurm.run(
                argv, user=user, env={**self.environment, **(env or {})}, timeout=timeout, check=check
            )
        except AssertionError:
            self._cancel(user)
            raise

    def _cancel(self, user: User | None) -> None:
        """End what a failed test has left, or the next one would wait for its processors."""
        name = "root" if user is None else user.name
        self.login.run(["scancel", f"--user={name}"], env=self.environment, check=False)

    def popen(
        self, argv: Sequence[str], *, user: User | None = None, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[bytes]:
        """A command in the background; options as for `Host.popen`."""
        return self.login.popen(argv, user=user, env={**self.environment, **(env or {})}, **options)

    def srun(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
        """`srun ARGUMENTS`; options as for `run`."""
        return self.run(["srun", "--quiet", *arguments], **options)

    def salloc(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
        """`salloc ARGUMENTS` with a command; options as for `run`."""
        return self.run(["salloc", "--quiet", *arguments], **options)

    def submit(
        self, text: str, *flags: str, user: User, env: Mapping[str, str] | None = None, check: bool | int = True
    ) -> int:
        """Hand in the job script TEXT; the job's number. What it prints goes to a file in the user's home."""
        # Written by its user, whose home is closed to everyone else.
        script = user.home / "job.sh"
        words = f"#!/bin/sh\n{text}\n".encode()
        self.login.run(["sh", "-c", 'cat > "$1"', "sh", str(script)], user=user, input=words)
        output = f"--output={user.home}/slurm-%A_%a.out"
        done = self.run(["sbatch", "--parsable", output, *flags, str(script)], user=user, env=env, check=check)
        return int(done.stdout.split(b";")[0])

    def sbatch(
        self, text: str, *flags: str, user: User, env: Mapping[str, str] | None = None, seconds: float = 90
    ) -> Job:
        """The same, to its end; all tasks when it is an array."""
        return self.wait(self.submit(text, *flags, user=user, env=env), user=user, seconds=seconds)

    def wait(self, number: int, *, user: User, seconds: float = 90) -> Job:
        """The end of a job handed in by `submit`; its output file is removed."""
        try:
            job = wait_until(
                lambda: self._ended(number, user), seconds=seconds, what=lambda: f"job {number}\n{self.slurm.logs()}"
            )
        except AssertionError:
            self._cancel(user)
            raise
        assert job is not None
        return job

    def printed(self, number: int, user: User) -> str:
        """What a job of `submit` has printed so far."""
        show = ["sh", "-c", f"cat slurm-{number}_*.out"]
        return self.login.run(show, user=user, check=False).stdout.decode(errors="replace")

    def wait_for_output(self, number: int, text: str, *, user: User, seconds: float = 30) -> None:
        """Until a job of `submit` has printed this, from the beginning."""
        wait_until(
            lambda: self.printed(number, user).startswith(text),
            seconds=seconds,
            what=lambda: f"{text!r} of job {number}; {self.printed(number, user)!r}\n{self.slurm.logs()}",
        )

    def _ended(self, number: int, user: User) -> Job | None:
        shown = self.slurm.text("scontrol", "--oneliner", "show", "job", str(number))
        states = re.findall(r" JobState=(\S+)", shown)
        if not set(states).isdisjoint(("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED")):
            return None
        printed = self.printed(number, user)
        self.login.run(["sh", "-c", f"rm -f slurm-{number}_*.out"], user=user)
        codes = re.findall(r" ExitCode=(\S+)", shown)
        return Job(
            number=number,
            states=tuple(states),
            exit_codes=tuple(codes),
            output=printed,
            logs=self.slurm.logs(),
        )

    def accounts(self, number: int, fields: str) -> dict[str, str]:
        """What sacct says of an ended job, once it knows all: "" (the job), ".batch", ".0" … to FIELDS, joined by |."""

        def complete() -> dict[str, str]:
            argv = ["sacct", "-j", str(number), "--noheader", "--parsable2", f"--format=JobID,End,{fields}"]
            rows = [line.split("|", 2) for line in self.slurm.text(*argv).splitlines()]
            if not rows or any(end == "Unknown" for _, end, _ in rows):
                return {}
            return {step.removeprefix(str(number)): rest for step, _, rest in rows}

        return wait_until(complete, seconds=30, what=f"the accounts of job {number}")

    def inside(self, image: str, *command: str, flags: Sequence[str] = ()) -> list[str]:
        """The words that run a command in an image, for srun and scripts."""
        return [str(HPCCTR), "run", *flags, image, "--", *command]

    def pull(self, *images: str) -> None:
        """Into the store, on the first node."""
        self.nodes[self.login.root.name].pull(*images)

    def wait_until_idle(self) -> None:
        self.slurm.wait_until_idle()

    def leftovers(self) -> Leftovers:
        """What there is on all nodes now: compare with `require_nothing_new`."""
        return Leftovers.of(
            *self.slurm.hosts.values(), *(node.containerd for node in self.nodes.values()), below=[self.root]
        )


@contextlib.contextmanager
def cluster(
    root: Path,
    *,
    nodes: int = 2,
    prefix: str = "n",
    store: Store = "directory",
    memory_mb: int = 1500,
    node_conf: str = "",
    conf: str = "",
    files: Mapping[str, str] | None = None,
    private_tmp: bool = False,
    cgroup2_only: bool = False,
    accounted: bool = False,
    runtime: Literal["runc", "crun"] = "runc",
    linger_seconds: int = 1,
    carry: Sequence[str] = (),
    site: str = "",
) -> Iterator[Cluster]:
    """Start a cluster of nodes n1, n2 … below ROOT, an empty directory everyone may walk through; it ends at the end.

    A second cluster beside one that runs needs another `prefix` of its nodes' names.

    `node_conf`, `conf`, `files`, `private_tmp` and `accounted` are Slurm's (tests/cluster/slurm.py); `site` is TOML
    that follows in every node's site.toml.
    """
    with contextlib.ExitStack() as stack:
        started = stack.enter_context(hosts(root, count=nodes, prefix=prefix, cgroup2_only=cgroup2_only))
        shared = root / "store"
        mounted = None
        if store == "gluster":
            mounted = stack.enter_context(gluster(root / "gluster", shared, started))
        else:
            shared.mkdir(mode=0o755)
        equipment = {
            name: stack.enter_context(
                equipped(
                    host,
                    runtime=runtime,
                    store=shared,
                    linger_seconds=linger_seconds,
                    carry=[str(root / "slurm"), *carry],
                    more=site,
                )
            )
            for name, host in started.items()
        }
        scheduler = stack.enter_context(
            slurm(
                root,
                started,
                memory_mb=memory_mb,
                node_conf=node_conf,
                conf=conf,
                files=files,
                private_tmp=private_tmp,
                cgroup2_only=cgroup2_only,
                accounted=accounted,
            )
        )
        yield Cluster(root=root, slurm=scheduler, nodes=equipment, store=shared, gluster=mounted)
