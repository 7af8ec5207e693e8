"""The processor, as OCI calls it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import hpcctr
from hpcctr.processor import machine


def test_it_is_one_that_images_are_made_for() -> None:
    assert machine() in ("amd64", "arm64")


def test_a_caller_who_claims_another_word_size_changes_nothing() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); from hpcctr.processor import machine; print(machine())"
    argv = ["setarch", "linux32", sys.executable, "-I", "-c", code, str(Path(hpcctr.__file__).parents[1])]
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip() == machine()
