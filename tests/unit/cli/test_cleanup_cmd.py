"""Work in a child that may hang, and what is printed."""

from __future__ import annotations

import json
import os
import time

import pytest

from hpcctr.cli import cleanup_cmd
from hpcctr.cli.cleanup_cmd import Report
from hpcctr.cli.table import Format
from hpcctr.engine.job import Program
from hpcctr.errors import UsageWrong

PROGRAM = Program(pid=7, uid=1000, name="a\x1b[1mb", state="D")


def test_what_a_child_has_done_comes_back() -> None:
    assert cleanup_cmd._in_child(lambda: {"pids": [os.getpid()]}, 20)["pids"] != [os.getpid()]


def test_a_child_that_hangs_or_fails_is_left_behind() -> None:
    begun = time.monotonic()
    assert cleanup_cmd._in_child(lambda: time.sleep(60), 0.3) is None
    assert time.monotonic() - begun < 10
    assert cleanup_cmd._in_child(lambda: [1 / 0], 20) is None


def test_a_child_keeps_nobodys_output_open(capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> list[str]:
        os.write(1, b"printed")
        return [os.readlink("/proc/self/fd/1"), os.readlink("/proc/self/fd/2")]

    assert cleanup_cmd._in_child(work, 20) == ["/dev/null", "/dev/null"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["", "0", "-1", "1.0", "0x1", "4294967296", "9" * 30])
def test_only_numbers_of_jobs_are_taken(text: str) -> None:
    assert cleanup_cmd._job_number("4294967295") == 2**32 - 1
    with pytest.raises(UsageWrong):
        cleanup_cmd._job_number(text)


def test_the_report_is_lines_or_json_and_nothing_for_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    cleanup_cmd._print(Report(), Format.TABLE)
    assert capsys.readouterr() == ("", "")
    report = Report(killed=[PROGRAM], removed=["c1"], unfinished=["c2"], notes=["no engine"])
    cleanup_cmd._print(report, Format.TABLE)
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "killed pid 7 (a\\x1b[1mb, uid 1000, state D)",
        "removed container c1",
        "container c2 is not removed yet; the engine goes on",
    ]
    assert err == "hpcctr: cleanup: no engine\n"
    cleanup_cmd._print(report, Format.JSON)
    assert json.loads(capsys.readouterr().out)["killed"][0]["pid"] == 7
