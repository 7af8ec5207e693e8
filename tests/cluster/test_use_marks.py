"""On a real shared filesystem: of a node that begins to use an image and another one that removes it, one succeeds."""

from __future__ import annotations

import subprocess
import time

import pytest

from tests.cluster.cluster import Cluster
from tests.support.engine import HPCCTR

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.timeout(120, func_only=True)]

ROUNDS = 150

# Each node does its part when it is told, and says whether it succeeded. What it remembers of the filesystem stays from
# round to round, as in an engine.
_USES = """
import os, sys
from hpcctr.image.uses import make_mark
for line in sys.stdin:
    directory = os.open(line.strip(), os.O_PATH | os.O_DIRECTORY)
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        make_mark(directory, "n1+gateway+" + "0" * 32)
        print("yes", flush=True)
    except FileNotFoundError:
        print("no", flush=True)
    os.close(directory)
"""
_REMOVES = """
import os, sys
from hpcctr.image.uses import close_gate
for line in sys.stdin:
    os.listdir(line.strip() + "/uses")
    print("ready", flush=True)
    sys.stdin.readline()
    print("yes" if close_gate(line.strip()) else "no", flush=True)
"""


def _say(process: subprocess.Popen[bytes], word: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{word}\n".encode())
    process.stdin.flush()


def _hear(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


def test_a_mark_and_a_removal_at_the_same_moment_do_not_both_succeed(shared_cluster: Cluster) -> None:
    assert shared_cluster.gluster is not None
    python = str(HPCCTR.with_name("python"))
    first, second = (shared_cluster.nodes[name].host for name in ("n1", "n2"))
    place = f"{shared_cluster.store}/marks"
    first.run(["mkdir", place])
    outcomes = []
    with (
        first.popen([python, "-c", _USES], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as uses,
        second.popen([python, "-c", _REMOVES], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as removes,
    ):
        for number in range(ROUNDS):
            image = f"{place}/{number}"
            first.run(["mkdir", "-p", f"{image}/uses"])
            for process in (uses, removes):
                _say(process, image)
                assert _hear(process) == "ready"
            # Now one, now the other is told first, by another little while: not to wait for something.
            for process in (uses, removes) if number % 2 else (removes, uses):
                _say(process, "now")
                time.sleep(number % 10 / 1000)
            outcomes.append((_hear(uses), _hear(removes)))
        for process in (uses, removes):
            process.communicate(timeout=20)
    first.run(["rm", "-r", place])
    assert set(outcomes) == {("yes", "no"), ("no", "yes")}, {one: outcomes.count(one) for one in set(outcomes)}
