"""Many short steps in containers: steady time, right placement, and no more node containers than nodes and images."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Sequence

import pytest

from tests.cluster.cluster import Cluster
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.timeout(180, func_only=True)]

STEPS = 200


def _timed_steps(cluster: Cluster, user: User, steps: int, words: Sequence[str]) -> list[float]:
    """Milliseconds of each of so many steps of two tasks, one on each node, in one job."""
    step = f"srun --quiet -N2 -n2 {shlex.join(words)} > /dev/null || exit 1"
    script = f"for step in $(seq {steps}); do a=$(date +%s%N); {step}; b=$(date +%s%N); echo $((b - a)); done"
    job = cluster.sbatch(script, "-N2", "-n2", user=user, seconds=120).require_completed()
    times = [int(line) / 1e6 for line in job.output.split()]
    assert len(times) == steps
    return times


def test_two_hundred_short_steps_take_steady_time_and_one_container_a_node(
    shared_cluster: Cluster, alice: User, busybox: str
) -> None:
    created = {name: len(node.containerd.created()) for name, node in shared_cluster.nodes.items()}
    native = _timed_steps(shared_cluster, alice, STEPS // 4, ["true"])
    times = _timed_steps(shared_cluster, alice, STEPS, shared_cluster.inside(busybox, "true"))
    quarter = STEPS // 4
    first, last = statistics.median(times[:quarter]), statistics.median(times[-quarter:])
    print(f"a step: native {statistics.median(native):.0f} ms, first ones {first:.0f} ms, last ones {last:.0f} ms")
    # The machine has other work; whatever grows with the number of steps would be a multiple.
    assert last < 2 * first
    for name, node in shared_cluster.nodes.items():
        assert len(node.containerd.created()) - created[name] <= 1


def test_a_step_in_a_container_is_where_the_native_step_is(shared_cluster: Cluster, alice: User, busybox: str) -> None:
    show = 'echo "$SLURM_PROCID $(hostname) $SLURM_LOCALID $SLURM_STEP_NODELIST $(pwd)"'
    for layout in ("-N2 -n4 --distribution=cyclic", "-N2 -n4 --distribution=block", "-w n2 -n2"):
        flags = [*layout.split(), "--overcommit", "--chdir=/tmp"]
        outside = shared_cluster.srun(*flags, "sh", "-c", show, user=alice).stdout
        inside = shared_cluster.srun(*flags, *shared_cluster.inside(busybox, "sh", "-c", show), user=alice).stdout
        assert sorted(inside.splitlines()) == sorted(outside.splitlines())


@pytest.mark.parametrize("end", ["exit 7", "kill -SEGV $$", "kill -TERM $$"])
def test_the_end_of_a_task_is_reported_as_that_of_a_native_task(
    shared_cluster: Cluster, alice: User, busybox: str, end: str
) -> None:
    outside = shared_cluster.srun("-n1", "sh", "-c", end, user=alice, check=False)
    inside = shared_cluster.srun("-n1", *shared_cluster.inside(busybox, "sh", "-c", end), user=alice, check=False)
    assert inside.returncode == outside.returncode != 0
    assert _without_numbers(inside.stderr) == _without_numbers(outside.stderr)


def _without_numbers(text: bytes) -> bytes:
    return bytes(byte for byte in text if not chr(byte).isdigit())


def test_input_and_output_of_a_task_pass_through_srun(shared_cluster: Cluster, alice: User, busybox: str) -> None:
    words = shared_cluster.inside(busybox, "sh", "-c", "cat; echo complaint >&2")
    program = f"seq 20000 | srun --quiet -n1 {shlex.join(words)}"
    done = shared_cluster.run(["sh", "-c", program], user=alice)
    assert done.stdout == b"".join(b"%d\n" % number for number in range(1, 20001))
    assert done.stderr == b"complaint\n"


def test_output_labels_and_files_are_those_of_slurm(shared_cluster: Cluster, alice: User, busybox: str) -> None:
    words = shared_cluster.inside(busybox, "hostname")
    labelled = shared_cluster.srun("-N2", "-n2", "--label", *words, user=alice).stdout
    assert sorted(labelled.split(b"\n")) == [b"", b"0: n1", b"1: n2"]
    shared_cluster.srun("-N2", "-n2", f"--output={alice.home}/rank.%t", *words, user=alice)
    shown = shared_cluster.login.run(["sh", "-c", "cat rank.0 rank.1; rm rank.*"], user=alice).stdout
    assert shown == b"n1\nn2\n"


def test_a_batch_script_runs_containers_itself_and_as_steps_in_one_job(
    shared_cluster: Cluster, alice: User, busybox: str
) -> None:
    words = shlex.join(
        shared_cluster.inside(busybox, "sh", "-c", 'echo "$SLURM_JOB_ID $SLURM_STEP_ID $SLURMD_NODENAME"')
    )
    created = {name: len(node.containerd.created()) for name, node in shared_cluster.nodes.items()}
    job = shared_cluster.sbatch(f"srun --quiet {words} | sort\n{words}\nsrun --quiet {words} | sort", "-N2", user=alice)
    number = job.require_completed().number
    lines = [f"{number} 0 n1", f"{number} 0 n2", f"{number}  n1", f"{number} 1 n1", f"{number} 1 n2"]
    assert job.output.splitlines() == lines
    # One, unless an earlier test's of the same kind was still there.
    for name, node in shared_cluster.nodes.items():
        assert len(node.containerd.created()) - created[name] <= 1
