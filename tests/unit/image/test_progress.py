"""Progress is reported from several threads, not too often, and ends at its total."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from hpcctr.image.claims import Watch, held, take
from hpcctr.image.progress import Progress, ProgressReport


def test_counters_add_up_across_threads_and_end_at_their_total() -> None:
    seen: list[Progress] = []
    add = ProgressReport(seen.append).counter("download", 4000)
    threads = [threading.Thread(target=lambda: [add(1) for _ in range(1000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen[-1] == Progress(stage="download", done=4000, total=4000)
    assert len(seen) < 100


def test_a_stage_can_be_told_how_far_it_is() -> None:
    seen: list[Progress] = []
    report = ProgressReport(seen.append)
    tell = report.absolute("write")
    for done in range(1, 11):
        tell(done, 10)
    report.finish("write")
    assert seen[0].stage == "write"
    assert seen[-1] == Progress(stage="write", done=10, total=10)


def test_a_stage_without_bytes_ends_as_well() -> None:
    seen: list[Progress] = []
    ProgressReport(seen.append).finish("write")
    assert seen == [Progress(stage="write", done=0, total=0)]


def test_another_processs_work_is_passed_on(tmp_path: Path) -> None:
    seen: list[Progress] = []
    claim = take(str(tmp_path / "claim"), since="2026-01-01T00:00:00Z")
    assert claim is not None
    claim.tell("download", 3, 7)
    watch = Watch(directory=str(tmp_path / "claim"))
    ProgressReport(seen.append).waiting(watch)
    assert seen == []
    with held(claim):
        watch.look()
        ProgressReport(seen.append).waiting(watch)
    (step,) = seen
    assert (step.stage, step.done, step.total) == ("wait", 3, 7)
    assert step.waiting is not None
    assert (step.waiting.pid, step.waiting.since, step.waiting.stage) == (
        os.getpid(),
        "2026-01-01T00:00:00Z",
        "download",
    )
