"""How far a pull is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from hpcctr.errand import Progressed
from hpcctr.image.claims import Watch

#: Seconds between two reports.
_EVERY = 0.1

Stage = Literal["download", "read", "write", "wait"]


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Who does the work this process waits for: host and pid, since when on that host's clock, for how many seconds,
    and the worker's own stage, empty at its beginning."""

    host: str
    pid: int
    since: str
    elapsed: float
    stage: str

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a pull is: compressed bytes downloaded, compressed bytes of layers read, bytes of files written; or, when
    another process does it (``wait``), where that one is."""

    stage: Stage
    done: int
    total: int
    waiting: Waiting | None = None

    def said(self) -> Progressed:
        """The same as a storekeeper says it."""
        who, doing = (str(self.waiting), self.waiting.stage) if self.waiting is not None else ("", "")
        return Progressed(stage=self.stage, done=self.done, total=self.total, who=who, doing=doing)


class ProgressReport:
    """Passes progress on, not more often than a person can see."""

    def __init__(self, progress: Callable[[Progress], None]) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._last = 0.0
        self._state: dict[Stage, tuple[int, int]] = {}

    def counter(self, stage: Stage, total: int) -> Callable[[int], None]:
        """A function that is told how many bytes more are done."""
        self._set(stage, 0, total)

        def add(count: int) -> None:
            with self._lock:
                self._set(stage, self._state[stage][0] + count, total)

        return add

    def absolute(self, stage: Stage) -> Callable[[int, int], None]:
        """A function that is told how many bytes are done, and of how many."""
        return lambda done, total: self._set(stage, done, total)

    def finish(self, stage: Stage) -> None:
        """All of a stage is done."""
        total = self._state.get(stage, (0, 0))[1]
        self._progress(Progress(stage=stage, done=total, total=total))

    def waiting(self, watch: Watch) -> None:
        """Another process does the work."""
        worker, beat = watch.worker, watch.beat
        if worker is None:
            return
        self._progress(
            Progress(
                stage="wait",
                done=beat.done if beat else 0,
                total=beat.total if beat else 0,
                waiting=Waiting(
                    host=worker.host,
                    pid=worker.pid,
                    since=worker.since,
                    elapsed=beat.elapsed if beat else 0.0,
                    stage=beat.stage if beat else "",
                ),
            )
        )

    def _set(self, stage: Stage, done: int, total: int) -> None:
        self._state[stage] = (done, total)
        moment = time.monotonic()
        if done >= total or moment >= self._last + _EVERY:
            self._last = moment
            self._progress(Progress(stage=stage, done=done, total=total))
