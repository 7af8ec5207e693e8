"""enter's parsers, fed by a fuzzer that follows their coverage and compares them with a second reading of the bytes:
tests/fuzz/enter. A few seconds here; `tests/fuzz/enter/run SECONDS` goes on as long as one likes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

_PLACE = Path(__file__).parent.parent / "fuzz/enter"
_TARGETS = ("plan", "mountinfo", "control", "report")
_SECONDS = 3


def _fuzz(target: str, seconds: int, work: Path) -> subprocess.CompletedProcess[str]:
    command = [str(_PLACE / "run"), str(seconds), target, "--work", str(work)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("target", _TARGETS)
def test_a_parser_of_enter_reads_what_its_second_reading_reads(target: str, tmp_path: Path) -> None:
    ended = _fuzz(target, _SECONDS, tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = json.loads(ended.stdout)
    assert told["findings"] == []
    # More than the corpus of the repository, and further than its first input.
    assert told["executions"] > len(list((_PLACE / "corpus" / target).iterdir()))
    assert told["edges"] > 10


def test_every_target_of_the_fuzzer_is_tried_here() -> None:
    assert set(_TARGETS) == {file.stem for file in _PLACE.glob("*.c")}


def test_the_fuzzer_finds_a_parser_that_takes_too_much(tmp_path: Path) -> None:
    """What it would say if one of the checks were missing: the same harness, with enter's source changed."""
    sources = tmp_path / "src/hpcctr/enter"
    sources.mkdir(parents=True)
    enter = _PLACE.parents[2] / "src/hpcctr/enter"
    for file in [*enter.glob("*.h"), *enter.glob("*.c")]:
        (sources / file.name).write_text(file.read_text())
    plan = sources / "plan.h"
    check = "if (is_at_or_beneath(mount->target, HPCCTR_RUN))"
    assert check in plan.read_text()
    plan.write_text(plan.read_text().replace(check, 'if (equal(mount->target, "/run/hpcctr"))'))
    place = tmp_path / "tests/fuzz/enter"
    place.parent.mkdir(parents=True)
    subprocess.run(["cp", "-r", _PLACE, place], check=True)
    ended = subprocess.run(
        [place / "run.py", "0", "plan", "--work", tmp_path / "work"], capture_output=True, check=False
    )
    assert ended.returncode == 1
    (finding,) = json.loads(ended.stdout)["findings"]
    assert b"/run/hpcctr/x" in Path(finding).read_bytes()
