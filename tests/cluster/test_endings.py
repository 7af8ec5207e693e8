"""How steps end: a program in a container is signalled, stopped and ended by Slurm as a native one, which runs beside
it in every test, and nothing survives on any node: process, mount, loop device, container record, cgroup.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, Job
from tests.support.polling import wait_until
from tests.support.processes import Process, processes
from tests.support.users import User

pytestmark = [
    pytest.mark.root,
    pytest.mark.containerd,
    pytest.mark.timeout(180, func_only=True),
    pytest.mark.usefixtures("nothing_left"),
]

# The last word names it among the machine's processes.
_PROGRAM = (
    'trap "echo got USR1" USR1; echo start; i=0; while [ $i -lt "$1" ]; do sleep 0.1; i=$((i + 1)); done; echo end'
)
_FOR_EVER = 100_000
KINDS = {"native": "n1", "contained": "n2"}


def _words(cluster: Cluster, image: str, kind: str, turns: int = _FOR_EVER, program: str = _PROGRAM) -> list[str]:
    command = ["sh", "-c", program, "sh", str(turns), f"ending-{kind}"]
    return command if kind == "native" else cluster.inside(image, *command)


def _program(kind: str) -> list[Process]:
    """The processes of the program itself; what it started carries its words only while forking."""
    return [
        process
        for process in processes()
        if process.command.endswith(f" ending-{kind}") and process.name in ("sh", "busybox", "dash")
    ]


@dataclass(frozen=True, kw_only=True)
class Twins:
    """The same batch job twice, with one step: the native one on n1, the one in a container on n2."""

    cluster: Cluster
    user: User
    jobs: Mapping[str, int]

    def each(self, *argv: str, user: User | None = None) -> None:
        """A command of Slurm's for each of the two; `{}` is the job's number."""
        for job in self.jobs.values():
            self.cluster.run([word.format(job) for word in argv], user=user)

    def ended(self, seconds: float = 90) -> dict[str, Job]:
        return {kind: self.cluster.wait(job, user=self.user, seconds=seconds) for kind, job in self.jobs.items()}

    def require_alike(self, seconds: float = 90) -> Job:
        """Both have ended alike, for Slurm's controller, for its accounts and in what they printed; one of the two."""
        ended = self.ended(seconds)
        native, contained = ended["native"], ended["contained"]
        assert contained.states == native.states
        assert contained.exit_codes == native.exit_codes
        accounts = {kind: self.cluster.accounts(job, "State,ExitCode") for kind, job in self.jobs.items()}
        assert accounts["contained"] == accounts["native"]
        assert _said(contained) == _said(native)
        return contained


def _said(job: Job) -> list[str]:
    """By the program; the daemons' own lines carry times and names."""
    return [line for line in job.output.splitlines() if not line.startswith(("slurmstepd-", "srun: "))]


def _started(
    cluster: Cluster, user: User, image: str, *flags: str, turns: int = _FOR_EVER, afterwards: str = ""
) -> Twins:
    jobs = {}
    for kind, node in KINDS.items():
        step = f"srun --quiet -n1 {shlex.join(_words(cluster, image, kind, turns))}"
        jobs[kind] = cluster.submit(f"{step}\n{afterwards}", "-w", node, "-n1", "--mem=300", *flags, user=user)
    for kind in KINDS:
        cluster.wait_for_output(jobs[kind], "start\n", user=user)
    return Twins(cluster=cluster, user=user, jobs=jobs)


def test_a_signal_of_scancel_reaches_the_program(shared_cluster: Cluster, alice: User, busybox: str) -> None:
    twins = _started(shared_cluster, alice, busybox, turns=10)
    twins.each("scancel", "--signal=USR1", "{}", user=alice)
    ended = twins.require_alike()
    assert ended.require_completed().output == "start\ngot USR1\nend\n"


def test_a_cancelled_job_ends_with_its_program(shared_cluster: Cluster, alice: User, busybox: str) -> None:
    twins = _started(shared_cluster, alice, busybox)
    twins.each("scancel", "{}", user=alice)
    assert twins.require_alike().states == ("CANCELLED",)


def _wait_until_stopped(kind: str) -> None:
    wait_until(
        lambda: {process.state for process in _program(kind)} == {"T"},
        what=lambda: f"the {kind} program's stop: {_program(kind)}",
    )


