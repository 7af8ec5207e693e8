"""enter's argv."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hpcctr.client.carry import KERNEL_TREES, Mount
from hpcctr.client.enter import candidates, plan
from hpcctr.errors import NoCommand


def test_a_command_with_a_slash_is_the_only_candidate() -> None:
    assert candidates(b"./a", b"/bin:/usr/bin") == [b"./a"]


def test_a_plain_command_is_looked_for_along_path_as_execvp_does() -> None:
    assert candidates(b"ls", b"/bin::/usr/bin") == [b"/bin/ls", b"./ls", b"/usr/bin/ls"]


def test_an_empty_command_is_named() -> None:
    with pytest.raises(NoCommand):
        candidates(b"", b"/bin")


def test_a_plan_has_the_kernels_trees_first_and_the_command_as_it_was_given() -> None:
    mounts = [
        Mount(b"/a", b"/b", kind="d", read_only=True, origin="-v"),
        Mount(b"/f", b"/g", kind="f", read_only=False, origin="-v"),
    ]
    words = plan(7, mounts, b"/cwd", [b"prog", b"\xff", b""], b"/bin", kernel_trees=KERNEL_TREES)
    assert words[:3] == [b"hpcctr-enter", b"1", b"7"]
    assert words[3] == b"%d" % int(Path("/proc/self/personality").read_text(), 16)
    assert words[4:] == [
        b"0",
        b"5",
        *(b"/proc/.", b"/proc", b"rw", b"/sys/.", b"/sys", b"rw", b"/dev/.", b"/dev", b"rw"),
        *(b"/a/.", b"/b", b"ro", b"/f", b"/g", b"rw"),
        *(b"/cwd", b"1", b"/bin/prog", b"prog", b"\xff", b""),
    ]


def test_the_parent_death_signal_of_the_process_is_in_the_plan() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from hpcctr.client.enter import plan; "
        "print(plan(3, [], b'/', [b'/x'], b'', kernel_trees=())[4].decode())"
    )
    source = str(Path(__file__).parents[3] / "src")
    run = subprocess.run(
        ["setpriv", "--pdeathsig", "USR1", sys.executable, "-c", code, source],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "10\n"


def test_an_enter_that_cannot_be_executed_is_named() -> None:
    # The signal dispositions that become() changes belong to a process of its own.
    code = (
        "from hpcctr.client.enter import become; from hpcctr.errors import EnterUnusable\n"
        "try: become(b'/nowhere/enter', [b'x'], {})\n"
        "except EnterUnusable as error: print(error.message)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "/nowhere/enter: No such file or directory\n"
