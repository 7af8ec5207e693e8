"""Claims: one works, the others wait; a dead one is followed, a suspended one does no harm. Many hosts: tests/e2e."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcctr.errors import ConversionFailed, ImageBroken, StoreUnusable
from hpcctr.image import claims
from hpcctr.image.claims import Claim, ClaimLost, Watch, held, once, take
from tests.support.polling import wait_until


@pytest.fixture
def directory(tmp_path: Path) -> str:
    (tmp_path / "claims").mkdir()
    return claims.directory_of(str(tmp_path), "sha256:" + "a" * 64)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything twenty times as fast."""
    monkeypatch.setattr(claims, "HEARTBEAT", 0.05)
    monkeypatch.setattr(claims, "STALE_AFTER", 0.6)
    monkeypatch.setattr(claims, "_LOOK_FIRST", 0.02)
    monkeypatch.setattr(claims, "_LOOK_LAST", 0.05)


def taken(directory: str, watch: Watch | None = None) -> Claim:
    claim = take(directory, since="then", watch=watch)
    assert claim is not None
    return claim


def dead(directory: str) -> Claim:
    """A claim whose holder has beaten once and is gone."""
    claim = taken(directory)
    claim._beat()
    return claim


def watched_to_death(directory: str) -> Watch:
    watch = Watch(directory=directory)
    wait_until(watch.look, what="a stale claim")
    return watch


def bring(directory: str, work: Callable[[Claim], None], is_done: Callable[[], bool]) -> bool:
    return once(directory, is_done=lambda _: is_done(), work=work, waiting=lambda _: None, now=lambda: "now")


def test_a_claim_is_one_workers(directory: str) -> None:
    claim = taken(directory)
    assert take(directory, since="now") is None
    with held(claim):
        claim.require_held()
        assert take(directory, since="now") is None
    assert not os.path.exists(directory)
    assert taken(directory).number == 1


def test_of_many_at_once_one_gets_it(directory: str) -> None:
    for _ in range(20):
        got: list[Claim | None] = []
        start = threading.Barrier(8)

        def run(start: threading.Barrier = start, got: list[Claim | None] = got) -> None:
            start.wait()
            got.append(take(directory, since="now"))

        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (claim,) = [claim for claim in got if claim is not None]
        claim.require_held()
        claim.end()


def test_who_works_and_how_far_it_is_can_be_seen(directory: str, quick: None) -> None:
    with held(taken(directory)) as claim:
        claim.tell("download", 7, 9)
        watch = Watch(directory=directory)

        def seen() -> bool:
            watch.look()
            return watch.beat is not None and watch.beat.done == 7

        wait_until(seen, what="the beat")
        assert watch.worker is not None
        assert (watch.worker.host, watch.worker.pid, watch.worker.since) == (os.uname().nodename, os.getpid(), "then")
        assert watch.beat is not None
        assert (watch.beat.stage, watch.beat.total) == ("download", 9)


def test_a_failure_lets_the_next_one_in_at_once(directory: str) -> None:
    with pytest.raises(KeyboardInterrupt), held(taken(directory)):
        raise KeyboardInterrupt
    watch = Watch(directory=directory)
    assert watch.look()
    with held(taken(directory, watch)) as claim:
        assert claim.number == 2
        assert len([name for name in os.listdir(directory) if name.isdigit() and len(name) == 9]) == 1
    assert not os.path.exists(directory)


def test_a_living_claim_is_never_stale_whatever_the_clocks_say(directory: str, quick: None) -> None:
    with held(taken(directory)) as claim:
        watch = Watch(directory=directory)
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            # A file server's clock that is years off is nobody's concern.
            with contextlib.suppress(FileNotFoundError):
                os.utime(f"{directory}/{claim.worker.token}", (1, 1))
            assert not watch.look()
            time.sleep(0.02)


def test_a_dead_workers_claim_is_taken_over_by_one_of_many(directory: str, quick: None) -> None:
    gone = dead(directory)
    assert take(directory, since="now") is None
    watches = [watched_to_death(directory) for _ in range(4)]
    claims_got = [claim for watch in watches if (claim := take(directory, since="now", watch=watch))]
    assert len(claims_got) == 1
    claims_got[0].require_held()
    with pytest.raises(ClaimLost):
        gone.require_held()


def test_a_worker_that_died_before_its_first_beat_is_followed(directory: str, quick: None) -> None:
    taken(directory)
    taken(directory, watched_to_death(directory)).require_held()


