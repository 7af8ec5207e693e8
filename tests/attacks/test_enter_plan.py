"""A plan is believed only after it was checked: forged words end the launch before anything is opened or asked."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import enter
from tests.support.enter import World

pytestmark = pytest.mark.root

SOCK, PERSONALITY, PDEATHSIG, NMOUNTS = 2, 3, 4, 5
"""Places of the numbers in argv."""

GOOD = [
    "hpcctr-enter",
    "1",
    str(enter.DESCRIPTOR),
    "0",
    "0",
    "1",
    "/tmp/.",
    "/mnt/one",
    "rw",
    "/",
    "1",
    "/bin/id",
    "id",
]


@contextlib.contextmanager
def _own_socket() -> Iterator[socket.socket]:
    """A socket enter refuses, so that even a lawful plan goes nowhere."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield theirs


def _refusal(world: World, argv: list[str] | list[bytes]) -> enter.Ended:
    with _own_socket() as sock:
        return world.run_alone(argv, sock=sock)


def test_a_lawful_plan_gets_as_far_as_the_socket(world: World) -> None:
    _refusal(world, GOOD).require_refusal("caller-refused", "not a connection to the engine")


@pytest.mark.parametrize("place", [SOCK, PERSONALITY, PDEATHSIG, NMOUNTS, 10])
@pytest.mark.parametrize(
    "word",
    [
        *("", " ", "-1", "+1", " 1", "1 ", "01", "00", "0x1", "1.0", "1e1", "1\n", "\t1", "one", "\u0661"),
        *("4294967296", "18446744073709551616", "18446744073709551617", "9" * 400, "-0"),
    ],
)
def test_a_number_that_is_not_plainly_decimal_is_refused(world: World, place: int, word: str) -> None:
    _refusal(world, [*GOOD[:place], word, *GOOD[place + 1 :]]).require_refusal("plan")


@pytest.mark.parametrize(
    ("place", "word"),
    [
        *((SOCK, word) for word in ("0", "1", "2", "2147483648")),
        (PERSONALITY, "4294967295"),
        (PDEATHSIG, "65"),
        *((NMOUNTS, word) for word in ("129", "1000", "4294967295")),
        *((10, word) for word in ("0", "257", "2147483648")),
    ],
)
def test_a_number_out_of_its_range_is_refused(world: World, place: int, word: str) -> None:
    _refusal(world, [*GOOD[:place], word, *GOOD[place + 1 :]]).require_refusal("plan")


@pytest.mark.parametrize("count", range(1, len(GOOD)))
def test_a_plan_that_ends_too_early_is_refused(world: World, count: int) -> None:
    _refusal(world, GOOD[:count]).require_refusal("plan")


@pytest.mark.parametrize("word", ["0", "2", "", "1 ", "01", "11"])
def test_another_plan_format_is_refused(world: World, word: str) -> None:
    ended = _refusal(world, [GOOD[0], word, *GOOD[2:]])
    ended.require_refusal("plan", "of different versions")


def test_no_arguments_at_all_are_refused(world: World) -> None:
    def execute() -> None:
        nothing = (ctypes.c_char_p * 1)(None)
        enter.libc.execve(os.fsencode(world.program), nothing, nothing)

    with _own_socket() as sock:
        world.run_alone(GOOD, sock=sock, before=execute).require_refusal("plan", "missing")


def test_a_count_that_swallows_the_command_is_refused(world: World) -> None:
    _refusal(world, [*GOOD[:NMOUNTS], "2", *GOOD[NMOUNTS + 1 :]]).require_refusal("plan")
    _refusal(world, [*GOOD[:10], "2", *GOOD[11:]]).require_refusal("plan", "ARG0")


def test_a_thousand_mounts_are_refused(world: World) -> None:
    mounts = [word for number in range(1000) for word in ("/tmp/.", f"/mnt/{number}", "rw")]
    _refusal(world, [*GOOD[:NMOUNTS], "1000", *mounts, *GOOD[9:]]).require_refusal("plan", "NMOUNTS", "too large")


@pytest.mark.parametrize("mode", ["", "RW", "r", "rwx", "ro,exec", "ro ", "wr"])
def test_a_mode_other_than_rw_and_ro_is_refused(world: World, mode: str) -> None:
    _refusal(world, [*GOOD[:8], mode, *GOOD[9:]]).require_refusal("plan", "MODE")


@pytest.mark.parametrize(("place", "name"), [(6, "SOURCE"), (7, "TARGET"), (9, "CWD")])
@pytest.mark.parametrize("word", ["", ".", "tmp", "./tmp", "../tmp", "~", " /tmp"])
def test_a_path_that_is_not_absolute_is_refused(world: World, place: int, name: str, word: str) -> None:
    _refusal(world, [*GOOD[:place], word, *GOOD[place + 1 :]]).require_refusal("plan", name, "absolute")


@pytest.mark.parametrize(("place", "name"), [(6, "SOURCE"), (7, "TARGET"), (9, "CWD")])
def test_a_path_longer_than_the_kernel_takes_is_refused(world: World, place: int, name: str) -> None:
    word = "/" + "x" * 4095
    _refusal(world, [*GOOD[:place], word, *GOOD[place + 1 :]]).require_refusal("plan", name, "too long")


