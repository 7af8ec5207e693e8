"""The program enter: what its binary is, and what the build says when it cannot make one."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile

from hpcctr import errors
from hpcctr.enter.build import LEFT_OUT, SOURCES, compile_enter, flags_of
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


RECOMMENDED = {
    "OpenSSF's guide for C and C++": [
        *("-O2", "-Wall", "-Wformat=2", "-Wconversion", "-Wsign-conversion", "-Wtrampolines", "-Wimplicit-fallthrough"),
        *("-Wbidi-chars=any", "-Werror", "-D_FORTIFY_SOURCE=3", "-D_GLIBCXX_ASSERTIONS", "-fstrict-flex-arrays=3"),
        *("-fstack-clash-protection", "-fstack-protector-strong", "-Wl,-z,nodlopen", "-Wl,-z,noexecstack"),
        *("-Wl,-z,relro", "-Wl,-z,now", "-Wl,--as-needed", "-Wl,--no-copy-dt-needed-entries", "-fPIE"),
        *("-fno-delete-null-pointer-checks", "-fno-strict-overflow", "-fno-strict-aliasing", "-fexceptions"),
        *("-ftrivial-auto-var-init=zero", "-fhardened", "-fzero-init-padding-bits=all", "-fsanitize=cfi"),
    ],
    "Debian's hardening=+all and checksec": [
        "-Wformat=2",
        "-fPIE",
        "-Wl,-z,relro",
        "-Wl,-z,now",
        "-Wl,-z,separate-code",
    ],
    "and what compilers have besides": [
        *("-fzero-call-used-regs=used-gpr", "-fsanitize=undefined", "-flto", "-fwrapv", "-mharden-sls=all"),
        *("-mindirect-branch=thunk",),
    ],
}
FROM_GCC = {"-fstrict-flex-arrays=3": 13, "-fzero-init-padding-bits=all": 15}


def test_every_recommended_flag_is_used_or_left_out_for_a_reason() -> None:
    version = int(subprocess.run(["gcc", "-dumpversion"], capture_output=True, check=True).stdout.split(b".")[0])
    used = set(flags_of("gcc"))
    recommended = {flag for flags in RECOMMENDED.values() for flag in flags}
    for flag in recommended:
        assert flag in used or flag in LEFT_OUT or version < FROM_GCC.get(flag, 0), flag
    assert not used & set(LEFT_OUT)
    assert set(LEFT_OUT) <= recommended
    machine_flag = {"x86_64": "-fcf-protection=full", "aarch64": "-mbranch-protection=standard"}[os.uname().machine]
    assert machine_flag in used


def test_code_lies_in_pages_of_its_own(program: Path) -> None:
    with program.open("rb") as file:
        loaded = [segment for segment in ELFFile(file).iter_segments() if segment["p_type"] == "PT_LOAD"]
    pages = [
        (segment["p_flags"] & 1, segment["p_vaddr"] // 4096, (segment["p_vaddr"] + segment["p_memsz"] - 1) // 4096)
        for segment in loaded
    ]
    assert sum(is_code for is_code, _, _ in pages) == 1
    ordered = sorted(pages, key=lambda page: page[1])
    for (_, _, last), (_, first, _) in itertools.pairwise(ordered):
        assert last < first
    in_file = [(s["p_flags"] & 1, s["p_offset"] // 4096, (s["p_offset"] + s["p_filesz"] - 1) // 4096) for s in loaded]
    ((_, code_first, code_last),) = (one for one in in_file if one[0])
    for is_code, first, last in in_file:
        assert is_code or last < code_first or first > code_last


def test_indirect_branches_and_returns_are_marked_for_the_processor_to_check(program: Path) -> None:
    """GNU_PROPERTY_X86_FEATURE_1_AND: IBT and SHSTK; GNU_PROPERTY_AARCH64_FEATURE_1_AND: BTI and PAC."""
    with program.open("rb") as file:
        (notes,) = (s for s in ELFFile(file).iter_segments() if s["p_type"] == "PT_GNU_PROPERTY")
        data = notes.data()
    features = {"x86_64": 0xC0000002, "aarch64": 0xC0000000}[os.uname().machine]
    at = data.index(struct.pack("<II", features, 4))
    assert struct.unpack_from("<I", data, at + 8)[0] & 3 == 3


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the instructions are those of x86-64")
def test_functions_with_buffers_check_the_stacks_guard_and_misuse_traps(program: Path) -> None:
    """The program is stripped: a trap is ud2, as -fsanitize=undefined leaves it, and the guard is compared with xor or
    sub before a call of __stack_chk_fail, which exits with 125."""
    object_file = program.with_name("enter.o")
    given = [flag for flag in flags_of("gcc") if not flag.startswith("-Wl") and flag not in ("-s", "-static-pie")]
    subprocess.run(["gcc", *given, "-c", SOURCES / "enter.c", "-o", object_file], check=True)
    code = subprocess.run(["objdump", "-dr", object_file], capture_output=True, text=True, check=True).stdout
    assert code.count("__stack_chk_guard") >= 10
    assert len(re.findall(r"call.*\n?.*__stack_chk_fail", code)) >= 5
    assert code.count("\tud2") >= 5


def test_the_file_names_no_path_to_search_libraries_in_and_has_no_symbols(program: Path) -> None:
    with program.open("rb") as file:
        elf = ELFFile(file)
        (dynamic,) = (segment for segment in elf.iter_segments() if isinstance(segment, DynamicSegment))
        assert not {tag.entry.d_tag for tag in dynamic.iter_tags()} & {"DT_RPATH", "DT_RUNPATH"}
        assert elf.get_section_by_name(".symtab") is None


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
