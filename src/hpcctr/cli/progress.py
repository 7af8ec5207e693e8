"""How far a pull is, for people on stderr: bars on a terminal, a line for each stage elsewhere."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from hpcctr.cli.table import printable, size
from hpcctr.errand import Progressed

_STAGES = {"download": "downloading", "read": "reading layers", "write": "writing image"}


class Shown(Protocol):
    """Where progress goes."""

    def update(self, progress: Progressed) -> None: ...


def shown(text: str) -> AbstractContextManager[Shown]:
    """Progress of bringing ``text``."""
    return _Bars(text) if sys.stderr is not None and sys.stderr.isatty() else nullcontext(_Lines(text))


def say(text: str) -> None:
    """A line for people, beside the result on stdout."""
    if sys.stderr is not None:  # 2 is closed
        print(text, file=sys.stderr, flush=True)  # noqa: T201


def _words(progress: Progressed) -> str:
    """What is going on."""
    if progress.stage == "wait":
        doing = _STAGES.get(progress.doing, "")
        return f"{printable(progress.who)} brings it{doing and f': {doing}'}"
    return _STAGES.get(progress.stage, printable(progress.who))


class _Lines:
    def __init__(self, text: str) -> None:
        self._text = text
        self._last = ""

    def update(self, progress: Progressed) -> None:
        words = _words(progress)
        if words != self._last:
            self._last = words
            total = f" of {size(progress.total)}" if progress.total else ""
            say(f"{self._text}: {words}{total}")


class _Bars:
    def __init__(self, text: str) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._text = text
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, progress: Progressed) -> None:
        words = _words(progress)
        if progress.stage == "note":
            self._progress.console.print(f"{self._text}: {words}", markup=False, highlight=False)
            return
        if words not in self._tasks:
            self._tasks[words] = self._progress.add_task(words)
        self._progress.update(self._tasks[words], completed=progress.done, total=progress.total)
