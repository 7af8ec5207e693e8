"""What a step may use, and what Slurm says it used: the program in a container has the step's own cgroups, so that its
limits and accounts are those of a native program. Where it can, a test compares both in one step.
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
from collections.abc import Iterator, Sequence

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.conftest import GPU
from tests.support.polling import wait_until
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.timeout(180, func_only=True)]


def _outside_and_inside(
    cluster: Cluster, user: User, image: str, show: str, *flags: str
) -> tuple[list[str], list[str]]:
    """What a command line prints first natively and then in a container, in each task of one step."""
    inside = shlex.join(cluster.inside(image, "sh", "-c", f"({show}) | sed s/^/inside:/"))
    script = f'({show}) | sed "s/^/outside:/"; exec {inside}'
    lines = cluster.srun(*flags, "--label", "sh", "-c", script, user=user).stdout.decode().splitlines()
    outside = sorted(line.replace("outside:", "") for line in lines if "outside:" in line)
    return outside, sorted(line.replace("inside:", "") for line in lines if "inside:" in line)


def test_a_task_is_in_the_steps_cgroup_of_every_hierarchy(shared_cluster: Cluster, alice: User, busybox: str) -> None:
    show = "cat /proc/self/cgroup"
    outside, inside = _outside_and_inside(shared_cluster, alice, busybox, show, "-N2", "-n4", "--overcommit")
    assert inside == outside
    for controller in ("freezer", "memory", "cpuset", "devices"):
        assert sum(f"{controller}:/slurm" in line and "/step_" in line for line in inside) == 4, inside


@pytest.mark.parametrize(
    "flags",
    [
        ["-N2", "-n2", "--cpu-bind=cores"],
        ["-N1", "-n2", "--cpu-bind=map_cpu:1,0"],
        ["-N1", "-n1", "-c2"],
        ["-N1", "-n2", "--cpu-bind=none", "--mem-bind=local"],
    ],
    ids=" ".join,
)
def test_a_task_has_the_cores_and_limits_of_the_native_task(
    shared_cluster: Cluster, alice: User, busybox: str, flags: Sequence[str]
) -> None:
    show = "cd /proc/self; grep _allowed status; cat limits oom_score_adj; cut -d' ' -f18,19 stat"
    outside, inside = _outside_and_inside(shared_cluster, alice, busybox, show, *flags)
    assert inside == outside
    assert any("Cpus_allowed_list" in line for line in inside)


@contextlib.contextmanager
def _neighbour(cluster: Cluster, user: User, node: str, words: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A step of somebody on a node, which ends at the end."""
    step = cluster.popen(
        ["srun", "--quiet", "-w", node, "-n1", "--mem=100", *words],
        user=user,
        stdout=subprocess.PIPE,
    )
    try:
        assert step.stdout is not None and step.stdout.readline() == b"runs\n"
        yield step
    finally:
        cluster.run(["scancel", f"--user={user.name}"], user=user)
        step.wait(30)
        cluster.wait_until_idle()


def test_too_much_memory_is_reported_as_out_of_memory_and_ends_nothing_else(
    shared_cluster: Cluster, alice: User, bob: User, busybox: str
) -> None:
    hungry = ["sh", "-c", "head -c 400000000 /dev/zero | tail > /dev/null"]
    waiting = shared_cluster.inside(busybox, "sh", "-c", "echo runs; exec sleep 600")
    states = []
    with _neighbour(shared_cluster, bob, "n1", waiting) as neighbour:
        for words in (hungry, shared_cluster.inside(busybox, *hungry)):
            step = f"srun --quiet -n1 {shlex.join(words)}"
            job = shared_cluster.sbatch(step, "-w", "n1", "-n1", "--mem=100", user=alice)
            states.append(shared_cluster.accounts(job.number, "State,ExitCode"))
        assert states[1] == states[0]
        assert states[1][".0"].startswith("OUT_OF_MEMORY|")
        assert neighbour.poll() is None
        assert shared_cluster.nodes["n1"].engine.process.poll() is None


def test_a_device_can_be_opened_only_by_steps_that_asked_for_it(
    shared_cluster: Cluster, alice: User, busybox: str
) -> None:
    """The device cgroup: the file is there and its permissions allow everyone."""
    opening = f"sh -c ': < {GPU}' && echo opened || echo refused"
    for flags, answer in ((["-n1"], "refused"), (["-n1", "--gres=gpu:1"], "opened")):
        outside, inside = _outside_and_inside(shared_cluster, alice, busybox, opening, "-w", "n1", *flags)
        assert inside == outside == [f"0: {answer}"]


# A buffer filled again and again: memory that stays the same, and processor time, for some seconds.
_WORK = "for turn in 1 2 3 4 5 6 7 8; do busybox dd if=/dev/zero of=/dev/null bs=64M count=100 2> /dev/null; done"


def _measured(cluster: Cluster, user: User, node: str, words: Sequence[str]) -> int:
    return cluster.submit(f"srun --quiet -n1 {shlex.join(words)}", "-w", node, "-n1", "--mem=500", user=user)


def _kilobytes(text: str) -> float:
    units = {"K": 1, "M": 1024, "G": 1024**2}
    return float(text[:-1]) * units[text[-1]] if text[-1:] in units else float(text or 0) / 1024


def _seconds(text: str) -> float:
    """As 00:01.250 or 01:02:03."""
    total = 0.0
    for part in text.split(":"):
        total = total * 60 + float(part)
    return total


def test_accounts_of_memory_and_processor_time_are_those_of_the_native_step(
    shared_cluster: Cluster, alice: User, busybox: str
) -> None:
    """sstat while it runs, sacct afterwards."""
    words = ["sh", "-c", _WORK]
    jobs = [
        _measured(shared_cluster, alice, "n1", words),
        _measured(shared_cluster, alice, "n2", shared_cluster.inside(busybox, *words)),
    ]

    def live(job: int) -> float:
        argv = ["sstat", "-j", f"{job}.0", "--noheader", "--parsable2", "--format=MaxRSS"]
        done = shared_cluster.run(argv, user=alice, check=False)
        return _kilobytes(done.stdout.decode().strip())

    def alike() -> bool:
        native, contained = map(live, jobs)
        return native > 50_000 and contained == pytest.approx(native, rel=0.3)

    wait_until(alike, seconds=30, what=lambda: f"like memory in sstat: {[live(job) for job in jobs]} kB")
    accounts = []
    for job in jobs:
        assert shared_cluster.wait(job, user=alice).require_completed()
        used, spent = shared_cluster.accounts(job, "MaxRSS,TotalCPU")[".0"].split("|")
        accounts.append((_kilobytes(used), _seconds(spent)))
    (native_memory, native_time), (memory, time) = accounts
    assert memory == pytest.approx(native_memory, rel=0.3)
    assert native_time > 0.3
    # The start of a container is a few hundredths of a second.
    assert time == pytest.approx(native_time, rel=0.5)
