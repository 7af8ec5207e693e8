"""What a name means at a moment."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcctr.image.history import known_since, meaning, rfc3339, was_there
from hpcctr.image.record import NameEntry


def _history(*moments: int) -> list[NameEntry]:
    """One meaning at each moment, newest first; digests that differ."""
    return [NameEntry(digest=f"sha256:{moment:064x}", since=rfc3339(moment)) for moment in moments]


HISTORY = _history(300, 200, 100)


@pytest.mark.parametrize(
    ("as_of", "since"),
    [(None, 300), (999, 300), (300, 300), (299, 200), (200, 200), (199, 100), (100, 100), (99, 100), (0, 100)],
)
def test_the_newest_that_was_there_counts_and_else_the_oldest(as_of: int | None, since: int) -> None:
    means = meaning(HISTORY, as_of)
    assert means.entry == HISTORY[(300 - since) // 100]
    assert means.is_past == (since != 300)
    assert (f"now {HISTORY[0].digest[:19]}" in means.because) == means.is_past
    assert ("its first meaning" in means.because) == (as_of is not None and as_of < 100)


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(0, 60), st.lists(st.integers(0, 50), max_size=5)
)
def test_what_is_pulled_during_a_job_changes_nothing_for_it(moments: list[int], start: int, more: list[int]) -> None:
    """Whatever entries come later, with times after the job's start, the job's digest stays."""
    before = _history(*sorted(moments, reverse=True))
    after = [*_history(*sorted((start + 1 + number for number in more), reverse=True)), *before]
    if was_there(before, start):
        assert meaning(after, start).entry == meaning(before, start).entry
    else:
        assert meaning(after, start).entry == before[-1]


def test_who_knows_a_name_since_a_moment_knows_nothing_of_before() -> None:
    assert known_since(HISTORY, rfc3339(250)) == HISTORY[:2]
    assert known_since(HISTORY, rfc3339(300)) == HISTORY[:1]
    assert known_since(HISTORY, rfc3339(99)) == HISTORY


def test_moments_are_written_as_records_have_them() -> None:
    assert rfc3339(0) == "1970-01-01T00:00:00Z"
    assert rfc3339(10**11 - 1) == "5138-11-16T09:46:39Z"
