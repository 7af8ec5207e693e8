"""front: what it tells Python of the caller, and that it touches nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile

from hpcctr import errors
from hpcctr.enter.build import FRONT_SOURCE, compile_front

TELLS = """
import json, sys
sys.path.insert(0, sys.argv.pop(1))
from hpcctr.client.enter import told_by_front
from hpcctr.client.environment import of_this_process
environment = sorted(name.decode() for name in of_this_process())
print(json.dumps([told_by_front(), sys.argv[1:], sys.flags.isolated, sys.flags.no_site, environment]))
"""


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("front") / "front"
    compile_front(program)
    return program


@pytest.fixture
def script(tmp_path: Path, front: Path) -> Path:
    path = tmp_path / "hpcctr"
    path.write_text(f"#!{front} {sys.executable}\n{TELLS}")
    path.chmod(0o755)
    return path


def _tells(script: Path, *before: str, words: Sequence[bytes] = (), ignored: Sequence[int] = ()) -> Any:
    def ignore() -> None:
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    source = os.fsencode(Path(__file__).parents[3] / "src")
    done = subprocess.run(
        [*map(os.fsencode, before), os.fsencode(script), source, *words],
        capture_output=True,
        check=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": "/nowhere", "LC_ALL": "C.UTF-8"},
        restore_signals=False,
        preexec_fn=ignore,
    )
    return json.loads(done.stdout)


def test_python_starts_isolated_with_every_word_as_it_was_and_no_variable_added(script: Path) -> None:
    told, words, isolated, no_site, environment = _tells(script, words=[b"run", b"", b"-I", b"a b", b"\xff"])
    assert told == [0, 0]
    assert words == ["run", "", "-I", "a b", "\udcff"]
    assert (isolated, no_site) == (1, 1)
    assert environment == ["LC_ALL", "PATH", "PYTHONPATH"]


@pytest.mark.parametrize(
    ("ignored", "bits"),
    [((), 0), ((signal.SIGPIPE,), 1), ((signal.SIGXFSZ,), 2), ((signal.SIGPIPE, signal.SIGXFSZ), 3)],
)
def test_it_tells_which_signals_were_ignored(script: Path, ignored: tuple[int, ...], bits: int) -> None:
    assert _tells(script, ignored=ignored)[0] == [bits, 0]


@pytest.mark.parametrize(("name", "number"), [("HUP", 1), ("USR1", 10), ("STKFLT", 16), ("SYS", 31)])
def test_it_tells_the_parent_death_signal(script: Path, name: str, number: int) -> None:
    assert _tells(script, "setpriv", "--pdeathsig", name)[0] == [0, number]


def test_a_million_bytes_of_words_pass(script: Path) -> None:
    words = [b"%06d" % number + b"x" * 94 for number in range(10000)]
    assert _tells(script, words=words)[1] == [word.decode() for word in words]


def test_started_otherwise_it_says_what_it_is_for(front: Path) -> None:
    done = subprocess.run([front], capture_output=True, text=True, check=False)
    assert done.returncode == 125
    assert done.stderr.startswith("hpcctr: error[launcher]: hpcctr-front: ") and "\nhint: " in done.stderr


def test_a_python_that_is_not_there_is_named_with_the_remedy(front: Path, tmp_path: Path) -> None:
    script = tmp_path / "hpcctr"
    script.write_text(f"#!{front} /nowhere/python\n")
    script.chmod(0o755)
    done = subprocess.run([script], capture_output=True, text=True, check=False)
    assert done.returncode == 125
    assert done.stderr.startswith("hpcctr: error[launcher]: /nowhere/python: no such file or directory\n")
    assert "hpcctr engine install" in done.stderr


def test_the_program_needs_no_library_and_no_relocation(front: Path) -> None:
    with front.open("rb") as file:
        elf = ELFFile(file)
        (dynamic,) = (segment for segment in elf.iter_segments() if isinstance(segment, DynamicSegment))
        tags = {tag.entry.d_tag for tag in dynamic.iter_tags()}
        assert "PT_INTERP" not in {segment["p_type"] for segment in elf.iter_segments()}
    assert not tags & {"DT_NEEDED", "DT_RELA", "DT_REL", "DT_RELR", "DT_JMPREL"}


def test_its_errors_are_hpcctrs() -> None:
    assert '"launcher"' in FRONT_SOURCE.read_text()
    assert errors.of_slug("launcher").exit_status == errors.FAILED
