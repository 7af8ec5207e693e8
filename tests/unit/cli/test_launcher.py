"""The start script: what it says, what cannot be one, and what the kernel makes of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcctr.cli import launcher
from hpcctr.enter.build import compile_front
from hpcctr.errors import LauncherUnusable


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("front") / "front"
    compile_front(program)
    return program


def test_the_first_line_names_front_and_python() -> None:
    assert launcher.first_line("/usr/libexec/hpcctr/front", "/opt/hpcctr/bin/python") == (
        "#!/usr/libexec/hpcctr/front /opt/hpcctr/bin/python"
    )


@pytest.mark.parametrize("blank", [" ", "\t", "\n"])
def test_a_front_with_blanks_in_its_name_is_refused(blank: str) -> None:
    with pytest.raises(LauncherUnusable, match="blanks"):
        launcher.first_line(f"/usr/lib{blank}exec/front", "/usr/bin/python3")


def test_a_python_the_kernel_would_cut_is_refused() -> None:
    for python in ("/usr/bin/python3 ", "/usr/bin/\npython3"):
        with pytest.raises(LauncherUnusable, match="blanks"):
            launcher.first_line("/usr/libexec/front", python)


def _script(directory: Path, front: Path, length: int) -> Path:
    """A start script whose first line has that many bytes, for a Python that is a link."""
    python = directory / ("p" * (length - len(f"#!{front} {directory}/")))
    python.symlink_to(sys.executable)
    script = directory / "hpcctr"
    script.write_text(f"#!{front} {python}\nimport sys\nprint(sys.executable)\n")
    script.chmod(0o755)
    return script


def test_the_longest_first_line_is_the_longest_the_kernel_takes(tmp_path: Path, front: Path) -> None:
    script = _script(tmp_path, front, launcher.FIRST_LINE_MAX)
    python = script.read_text().partition("\n")[0].split()[1]
    assert launcher.first_line(str(front), python) == f"#!{front} {python}"
    done = subprocess.run([script], capture_output=True, text=True, check=True)
    assert done.stdout == f"{python}\n"
    longer = tmp_path / "longer"
    longer.mkdir()
    script = _script(longer, front, launcher.FIRST_LINE_MAX + 1)
    python = script.read_text().partition("\n")[0].split()[1]
    with pytest.raises(LauncherUnusable, match="256 bytes, and the kernel reads 255") as raised:
        launcher.first_line(str(front), python)
    assert "site.toml" in raised.value.hint
    # The kernel cuts the name: front cannot start it.
    done = subprocess.run([script], capture_output=True, text=True, check=False)
    assert done.returncode == 125 and "error[launcher]" in done.stderr


def test_what_was_written_has_no_problem_and_anything_else_has(tmp_path: Path) -> None:
    script = tmp_path / "hpcctr"
    launcher.write(script, front="/x/front", python=sys.executable, packages=Path("/x/site-packages"))
    assert launcher.problem(script, front="/x/front") is None
    assert script.stat().st_mode & 0o777 == 0o755
    assert "sys.path.insert(0, '/x/site-packages')" in script.read_text()
    assert os.listdir(tmp_path) == ["hpcctr"]
    script.write_text("#!/x/python\nimport re\n")
    assert launcher.problem(script, front="/x/front") == "it begins with '#!/x/python', not with '#!/x/front'"
    script.write_text("#!/x/front /x/python\n")
    assert launcher.problem(script, front="/x/front") == "it names /x/python, which cannot be started"
    script.unlink()
    assert launcher.problem(script, front="/x/front") == "No such file or directory"