def test_an_empty_candidate_is_refused(world: World) -> None:
    _refusal(world, [*GOOD[:11], "", *GOOD[12:]]).require_refusal("plan", "CANDIDATE")


@pytest.mark.parametrize(
    "target",
    [
        *("/", "//", "/.", "/..", "/../mnt", "/mnt/", "/mnt//one", "/mnt/./one", "/mnt/../mnt/one", "/mnt/one/."),
        *("/mnt/one/..", "/mnt/one/", "//mnt/one", "/./mnt", "/mnt/one//", "/proc/", "//proc", "/proc/."),
        *(
            "/proc",
            "/proc/1",
            "/proc/self/attr",
            "/sys",
            "/sys/kernel",
            "/sys/fs/cgroup",
            "/dev",
            "/dev/shm",
            "/dev/null",
        ),
        *("/run/hpcctr", "/run/hpcctr/x", "/run/hpcctr/engine.sock", "/run/hpcctr/.", "/run//hpcctr", "/mnt/../proc"),
    ],
)
def test_an_unlawful_target_is_refused(world: World, target: str) -> None:
    ended = _refusal(world, [*GOOD[:7], target, *GOOD[8:]])
    ended.require_refusal("mount-target")
    assert ended.status == 126


@pytest.mark.parametrize(
    "target", ["/process", "/system", "/devices", "/run/hpcctr2", "/run/hpcct", "/mnt/proc", "/...", "/mnt/..x"]
)
def test_a_target_that_only_begins_like_an_unlawful_one_is_lawful(world: World, target: str) -> None:
    _refusal(world, [*GOOD[:7], target, *GOOD[8:]]).require_refusal("caller-refused")


@pytest.mark.parametrize(
    ("source", "target"),
    [
        *(("/proc", "/proc"), ("/proc/", "/proc"), ("/proc/./", "/proc"), ("/proc/.", "/sys"), ("/sys/.", "/dev")),
        *(
            ("/dev/./.", "/dev"),
            ("//dev/.", "/dev"),
            ("/tmp/../dev/.", "/dev"),
            ("/dev/.", "/dev/shm"),
            ("/proc2/.", "/proc"),
        ),
    ],
)
def test_proc_sys_and_dev_accept_only_themselves(world: World, source: str, target: str) -> None:
    ended = _refusal(world, [*GOOD[:6], source, target, *GOOD[8:]])
    ended.require_refusal("mount-target", "only the host's own /proc, /sys and /dev")


@pytest.mark.parametrize(
    ("first", "second"), [("/mnt/one", "/mnt/one"), ("/mnt/one/x", "/mnt/one"), ("/mnt/one", "/mnt")]
)
def test_a_target_that_would_hide_an_earlier_one_is_refused(world: World, first: str, second: str) -> None:
    argv = [*GOOD[:NMOUNTS], "2", "/tmp/.", first, "rw", "/tmp/.", second, "ro", *GOOD[9:]]
    _refusal(world, argv).require_refusal("mount-target", "hide")


def test_control_characters_of_a_path_do_not_reach_the_terminal(world: World) -> None:
    ended = _refusal(world, [*GOOD[:7], "/proc/\x1b[31m\r\nhpcctr: all is well\x7f", *GOOD[8:]])
    ended.require_refusal("mount-target", "/proc/?[31m??hpcctr: all is well?")


def test_words_of_the_largest_size_do_no_harm(world: World) -> None:
    large = "x" * 130_000
    for place in range(1, len(GOOD) - 2):
        _refusal(world, [*GOOD[:place], large, *GOOD[place + 1 :]]).require_refusal("plan")
    ended = world.run(world.plan(["id"], candidates=["/" + large]))
    ended.require_refusal("not-executable")


_word = st.one_of(
    st.sampled_from(
        [
            *(b"", b"0", b"1", b"2", b"3", b"64", b"65", b"128", b"129", b"-1", b"01", b"109", b"4294967295", b"1\n"),
            *(
                b"/",
                b"/tmp/.",
                b"/mnt/one",
                b"/proc",
                b"/proc/.",
                b"/sys/.",
                b"/dev",
                b"/run/hpcctr/x",
                b"/a/../b",
                b"//",
            ),
            *(b"rw", b"ro", b"hpcctr-enter", b"/bin/id", b"id", b"/" + b"y" * 5000, b"%s%n", b"\xff\xfe"),
        ]
    ),
    st.binary(max_size=40).map(lambda data: data.replace(b"\0", b"")),
)
_plan = st.one_of(
    st.lists(_word, min_size=1, max_size=40),
    # A lawful plan with a few words replaced reaches further than chance does.
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1), _word), max_size=4).map(
        lambda changes: [dict(changes).get(place, word.encode()) for place, word in enumerate(GOOD)]
    ),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(argv=_plan)
def test_no_plan_makes_enter_die_of_a_signal_or_start_anything(world: World, argv: list[bytes]) -> None:
    ended = _refusal(world, argv)
    assert ended.status in (125, 126), (argv, ended)
    assert ended.err.startswith(b"hpcctr: error["), (argv, ended)
    assert ended.out == b""
