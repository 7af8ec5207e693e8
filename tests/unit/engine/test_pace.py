"""How fast one user may be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hpcctr.engine.pace import Pace


def test_a_burst_is_free_and_what_follows_waits_its_turn() -> None:
    pace = Pace(burst=3)
    delays = [pace.delay(1000, per_second=2.0, now=10.0) for _ in range(5)]
    assert delays == [0.0, 0.0, 0.0, 0.5, 1.0]


def test_a_user_who_rests_has_the_burst_again() -> None:
    pace = Pace(burst=2)
    for _ in range(4):
        pace.delay(1000, per_second=1.0, now=0.0)
    assert pace.delay(1000, per_second=1.0, now=100.0) == 0.0


def test_one_users_haste_delays_nobody_else() -> None:
    pace = Pace(burst=1)
    for _ in range(100):
        pace.delay(1000, per_second=1.0, now=0.0)
    assert pace.delay(1001, per_second=1.0, now=0.0) == 0.0


def test_many_users_are_not_remembered_for_ever() -> None:
    pace = Pace(burst=1)
    for uid in range(5000):
        pace.delay(uid, per_second=1.0, now=float(uid))
    assert len(pace._due) < 1100


@given(
    steps=st.lists(st.floats(min_value=0, max_value=5), min_size=1, max_size=60),
    burst=st.integers(min_value=1, max_value=10),
    rate=st.floats(min_value=0.1, max_value=100),
)
def test_over_any_span_no_more_begin_than_burst_and_rate_allow(steps: list[float], burst: int, rate: float) -> None:
    pace = Pace(burst=burst)
    now = 0.0
    begun = []
    for step in steps:
        now += step
        begun.append(now + pace.delay(7, per_second=rate, now=now))
    begun.sort()
    for first in range(len(begun)):
        for last in range(first, len(begun)):
            span = begun[last] - begun[first]
            assert last - first + 1 <= burst + span * rate + 1e-6
