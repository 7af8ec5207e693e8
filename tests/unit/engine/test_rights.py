"""The capabilities the engine demands of whoever starts it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hpcctr.engine.rights import NEEDED

pytestmark = pytest.mark.root

_PROGRAM = """
from hpcctr.engine.rights import require_capabilities
from hpcctr.errors import HpcctrError
try:
    require_capabilities()
except HpcctrError as error:
    print(error.for_stderr())
"""
_UNIT = Path(__file__).parents[3] / "etc/systemd/hpcctr-engine.service"


def _said(*setpriv: str) -> str:
    command = ["setpriv", *setpriv, "--", sys.executable, "-I", "-c", _PROGRAM]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _only(*names: str) -> str:
    words = ["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in names)]
    return f"--bounding-set={','.join(words)}"


def test_exactly_these_are_enough() -> None:
    assert _said(_only(*NEEDED)) == ""


@pytest.mark.parametrize("name", NEEDED)
def test_what_is_missing_is_named_with_its_use_and_the_remedy(name: str) -> None:
    said = _said(_only(*(other for other in NEEDED if other != name)))
    assert said.startswith(f"hpcctr: error[capabilities]: the engine was started without {name} ({name}: ")
    assert "hint: in its unit: CapabilityBoundingSet=" in said


def test_root_without_any_is_told_all() -> None:
    said = _said("--bounding-set=-all")
    assert all(name in said for name in NEEDED)


def test_an_effective_set_that_what_is_started_would_not_get_is_not_enough() -> None:
    program = f"import ctypes; ctypes.CDLL(None).prctl(24, 7, 0, 0, 0)\n{_PROGRAM}"
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert "without CAP_SETUID (" in done.stdout


def test_the_numbers_are_the_kernels() -> None:
    """By libcap's tables, which know them by name."""
    mask = sum(1 << bit for bit, _ in NEEDED.values())
    done = subprocess.run(["capsh", f"--decode={mask:x}"], capture_output=True, text=True, check=True)
    assert set(done.stdout.strip().partition("=")[2].upper().split(",")) == set(NEEDED)


def test_the_unit_gives_exactly_these() -> None:
    assert os.path.exists(_UNIT)
    (given,) = re.findall(r"^CapabilityBoundingSet=(.*)$", _UNIT.read_text(), re.MULTILINE)
    assert set(given.split()) == set(NEEDED)
