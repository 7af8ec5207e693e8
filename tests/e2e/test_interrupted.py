"""Whatever is killed, and whenever: running programs do not notice, a new launch gets its program or a named error in
bounded time, and nothing stays behind.

The moments are random; each test prints its seed. A sleep here is the random moment, never a way to wait for something.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest

from tests.e2e.conftest import Profile
from tests.support.leftovers import Leftovers
from tests.support.node import Node
from tests.support.polling import wait_until

pytestmark = [pytest.mark.root, pytest.mark.containerd]

#: Seconds each loop may take, and within which a launch has to be over.
LOOP = 6.0
BOUND = 30.0


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A launch at its end."""

    status: int
    out: bytes
    err: bytes
    seconds: float


@pytest.fixture
def dice() -> random.Random:
    """Random moments, the same again for the same seed."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


@contextlib.contextmanager
def _bystanders(profile: Profile) -> Iterator[None]:
    """Programs that run meanwhile and answer at the end as at the beginning: in a view with mounts of its own, and a
    child of one in the background.
    """
    script = "sleep 600 & echo ready; while read word; do echo $word $(ls /there); done; kill $!"
    place = profile.node.host.root / "there"
    place.mkdir(mode=0o755, exist_ok=True)
    (place / "file").touch()
    started = [profile.start("sh", "-c", script, flags=["-v", f"{place}:/there"])[0] for _ in range(2)]
    yield
    for process in started:
        assert process.poll() is None
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"still\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"still file\n"
        process.communicate(timeout=20)
        assert process.returncode == 0


def _launch(profile: Profile, *command: str, flags: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    return profile.node.popen(
        "run", *flags, profile.image, "--", *command, user=profile.user, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def _end(process: subprocess.Popen[bytes]) -> Ended:
    """The end of a launch, within the bound."""
    begun = time.monotonic()
    out, err = process.communicate(timeout=BOUND)
    return Ended(status=process.returncode, out=out, err=err, seconds=time.monotonic() - begun)


def _require_program_or_named_error(ended: Ended, *, out: bytes) -> None:
    if ended.status == 0:
        assert (ended.out, ended.err) == (out, b"")
    else:
        assert ended.status in (125, 126), ended
        assert ended.out == b"" and ended.err.startswith(b"hpcctr: error["), ended
        assert b"error[failed]" not in ended.err and b"Traceback" not in ended.err, ended


def _require_nothing_new(before: Leftovers, *, but: Sequence[str] = ("engine serve",)) -> None:
    """Nothing is new but the daemons that were started again. What the engine could not remove it tries again."""

    def new() -> list[str]:
        found = before.again().new_since(before)
        return [thing for thing in found if not any(word in thing for word in but)]

    wait_until(lambda: not new(), seconds=50, what=lambda: "the end of\n  " + "\n  ".join(new()))


def _rounds(seconds: float = LOOP) -> Iterator[int]:
    """Numbers until the time is up."""
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end:
        yield number
        number += 1


def test_clients_killed_at_any_point_leave_nothing(own_node_with_busybox: Profile, dice: random.Random) -> None:
    profile = own_node_with_busybox
    engine = profile.node.engine.process.pid
    before = Leftovers.of(profile.node.host, profile.node.containerd)
    ends: list[int] = []

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{engine}/fd"))

    with _bystanders(profile):
        profile.run("true")
        held = descriptors()
        for number in _rounds():
            # A target of its own: the container is built for this launch.
            flags = ["-v", f"/var:/built{number}"] if dice.random() < 0.3 else []
            process = _launch(profile, "echo", "hello", flags=flags)
            time.sleep(dice.uniform(0, 0.25 if flags else 0.05))
            process.send_signal(dice.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)))
            ends.append(_end(process).status)
        assert profile.output("echo", "after") == "after\n"
        # Those killed at all points were some before and some after their program's end.
        assert any(status < 0 for status in ends)
        wait_until(
            lambda: descriptors() <= held, what=lambda: f"{descriptors()} descriptors of the engine to be {held}"
        )
    print(f"{len(ends)} launches, {sum(status < 0 for status in ends)} killed")
    _require_nothing_new(before)


def test_many_clients_killed_together_leave_nothing(own_node_with_busybox: Profile, dice: random.Random) -> None:
    profile = own_node_with_busybox
    before = Leftovers.of(profile.node.host, profile.node.containerd)
    with _bystanders(profile):
        for _ in _rounds(4):
            together = [_launch(profile, "echo", "hello") for _ in range(8)]
            time.sleep(dice.uniform(0, 0.25))
            for process in together:
                process.kill()
            for process in together:
                assert _end(process).status in (0, -signal.SIGKILL)
        assert profile.output("echo", "after") == "after\n"
    _require_nothing_new(before)


def _launches_while(
    profile: Profile, dice: random.Random, interrupt: Callable[[], None], *, longest: float
) -> list[Ended]:
    """Rounds of launches, of which some build a container, with an interruption at a random moment."""
    ended: list[Ended] = []
    for number in _rounds():
        together = [
            _launch(profile, "echo", "hello"),
            _launch(profile, "echo", "hello", flags=["-v", f"/var:/built{number}"]),
            _launch(profile, "echo", "hello", flags=["-v", f"/var:/also{number % 2}"]),
        ]
        time.sleep(dice.uniform(0, longest))
        interrupt()
        ended += [_end(process) for process in together]
        for one in ended[-3:]:
            _require_program_or_named_error(one, out=b"hello\n")
    print(
        f"{len(ended)} launches, {sum(one.status != 0 for one in ended)} refused, the slowest took "
        f"{max(one.seconds for one in ended):.1f} s: {sorted({one.err.split(b']')[0].decode() for one in ended})}"
    )
    return ended


def _require_launches_again(profile: Profile) -> None:
    """Soon, every launch gets its program: also one that needs a new container."""
    begun = time.monotonic()

    def works() -> bool:
        return _end(_launch(profile, "echo", "again", flags=["-v", "/var:/new"])).out == b"again\n"

    wait_until(works, seconds=BOUND, what="a launch that gets its program")
    assert time.monotonic() - begun < BOUND
    assert profile.output("echo", "again") == "again\n"


def test_an_engine_killed_at_any_point_of_a_launch(own_node_with_busybox: Profile, dice: random.Random) -> None:
    profile = own_node_with_busybox
    before = Leftovers.of(profile.node.host, profile.node.containerd)
    with _bystanders(profile):
        ended = _launches_while(profile, dice, lambda: profile.node.engine.restart(kill=True), longest=0.2)
        assert ended
        _require_launches_again(profile)
    _require_nothing_new(before)


def test_an_engine_stopped_at_any_point_of_a_launch(own_node_with_busybox: Profile, dice: random.Random) -> None:
    profile = own_node_with_busybox
    before = Leftovers.of(profile.node.host, profile.node.containerd)
    with _bystanders(profile):
        assert _launches_while(profile, dice, lambda: profile.node.engine.restart(), longest=0.2)
        _require_launches_again(profile)
    _require_nothing_new(before)


def test_a_launch_without_an_engine_is_a_named_error_within_seconds(own_node_with_busybox: Profile) -> None:
    profile = own_node_with_busybox
    with _bystanders(profile):
        profile.node.engine.stop(kill=True)
        ended = _end(_launch(profile, "true"))
        assert ended.status == 125
        assert ended.err.startswith(b"hpcctr: error[no-engine]") and b"hint: " in ended.err
        assert ended.seconds < 10
        profile.node.engine.restart()
        _require_launches_again(profile)


def test_containerd_killed_at_any_point_of_a_launch(own_node_with_busybox: Profile, dice: random.Random) -> None:
    profile = own_node_with_busybox
    before = Leftovers.of(profile.node.host, profile.node.containerd)
    with _bystanders(profile):
        assert _launches_while(profile, dice, lambda: profile.node.containerd.restart(kill=True), longest=0.2)
        _require_launches_again(profile)
    _require_nothing_new(before, but=("engine serve", "containerd --config", "ctr --address"))


def test_without_containerd_programs_run_on_and_known_containers_are_entered(own_node_with_busybox: Profile) -> None:
    profile = own_node_with_busybox
    process = profile.start()[0]
    containerd = profile.node.containerd
    containerd.process.kill()
    containerd.process.wait(30)
    assert profile.output("echo", "known") == "known\n"
    ended = _end(_launch(profile, "true", flags=["-v", "/var:/unknown"]))
    assert ended.status == 125
    assert ended.err.startswith(b"hpcctr: error[no-containerd]") and b"hint: " in ended.err
    process.communicate()
    containerd.restart()
    _require_launches_again(profile)


def _shims(node: Node) -> list[int]:
    return [process.pid for process in node.host.processes() if process.name.startswith("containerd-shim")]


def test_shims_killed_at_any_point_of_a_launch(own_node_with_busybox: Profile, dice: random.Random) -> None:
    profile = own_node_with_busybox
    before = Leftovers.of(profile.node.host, profile.node.containerd)

    def kill_shims() -> None:
        for pid in _shims(profile.node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    with _bystanders(profile):
        assert _shims(profile.node)
        assert _launches_while(profile, dice, kill_shims, longest=0.2)
        _require_launches_again(profile)
    _require_nothing_new(before)


def test_anchors_killed_at_any_point_of_a_launch(own_node_with_busybox: Profile, dice: random.Random) -> None:
    """They run as their user, who may kill them whenever they like."""
    profile = own_node_with_busybox
    before = Leftovers.of(profile.node.host, profile.node.containerd)

    def kill_anchors() -> None:
        for process in profile.node.host.processes():
            if process.uid == profile.uid and process.name.startswith("runc"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)

    with _bystanders(profile):
        assert _launches_while(profile, dice, kill_anchors, longest=0.2)
        _require_launches_again(profile)
    _require_nothing_new(before)


def test_a_direct_launch_killed_at_any_point_is_cleared_away_by_the_next(
    own_node_with_busybox: Profile, dice: random.Random
) -> None:
    node = own_node_with_busybox.node
    direct = Profile(name="direct", node=node, user=None, image=own_node_with_busybox.image)
    before = Leftovers.of(node.host, node.containerd)
    with _bystanders(own_node_with_busybox):
        for _ in _rounds():
            process = _launch(direct, "echo", "hello")
            time.sleep(dice.uniform(0, 0.8))
            process.kill()
            _end(process)
        assert direct.output("echo", "after") == "after\n"
    _require_nothing_new(before)


def test_everything_is_killed_and_programs_run_on(own_node_with_busybox: Profile) -> None:
    profile = own_node_with_busybox
    before = Leftovers.of(profile.node.host, profile.node.containerd)
    with _bystanders(profile):
        profile.node.engine.stop(kill=True)
        for pid in _shims(profile.node):
            os.kill(pid, signal.SIGKILL)
        profile.node.containerd.restart(kill=True)
        profile.node.engine.restart()
        _require_launches_again(profile)
    _require_nothing_new(before, but=("engine serve", "containerd --config", "ctr --address"))
