"""The words of run and the request that crosses the socket."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcctr.errors import ImageNotLocked, NoCommand, ProtocolBroken, UsageWrong
from hpcctr.processor import machine
from hpcctr.request import (
    TARGETS_MAX,
    ExecRequest,
    ExecWords,
    LaunchRequest,
    NeedsFullParser,
    RunWords,
    Target,
    target_problem,
)
from hpcctr.wire import Frame

PARTS = st.binary(min_size=1, max_size=12).filter(
    lambda part: b"/" not in part and b"\0" not in part and part not in (b".", b"..")
)
PATHS = (
    st.lists(PARTS, min_size=1, max_size=5)
    .map(lambda parts: b"/" + b"/".join(parts))
    .filter(lambda path: not target_problem(path))
)


@given(st.text(max_size=30).filter(lambda text: "\0" not in text and text.isprintable()), st.sets(PATHS, max_size=10))
def test_a_request_comes_out_as_it_went_in(image: str, paths: set[bytes]) -> None:
    sent = LaunchRequest(
        image=image,
        targets=[Target("d", path) for path in paths],
        explain=True,
        gpu="0,GPU-1a",
        devices=("a.b/c=d", "a.b/c=d", "a.b/c=e"),
        features=("ib",),
        mpi="host",
    )
    got = LaunchRequest.of_frame(Frame.unpack(sent.frame().pack()))
    assert (got.image, got.explain) == (image, True)
    assert (got.gpu, got.devices, got.features, got.mpi) == ("0,GPU-1a", ("a.b/c=d", "a.b/c=e"), ("ib",), "host")
    assert sorted(target.path for target in got.targets) == sorted(paths)


def test_a_request_carries_no_uid_no_command_no_environment_and_no_source() -> None:
    assert sorted(LaunchRequest.KEYS) == [
        "as-of", "device", "explain", "feature", "gpu", "image", "mpi", "platform", "target"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [("image", b"a"), ("image", b"b")],
        [("image", b"a"), ("uid", b"0")],
        [("image", b"\xff")],
        [("image", b"a"), ("explain", b"maybe")],
        *(
            [("image", b"a"), ("as-of", said)]
            for said in (b"-1", b"+1", b"1.5", b" 1", b"x", b"0x1", b"9" * 12, b"\xd9\xa1")
        ),
        [("image", b"a"), ("as-of", b"1"), ("as-of", b"2")],
        [("image", b"a"), ("gpu", b"0, 1")],
        [("image", b"a"), ("gpu", b"0"), ("gpu", b"1")],
        [("image", b"a"), ("gpu", b"x" * 513)],
        [("image", b"a"), ("device", b"a\nb")],
        [("image", b"a"), ("device", b"")],
        [("image", b"a"), ("feature", b"x" * 513)],
        [("image", b"a"), *[("feature", b"%d" % n) for n in range(65)]],
        [("image", b"a"), ("mpi", b"theirs")],
        [("image", b"a"), ("target", b"/x")],
        [("image", b"a"), ("target", b"x:/x")],
        [("image", b"a"), ("target", b"d:x")],
        [("image", b"a"), ("target", b"d:/")],
        [("image", b"a"), ("target", b"d:/a/../b")],
        [("image", b"a"), ("target", b"d:/a//b")],
        [("image", b"a"), ("target", b"d:/a/")],
        [("image", b"a"), ("target", b"d:/a/./b")],
        [("image", b"a"), ("target", b"d:/proc")],
        [("image", b"a"), ("target", b"d:/sys/kernel")],
        [("image", b"a"), ("target", b"d:/dev/shm")],
        [("image", b"a"), ("target", b"d:/run/hpcctr")],
        [("image", b"a"), ("target", b"d:/" + b"x" * 256)],
        [("image", b"a"), ("target", b"d:/" + b"x/" * 2100 + b"x")],
        [("image", b"a"), ("target", b"d:/x"), ("target", b"f:/x")],
        [("image", b"a"), *(("target", b"d:/x%d" % number) for number in range(TARGETS_MAX + 1))],
    ],
)
def test_a_malformed_request_is_refused(fields: list[tuple[str, bytes]]) -> None:
    with pytest.raises(ProtocolBroken):
        LaunchRequest.of_frame(Frame("run", fields))


@given(st.none() | st.integers(0, 10**11 - 1))
def test_the_moment_a_name_is_meant_at_comes_out_as_it_went_in(moment: int | None) -> None:
    sent = LaunchRequest(image="a:1", as_of=moment)
    assert LaunchRequest.of_frame(Frame.unpack(sent.frame().pack())).as_of == moment


def test_words_are_settled_by_a_lock_file(tmp_path: Path) -> None:
    digest = "sha256:" + "a" * 64
    lock = tmp_path / "images.lock"
    lock.write_text(f"docker.io/library/app:1 {digest} linux/{machine()}\n")
    words = RunWords.parse(["--locked", str(lock), "-e", "A=1", "--pull", "never", "app:1", "--", "x"]).settled()
    assert (words.image, words.command, words.env) == (f"docker.io/library/app:1@{digest}", (b"x",), (b"A=1",))
    assert (words.locked, words.pull) == ("", "never")
    assert RunWords.parse(["--locked", str(lock), "app:1"]).settled().command is None
    with pytest.raises(ImageNotLocked):
        RunWords.parse(["--locked", str(lock), "app:2"]).settled()
    plain = RunWords.parse(["app:1"])
    assert plain.settled() is plain


def test_names_that_only_begin_like_a_forbidden_place_are_possible() -> None:
    for path in (b"/process", b"/devel", b"/system", b"/run/hpcctr2", b"/run/user/1000"):
        assert target_problem(path) == ""


def test_targets_below_others_are_left_to_the_outer_ones_source() -> None:
    request = LaunchRequest(
        image="x", targets=[Target("d", b"/scratch/u/a"), Target("d", b"/home/u"), Target("d", b"/scratch2")]
    )
    assert [target.path for target in request.targets_with(["/scratch", "/opt/site"])] == [
        b"/home/u",
        b"/opt/site",
        b"/scratch",
        b"/scratch2",
    ]


def test_options_end_at_the_image() -> None:
    words = RunWords.parse(
        ["-v", "/a:/b", "--volume=/c", "-e", "X=1", "--clean-env", "img", "--", "prog", "-v", "--", "x"]
    )
    assert words.volume == (b"/a:/b", b"/c")
    assert words.env == (b"X=1",)
    assert words.clean_env
    assert words.image == "img"
    assert words.command == (b"prog", b"-v", b"--", b"x")


def test_a_command_may_follow_the_image_without_dashes() -> None:
    assert RunWords.parse(["img", "prog", "-x"]).command == (b"prog", b"-x")


def test_no_command_is_not_an_empty_command() -> None:
    assert RunWords.parse(["img"]).command is None
    assert RunWords.parse(["img", "--"]).command is None


def test_words_that_are_not_utf8_stay_what_they_are() -> None:
    assert RunWords.parse(["img", "--", "\udcff", ""]).command == (b"\xff", b"")


@pytest.mark.parametrize(
    "line", [["--help"], ["-h"], [], ["-v"], ["--gpux", "img"], ["-vx", "img"], ["--clean-env=1", "img"], ["--"]]
)
def test_anything_unusual_is_left_to_the_full_command(line: list[str]) -> None:
    with pytest.raises(NeedsFullParser):
        RunWords.parse(line)


def test_a_wrong_choice_is_named() -> None:
    with pytest.raises(UsageWrong, match="--pull sometimes"):
        RunWords.parse(["--pull", "sometimes", "img"])


def test_an_exec_request_comes_out_as_it_went_in() -> None:
    for sent in (ExecRequest(pid=1), ExecRequest(pid=4194304, image="docker.io/library/debian:12")):
        got = ExecRequest.of_frame(Frame.unpack(sent.frame().pack()))
        assert (got.pid, got.image) == (sent.pid, sent.image)
    assert sorted(ExecRequest.KEYS) == ["image", "pid"]


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [("pid", b"1"), ("pid", b"2")],
        [("pid", b"1"), ("image", b"a"), ("image", b"b")],
        [("pid", b"1"), ("uid", b"0")],
        *(
            [("pid", pid)]
            for pid in (b"", b"0", b"01", b"-1", b"+1", b" 1", b"4194305", b"9" * 40, b"\xd9\xa1", b"self")
        ),
        [("pid", b"1"), ("image", b"\xff")],
    ],
)
def test_a_malformed_exec_request_is_refused(fields: list[tuple[str, bytes]]) -> None:
    with pytest.raises(ProtocolBroken):
        ExecRequest.of_frame(Frame("exec", fields))


def test_options_of_exec_end_at_the_pid() -> None:
    words = ExecWords.parse(["-e", "A=1", "--clean-env", "-w", "/x", "42", "--", "prog", "-e", "--"])
    assert (words.pid, words.env, words.clean_env, words.workdir) == (42, (b"A=1",), True, b"/x")
    assert words.command == (b"prog", b"-e", b"--")
    assert ExecWords.parse(["42", "prog"]).command == (b"prog",)
    with pytest.raises(NoCommand):
        ExecWords.parse(["42", "--"])
    for line in (["-v", "/a", "42", "x"], ["--help"], []):
        with pytest.raises(NeedsFullParser):
            ExecWords.parse(line)
