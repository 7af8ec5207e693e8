"""Work in threads that may be left behind."""

from __future__ import annotations

import threading
import time

from hpcctr.engine.deadline import all_within


def test_all_are_done_at_once_and_each_is_told_of() -> None:
    both = threading.Barrier(2)

    def meet() -> None:
        both.wait(10)

    assert all_within(20, [meet, meet]) == [True, True]
    assert all_within(20, []) == []


def test_what_hangs_is_left_behind_and_told_of() -> None:
    end = threading.Event()
    done: list[str] = []

    def hang() -> None:
        end.wait(20)
        done.append("late")

    begun = time.monotonic()
    assert all_within(0.2, [hang, lambda: done.append("at once"), hang]) == [False, True, False]
    assert 0.2 <= time.monotonic() - begun < 5 and done == ["at once"]
    end.set()