def test_a_suspended_program_is_stopped_and_goes_on(shared_cluster: Cluster, alice: User, busybox: str) -> None:
    twins = _started(shared_cluster, alice, busybox, turns=20)
    twins.each("scontrol", "suspend", "{}")
    for kind in KINDS:
        _wait_until_stopped(kind)
    twins.each("scontrol", "resume", "{}")
    ended = twins.require_alike()
    assert ended.require_completed().output == "start\nend\n"


def test_the_warning_signal_and_the_time_limit_are_those_of_the_job(
    shared_cluster: Cluster, alice: User, busybox: str
) -> None:
    """The controller looks at time limits every thirty seconds: both at once."""
    # Warned a minute before the end of a minute, it is warned at the next look.
    warned = _started(shared_cluster, alice, busybox, "--time=1", "--signal=USR1@60")
    # A script that ended as soon as its step was ended would sometimes be the job's end before the limit is.
    limited = _started(shared_cluster, alice, busybox, afterwards="sleep 60")
    limited.each("scontrol", "update", "jobid={}", "EndTime=now")
    assert limited.require_alike().states == ("TIMEOUT",)
    for job in warned.jobs.values():
        shared_cluster.wait_for_output(job, "start\ngot USR1\n", user=alice, seconds=60)
    warned.each("scancel", "{}", user=alice)
    warned.require_alike()


def test_a_drained_node_lets_the_program_end(shared_cluster: Cluster, alice: User, busybox: str) -> None:
    twins = _started(shared_cluster, alice, busybox, turns=10)
    shared_cluster.run(["scontrol", "update", "nodename=n1,n2", "state=drain", "reason=test"])
    try:
        assert twins.require_alike().require_completed().output == "start\nend\n"
        wait_until(lambda: set(shared_cluster.slurm.states().values()) == {"drain"}, what="drained nodes")
    finally:
        shared_cluster.run(["scontrol", "update", "nodename=n1,n2", "state=resume"])


def test_the_program_ends_with_its_srun(shared_cluster: Cluster, alice: User, busybox: str) -> None:
    """An srun killed by SIGKILL can tell nobody; Slurm notices."""
    steps = {}
    for kind, node in KINDS.items():
        words = ["srun", "--quiet", "-w", node, "-n1", "--mem=300", *_words(shared_cluster, busybox, kind)]
        steps[kind] = shared_cluster.popen(words, user=alice, stdout=subprocess.PIPE)
    for kind, step in steps.items():
        assert step.stdout is not None and step.stdout.readline() == b"start\n"
        assert _program(kind)
    for step in steps.values():
        step.kill()
        step.wait()
    shared_cluster.wait_until_idle()
    assert not _program("native") and not _program("contained")


def _step_daemon(job: int) -> Process:
    return next(process for process in processes() if process.command.startswith(f"slurmstepd: [{job}.0]"))


def _job_cgroups(job: int) -> list[Path]:
    return sorted(Path("/sys/fs/cgroup").glob(f"*/slurm_n*/uid_*/job_{job}"))


@contextlib.contextmanager
def _removed(jobs: Mapping[str, int]) -> Iterator[None]:
    """Afterwards everything in the jobs' cgroups is killed and they are removed, which needs Slurm's daemon."""
    yield
    for job in jobs.values():
        for top in _job_cgroups(job):
            for directory, _, _ in os.walk(top, topdown=False):

                def empty(directory: str = directory) -> bool:
                    found = (Path(directory) / "cgroup.procs").read_text().split()
                    for pid in found:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(int(pid), signal.SIGKILL)
                    return not found

                wait_until(empty, what=f"the end of {directory}")
                Path(directory).rmdir()


def test_without_its_slurmstepd_the_program_stays_what_it_was(
    shared_cluster: Cluster, alice: User, busybox: str
) -> None:
    """A killed slurmstepd leaves a native program to itself, in the job's cgroups, also after the job's end: it takes
    an epilogue to end it. A program in a container is found there in the same way.
    """
    twins = _started(shared_cluster, alice, busybox)
    with _removed(twins.jobs):
        for job in twins.jobs.values():
            os.kill(_step_daemon(job).pid, signal.SIGKILL)
        twins.each("scancel", "{}", user=alice)
        ended = twins.ended()
        assert ended["contained"].states == ended["native"].states
        shared_cluster.wait_until_idle()
        for kind, job in twins.jobs.items():
            (program,) = _program(kind)
            places = [str(cgroup).split("/slurm_")[0] for cgroup in _job_cgroups(job)]
            text = Path(f"/proc/{program.pid}/cgroup").read_text()
            assert places and text.count(f"/job_{job}/step_0") == len(places), text
    assert not _program("native") and not _program("contained")
