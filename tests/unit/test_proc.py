"""Lines of /proc."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcctr.proc import read_lines


def test_the_lines_are_the_files() -> None:
    lines = read_lines("/proc/self/status")
    assert f"Pid:\t{os.getpid()}" in lines
    assert lines[-1]


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    name = "a\rb\x0bc\x0cd\x1ce\x85f\u2028g\udcff"
    (tmp_path / "mountinfo").write_bytes(f"{name}\n{name}\r\n".encode(errors="surrogateescape"))
    assert read_lines(str(tmp_path / "mountinfo")) == [name, f"{name}\r"]


def test_a_process_that_is_gone_has_none() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with pytest.raises(OSError, match="No such"):
        read_lines(f"/proc/{process.pid}/status")
