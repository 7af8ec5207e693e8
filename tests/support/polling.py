"""Waiting for something to become true, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], *, seconds: float = 20, what: str | Callable[[], str] = "condition") -> T:
    """Ask again and again, and return the first true answer. After `seconds` the test fails and names `what`."""
    deadline = time.monotonic() + seconds
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds} s in vain for {what if isinstance(what, str) else what()}")
        time.sleep(0.02)
