"""A short soak: everybody launches, half is killed, everything is restarted, every caller gets the program or a named
error, and nothing stays behind. scripts/soak runs long ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.soak import KINDS, Ground, Outcome, Plan, Sample, fault_of, ground, soak

pytestmark = [pytest.mark.root, pytest.mark.containerd]


@pytest.fixture(scope="module")
def on() -> Iterator[Ground]:
    with ground(8) as made:
        yield made


def test_whatever_is_killed_and_restarted_every_caller_gets_the_program_or_a_named_error(on: Ground) -> None:
    outcome = soak(Plan(launches=300, at_once=64, seed=20, rounds=2), on)
    print(outcome.summary())
    assert outcome.faults() == []
    assert len(outcome.ended) == 300
    assert set(outcome.done.values()) == {2}
    assert {one["kind"] for one in outcome.ended} == set(KINDS)
    # The seed has it that all of this happened: programs that ran, callers that were killed.
    assert sum(one["status"] == 0 for one in outcome.ended) > 10
    assert sum(one["status"] == -9 for one in outcome.ended) > 10


def test_ordered_restarts_and_reloads_of_the_engine_lose_no_launch(on: Ground) -> None:
    plan = Plan(
        launches=100,
        at_once=32,
        seed=21,
        rounds=2,
        killed=0.2,
        disturbances=("engine-stop", "reload"),
        kinds=("run", "target", "while"),
    )
    outcome = soak(plan, on)
    print(outcome.summary())
    assert outcome.faults() == []
    assert outcome.errors() == {}
    assert outcome.done == {"engine-stop": 2, "reload": 2}


def _one(**changes: object) -> dict[str, object]:
    one = {"kind": "run", "argv": ["hpcctr"], "word": "0.1", "status": 0, "out": "0.1\n", "err": "", "seconds": 0.1}
    return {**one, "killed": False, "stuck": False, **changes}


@pytest.mark.parametrize(
    ("one", "begins"),
    [
        (_one(stuck=True), "stuck"),
        (_one(err="Traceback (most recent call last):\n"), "traceback"),
        (_one(out="0.2\n"), "wrong output"),
        (_one(err="warning"), "wrong output"),
        (_one(status=-9, out=""), "no named error"),
        (_one(status=1, out=""), "no named error"),
        (_one(status=125, out="", err="hpcctr: error[unheard-of]: x\n"), "no named error"),
        (_one(status=125, out="", err="hpcctr: error[failed]: x\n"), "no named error"),
        (_one(status=125, err="hpcctr: error[no-engine]: x\n"), "no named error"),
        (_one(status=125, out="", err="hpcctr: error[no-engine]: x\nhint: y\n"), "an error without a cause"),
    ],
)
def test_what_a_soak_must_not_find_is_found(one: dict[str, object], begins: str) -> None:
    fault = fault_of(one, {"no-containerd"})
    assert fault is not None and fault.startswith(begins)


def test_a_soak_takes_what_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert fault_of(_one(), set()) is None
    assert fault_of(_one(status=-9, killed=True, out=""), set()) is None
    assert fault_of(_one(status=125, out="", err="hpcctr: error[no-engine]: x\nhint: y\n"), {"no-engine"}) is None


def test_a_leak_shows_in_the_slope_and_a_flat_line_does_not() -> None:
    def outcome(kib: float) -> Outcome:
        samples = [
            Sample(launches=number * 100, pid=1, kib=int(50_000 + kib * number / 10), descriptors=1, threads=1)
            for number in range(30)
        ]
        return Outcome(plan=Plan(), samples=samples)

    slope = outcome(100).slope()
    assert slope is not None and 99 < slope < 101
    assert outcome(0).slope() == 0
    assert Outcome(plan=Plan()).slope() is None
