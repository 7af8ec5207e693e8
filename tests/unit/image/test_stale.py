"""ESTALE is looked up again, for a while; nothing else is."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from hpcctr.image import stale
from hpcctr.image.stale import looked_up_again


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stale, "_PAUSES", (0.001,) * 4)


def failing(times: int, number: int) -> tuple[list[int], Callable[[], str]]:
    calls: list[int] = []

    def call() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise OSError(number, "x")
        return "there"

    return calls, call


def test_a_name_that_was_stale_is_looked_up_again() -> None:
    calls, call = failing(3, errno.ESTALE)
    assert looked_up_again(call) == "there"
    assert len(calls) == 4


def test_a_name_that_stays_stale_is_given_up() -> None:
    calls, call = failing(100, errno.ESTALE)
    with pytest.raises(OSError, match="x"):
        looked_up_again(call)
    assert len(calls) == 5


def test_another_error_is_one_at_once() -> None:
    calls, call = failing(1, errno.EACCES)
    with pytest.raises(PermissionError):
        looked_up_again(call)
    assert len(calls) == 1
