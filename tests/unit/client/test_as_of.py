"""Since when a job runs, from what schedulers and people write."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcctr.client.as_of import job_start, seconds
from hpcctr.errors import UsageWrong

_moments = st.datetimes(datetime(1971, 1, 1), datetime(2199, 12, 31)).map(lambda moment: moment.replace(microsecond=0))


@given(_moments, st.integers(-14 * 60, 14 * 60), st.sampled_from(["T", "t", " "]))
def test_a_time_is_read_as_the_standard_library_reads_it(moment: datetime, minutes: int, sign: str) -> None:
    there = moment.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    assert seconds(there.isoformat(sep=sign)) == int(there.timestamp())
    utc = moment.replace(tzinfo=UTC)
    for text in (moment.strftime("%Y-%m-%dT%H:%M:%SZ"), moment.strftime("%Y-%m-%dT%H:%M:%S.25z")):
        assert seconds(text) == int(utc.timestamp()) == seconds(str(int(utc.timestamp())))


@pytest.mark.parametrize(
    "text",
    [
        "-1", "1.5", "9" * 12, "yesterday", "2026-11-24", "2026-11-24T12:00:00", "2026-13-01T00:00:00Z",
        "2026-00-01T00:00:00Z", "2026-11-24T24:00:00Z", "2026-11-24T12:00:00+1:00", "2026-11-24T12:00:00Zx",
        "1969-01-01T00:00:00Z", "٢٠٢٦-11-24T12:00:00Z", "2026-11-24T12:00:00." + "1" * 99 + "Z", "NOW",
    ],
)  # fmt: skip
def test_what_is_no_moment_is_refused(text: str) -> None:
    with pytest.raises(UsageWrong, match="HPCCTR_AS_OF"):
        job_start({b"HPCCTR_AS_OF": text.encode()})


def test_what_is_said_comes_before_what_the_scheduler_tells() -> None:
    slurm = {b"SLURM_JOB_START_TIME": b"100"}
    assert job_start({}) is None
    assert job_start(slurm) == 100
    assert job_start({**slurm, b"HPCCTR_AS_OF": b""}) == 100
    assert job_start({**slurm, b"HPCCTR_AS_OF": b"1970-01-01T00:00:07Z"}) == 7
    assert job_start({**slurm, b"HPCCTR_AS_OF": b"now"}) is None
    for odd in (b"", b"0", b"-5", b"Unknown", b"9" * 30):
        assert job_start({b"SLURM_JOB_START_TIME": odd}) is None
