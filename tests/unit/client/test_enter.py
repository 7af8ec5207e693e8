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


SOURCE = str(Path(__file__).parents[3] / "src")


def _with_option(option: str, code: str) -> str:
    """What `code` prints in a Python that front has started with these -X words."""
    run = subprocess.run(
        [
            sys.executable,
            *([f"-X{option}"] if option else []),
            "-c",
            f"import sys; sys.path.insert(0, sys.argv[1]); {code}",
            SOURCE,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("hpcctr-caller=0:0", (0, 0)),
        ("hpcctr-caller=3:10", (3, 10)),
        ("hpcctr-caller=2:64", (2, 64)),
        # pip's own start script; and words that front does not make
        ("", (0, 0)),
        ("hpcctr-caller", (0, 0)),
        ("hpcctr-caller=", (0, 0)),
        ("hpcctr-caller=1", (0, 0)),
        ("hpcctr-caller=1:-9", (0, 0)),
        ("hpcctr-caller=x:9", (0, 0)),
        ("hpcctr-caller=1:65", (1, 0)),
    ],
)
def test_what_front_told_is_read_strictly(option: str, told: tuple[int, int]) -> None:
    assert _with_option(option, "from hpcctr.client.enter import told_by_front; print(told_by_front())") == f"{told}\n"


def test_the_parent_death_signal_front_told_of_is_in_the_plan() -> None:
    code = "from hpcctr.client.enter import plan; print(plan(3, [], b'/', [b'/x'], b'', kernel_trees=())[4].decode())"
    assert _with_option("hpcctr-caller=0:10", code) == "10\n"


@pytest.mark.parametrize(
    ("option", "ignored"), [("", []), ("hpcctr-caller=1:0", [13]), ("hpcctr-caller=3:0", [13, 25])]
)
def test_signals_the_caller_ignored_are_ignored_by_what_is_executed(option: str, ignored: list[int]) -> None:
    code = "from hpcctr.client.enter import become; become(b'/bin/cat', [b'cat', b'/proc/self/status'])"
    status = dict(line.split(":", 1) for line in _with_option(option, code).splitlines())
    mask = int(status["SigIgn"], 16)
    assert [number for number in (13, 25) if mask & 1 << number - 1] == ignored


def test_an_enter_that_cannot_be_executed_is_named() -> None:
    # The signal dispositions that become() changes belong to a process of its own.
    code = (
        "from hpcctr.client.enter import become; from hpcctr.errors import EnterUnusable\n"
        "try: become(b'/nowhere/enter', [b'x'], {})\n"
        "except EnterUnusable as error: print(error.message)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "/nowhere/enter: No such file or directory\n"
