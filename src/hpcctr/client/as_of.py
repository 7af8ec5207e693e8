"""Since when a job runs: names mean in it what they meant then, whatever is pulled meanwhile.

``HPCCTR_AS_OF`` where it is set, by a user or by a prolog of the site's: seconds since 1970, a time as RFC 3339 writes
it, or ``now``. Else what Slurm tells (``SLURM_JOB_START_TIME``; 24.11 does, 22.05 does not). A claim, as all of a
request is: the engine looks for it only among what the caller may have anyway.
"""

from __future__ import annotations

from hpcctr.errors import UsageWrong
from hpcctr.request import AS_OF_DIGITS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

VARIABLE = b"HPCCTR_AS_OF"
#: Of schedulers: seconds since 1970, the same for all tasks of a job.
JOB_START_VARIABLES = (b"SLURM_JOB_START_TIME",)
_SHAPE = "dddd-dd-ddtdd:dd:dd"
_DAYS_BEFORE = (0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334)


def job_start(environment: Mapping[bytes, bytes]) -> int | None:
    """Seconds since 1970; None outside of jobs and for ``now``. Raises :class:`UsageWrong` for a wrong variable."""
    said = environment.get(VARIABLE, b"")
    if said:
        return None if said == b"now" else seconds(said.decode("ascii", "replace"))
    for name in JOB_START_VARIABLES:
        text = environment.get(name, b"")
        if text.isdigit() and len(text) <= AS_OF_DIGITS and int(text):
            return int(text)
    return None


def seconds(text: str) -> int:
    """Seconds since 1970, from a number or from RFC 3339 (``2026-11-24T12:00:00Z``; parts of a second are dropped).

    Raises :class:`UsageWrong`.
    """
    if text.isascii() and text.isdigit() and len(text) <= AS_OF_DIGITS:
        return int(text)
    head, zone = text[:19].lower().replace(" ", "t"), text[19:]
    if len(text) > 40 or "".join("d" if char in "0123456789" else char for char in head) != _SHAPE:
        raise _wrong(text)
    if zone.startswith("."):
        zone = zone[1:].lstrip("0123456789")
    year, month, day = int(head[:4]), int(head[5:7]), int(head[8:10])
    hour, minute, second = int(head[11:13]), int(head[14:16]), int(head[17:19])
    if year < 1970 or not 1 <= month <= 12 or not 1 <= day <= 31 or hour > 23 or minute > 59 or second > 60:
        raise _wrong(text)
    since_march = year if month > 2 else year - 1
    leap_days = since_march // 4 - since_march // 100 + since_march // 400 - 477
    days = (year - 1970) * 365 + _DAYS_BEFORE[month - 1] + leap_days + day - 1
    return max(0, days * 86400 + hour * 3600 + minute * 60 + second - _offset(zone, text))


def _offset(zone: str, text: str) -> int:
    """Seconds east of Greenwich."""
    if zone in ("Z", "z"):
        return 0
    if len(zone) == 6 and zone[0] in "+-" and zone[3] == ":" and (zone[1:3] + zone[4:]).isdigit() and zone.isascii():
        return (1 if zone[0] == "+" else -1) * (int(zone[1:3]) * 3600 + int(zone[4:]) * 60)
    raise _wrong(text)


def _wrong(text: str) -> UsageWrong:
    return UsageWrong(
        f"HPCCTR_AS_OF={text[:60]!r}: neither seconds since 1970 nor a time with its zone",
        hint="for instance 2026-11-24T12:00:00Z, or now",
    )
