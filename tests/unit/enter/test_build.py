"""The program enter: what its binary is, and what the build says when it cannot make one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile

from hpcctr import errors
from hpcctr.enter.build import SOURCES, compile_enter
from hpcctr.errors import EnterNotBuilt


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("enter") / "enter"
    compile_enter(output)
    return output


def test_the_program_needs_no_interpreter_no_library_and_no_relocation(program: Path) -> None:
    with program.open("rb") as file:
        elf = ELFFile(file)
        kinds = [segment["p_type"] for segment in elf.iter_segments()]
        (dynamic,) = (segment for segment in elf.iter_segments() if isinstance(segment, DynamicSegment))
        tags = {tag.entry.d_tag for tag in dynamic.iter_tags()}
    assert "PT_INTERP" not in kinds
    assert not tags & {
        "DT_NEEDED",
        "DT_RELA",
        "DT_REL",
        "DT_RELR",
        "DT_JMPREL",
        "DT_TEXTREL",
        "DT_INIT",
        "DT_INIT_ARRAY",
    }


def test_the_program_is_placed_at_random_and_has_no_memory_that_is_both_writable_and_executable(program: Path) -> None:
    with program.open("rb") as file:
        elf = ELFFile(file)
        assert elf["e_type"] == "ET_DYN"
        writable, executable = 2, 1
        for segment in elf.iter_segments():
            assert segment["p_flags"] & (writable | executable) != writable | executable
        (stack,) = (segment for segment in elf.iter_segments() if segment["p_type"] == "PT_GNU_STACK")
        assert not stack["p_flags"] & executable


def test_without_capabilities_and_outside_of_a_launch_the_program_says_so(program: Path) -> None:
    ended = subprocess.run(["setpriv", "--bounding-set=-sys_admin", program], capture_output=True, check=False)
    assert ended.returncode == 126
    assert ended.stderr.startswith(b"hpcctr: error[caller-refused]: ")


def test_the_same_sources_give_the_same_bytes(program: Path, tmp_path: Path) -> None:
    compile_enter(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == program.read_bytes()


def test_the_engines_socket_is_compiled_in(program: Path, tmp_path: Path) -> None:
    compile_enter(tmp_path / "other", socket_path="/run/hpcctr/other.sock")
    assert b"/run/hpcctr/engine.sock\0" in program.read_bytes()
    assert b"/run/hpcctr/other.sock\0" in (tmp_path / "other").read_bytes()


@pytest.mark.parametrize(
    "path", ["engine.sock", "", '/run/"', "/run/\\x", "/run/a b", "/run/\n", "/" + "x" * 107, "/run/\xe4"]
)
def test_a_socket_path_that_is_not_plain_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(EnterNotBuilt, match="plain absolute path"):
        compile_enter(tmp_path / "enter", socket_path=path)


def test_a_missing_compiler_is_named_with_the_way_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(EnterNotBuilt, match="no C compiler: no-such-cc is not in PATH") as raised:
        compile_enter(tmp_path / "enter", cc="no-such-cc")
    assert "apt install gcc" in raised.value.hint and "dnf install gcc" in raised.value.hint
    assert not (tmp_path / "enter").exists()


def test_what_the_compiler_says_reaches_the_user_and_nothing_is_left(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(
        "#!/bin/sh\n[ $1 = -dumpmachine ] && echo x86_64-linux-gnu && exit\necho asm/errno.h is missing >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    with pytest.raises(EnterNotBuilt, match=r"asm/errno\.h is missing"):
        compile_enter(tmp_path / "out/enter", cc=str(compiler))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_machine_enter_does_not_know_is_named(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho riscv64-linux-gnu\n")
    compiler.chmod(0o755)
    with pytest.raises(EnterNotBuilt, match="riscv64"):
        compile_enter(tmp_path / "enter", cc=str(compiler))


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-gcc") is None, reason="no compiler for aarch64 on this machine")
def test_the_program_is_made_for_aarch64_too(tmp_path: Path) -> None:
    compile_enter(tmp_path / "enter", cc="aarch64-linux-gnu-gcc")
    with (tmp_path / "enter").open("rb") as file:
        assert ELFFile(file)["e_machine"] == "EM_AARCH64"


def test_every_error_of_enter_is_one_of_hpcctrs_with_its_status() -> None:
    statuses = {"FAILED": errors.FAILED, "REFUSED": errors.REFUSED, "NOT_FOUND": errors.NOT_FOUND}
    text = "".join(file.read_text() for file in [*SOURCES.glob("*.h"), *SOURCES.glob("*.c")])
    found = set(re.findall(r'\bdie(?:_of)?\(\s*(\w+),\s*"([a-z-]+)"', text))
    assert len(found) > 10
    for status, slug in found:
        assert errors.of_slug(slug).slug == slug, f"{slug} is no class of errors.py"
        assert errors.of_slug(slug).exit_status == statuses[status], slug


def test_no_source_of_enter_is_longer_than_500_lines() -> None:
    for file in [*SOURCES.glob("*.h"), *SOURCES.glob("*.c")]:
        lines = file.read_text().splitlines()
        assert len(lines) <= 500, file
        assert max(map(len, lines)) <= 120, file
