"""The house rules that can be checked: tests mirror modules, modules stay small, the light half stays light."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src/hpcctr"
LINES_MAX = 500

#: Modules that are nothing but declarations or a composition, and what proves them instead.
PROVEN_ELSEWHERE = {
    "__main__.py": "tests/e2e",
    "launch.py": "tests/e2e",
    "image/record.py": "tests/unit/image",
    "cli/app.py": "tests/e2e",
    "cli/direct.py": "tests/e2e",
    "cli/parent.py": "tests/e2e",
    "cli/engine_cmd.py": "tests/e2e",
    "cli/ps_cmd.py": "tests/e2e",
    "cli/doctor_cmd.py": "tests/e2e",
    "cli/images_cmd.py": "tests/e2e",
    "cli/gc_cmd.py": "tests/e2e",
    "cli/explain.py": "tests/e2e",
    "cli/bringing.py": "tests/e2e",
    "cli/errands.py": "tests/e2e",
    "cli/own_images.py": "tests/e2e",
    "cli/share_cmd.py": "tests/e2e",
    "cli/shared_images.py": "tests/e2e",
    "cli/progress.py": "tests/e2e",
    "storekeeper/start.py": "tests/attacks",
    "storekeeper/descent.py": "tests/attacks",
    "storekeeper/work.py": "tests/attacks",
    "storekeeper/sharing.py": "tests/attacks",
}


def _modules() -> list[str]:
    paths = (path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))
    return sorted(str(path) for path in paths if path.name != "__init__.py" and "api" not in path.parts)


@pytest.mark.parametrize("module", _modules())
def test_a_module_has_a_test_file_of_its_name(module: str) -> None:
    path = Path(module)
    mirror = ROOT / "tests/unit" / path.parent / f"test_{path.name}"
    elsewhere = PROVEN_ELSEWHERE.get(module)
    assert mirror.exists() or (elsewhere and any((ROOT / elsewhere).glob("test_*.py"))), (
        f"write {mirror.relative_to(ROOT)}"
    )


_DOCUMENTS = sorted(str(path.relative_to(ROOT)) for place in ("docs", "src") for path in (ROOT / place).rglob("*.md"))


@pytest.mark.parametrize("document", _DOCUMENTS)
def test_a_test_that_a_document_names_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    functions = {
        name
        for path in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    modules = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    named = set(re.findall(r"`(?:tests/\w+/)?(test_\w+)(?:\.py)?(?:::\w+)?`", text))
    assert named <= functions | modules, f"{document}: {named - functions - modules}"
    paths = set(re.findall(r"`(tests/[\w/.-]+)`", text))
    assert not [path for path in paths if not (ROOT / path).exists()], document


@pytest.mark.parametrize("module", _modules())
def test_a_module_stays_below_the_ceiling(module: str) -> None:
    lines = (SOURCE / module).read_text().count("\n")
    assert lines <= LINES_MAX, f"{module} has {lines} lines"


@pytest.mark.parametrize("source", sorted(path.name for path in (SOURCE / "enter").glob("*.[ch]")))
def test_enters_files_stay_below_the_ceiling(source: str) -> None:
    assert (SOURCE / "enter" / source).read_text().count("\n") <= LINES_MAX


def _loaded_by(statement: str) -> set[str]:
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r}); {statement}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-IS", "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_the_short_lane_loads_no_library_and_little_of_the_standard_one() -> None:
    bare = _loaded_by("import os")
    loaded = _loaded_by("import hpcctr.__main__, hpcctr.client.run, fcntl") - bare
    foreign = {name for name in loaded if not name.startswith("hpcctr")}
    assert foreign <= {"__future__", "_socket", "_signal", "fcntl"}, foreign


def test_the_command_line_loads_neither_grpc_nor_a_console_before_it_needs_them() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import sys, hpcctr.cli.app; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"},
    )
    assert "grpc" not in run.stdout.split()