def test_a_claim_that_cannot_be_read_is_followed(directory: str, quick: None) -> None:
    os.mkdir(directory)
    Path(directory, "000000001").write_bytes(b"\xff")
    taken(directory, watched_to_death(directory)).require_held()


def test_the_watchers_own_sleep_is_not_held_against_the_worker(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dead(directory)
    watch = Watch(directory=directory)
    assert not watch.look()
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + 3600)
    assert not watch.look()


def test_a_suspended_worker_notices_and_gives_up(directory: str, quick: None) -> None:
    suspended = dead(directory)
    successor = taken(directory, watched_to_death(directory))
    # It goes on: its thread looks before it beats.
    suspended.begin()
    wait_until(suspended._lost.is_set, what="the notice")
    with pytest.raises(ClaimLost):
        suspended.tell("write", 1, 2)
    suspended.end(ClaimLost())
    successor.require_held()
    assert not os.path.exists(f"{directory}/{suspended.worker.token}")


@pytest.mark.parametrize("error", [None, ImageBroken("x"), KeyboardInterrupt()])
def test_the_end_of_one_that_lost_its_claim_takes_nothing_from_its_successor(
    directory: str, quick: None, error: BaseException | None
) -> None:
    suspended = dead(directory)
    successor = taken(directory, watched_to_death(directory))
    suspended.end(error)
    successor.require_held()
    assert take(directory, since="now") is None


def test_a_full_filesystem_does_not_make_a_worker_look_dead(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = dead(directory)
    watch = Watch(directory=directory)
    watch.look()
    before = watch._sign

    def full(path: str, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(claims, "_write", full)
    claim._beat()
    watch.look()
    assert watch._sign != before


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreUnusable, match="claims"):
        take(claims.directory_of(str(tmp_path), "sha256:x"), since="now")


# once


def test_the_work_is_done_once_and_everybody_returns(directory: str, quick: None) -> None:
    worked: list[int] = []
    results: list[bool] = []

    def work(claim: Claim) -> None:
        time.sleep(0.2)
        worked.append(1)

    threads = [
        threading.Thread(target=lambda: results.append(bring(directory, work, lambda: bool(worked)))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(results) == [False] * 7 + [True]
    assert worked == [1]
    assert not os.path.exists(directory)


def waiting_meanwhile(directory: str, work: Callable[[Claim], None]) -> BaseException | bool:
    """What comes of one that waits while another one, which it has seen, works."""
    seen, outcome = threading.Event(), list[BaseException | bool]()
    worked: list[int] = []

    def wait() -> None:
        try:
            outcome.append(
                once(
                    directory,
                    is_done=lambda _: bool(worked),
                    work=lambda _: worked.append(1),
                    waiting=lambda _: seen.set(),
                    now=lambda: "now",
                )
            )
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=wait)
    with contextlib.suppress(Exception), held(taken(directory)) as claim:
        thread.start()
        assert seen.wait(20)
        work(claim)
    thread.join(20)
    return outcome[0]


def test_what_is_wrong_with_the_image_is_told_to_all_who_waited(directory: str, quick: None) -> None:
    def fail(_: Claim) -> None:
        raise ImageBroken("layer 1 is broken", hint="push it again")

    error = waiting_meanwhile(directory, fail)
    assert isinstance(error, ImageBroken)
    assert "layer 1 is broken (tried by" in str(error)
    assert error.hint == "push it again"
    # Who comes afterwards tries it again.
    assert taken(directory).worker.failures == 1


def test_a_nodes_own_trouble_is_not_everybodys(directory: str, quick: None) -> None:
    def fail(_: Claim) -> None:
        raise ConversionFailed("killed")

    assert waiting_meanwhile(directory, fail) is True


def test_a_trouble_on_every_node_is_everybodys(directory: str, quick: None) -> None:
    for number in range(2):
        with pytest.raises(ConversionFailed), held(taken(directory)) as claim:
            assert claim.worker.failures == number
            raise ConversionFailed("killed")

    def fail(_: Claim) -> None:
        raise ConversionFailed("killed")

    assert isinstance(waiting_meanwhile(directory, fail), ConversionFailed)


def test_who_loses_the_claim_waits_for_the_successor(directory: str, quick: None) -> None:
    done: list[int] = []

    def work(claim: Claim) -> None:
        if claim.number == 1:
            # Somebody else has followed meanwhile, and is dead by now.
            os.link(f"{directory}/000000001", f"{directory}/000000002")
            claim.require_held()
        done.append(claim.number)

    assert bring(directory, work, lambda: bool(done)) is True
    assert done == [3]
