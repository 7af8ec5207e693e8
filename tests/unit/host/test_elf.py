from __future__ import annotations

import io
import os
import resource
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcctr.host import elf
from hpcctr.host.elf import ElfFile, NotElf
from tests.support import elfs

LIBRARIES = sorted({path.resolve() for path in Path("/lib").glob("*-linux-gnu/*.so.*") if path.is_file()})


def test_a_library_says_its_name_its_needs_and_its_versions(tmp_path: Path) -> None:
    libc = elfs.library(tmp_path / "libc.so.6", soname="libc.so.6", defines=["GLIBC_2.17", "GLIBC_2.99"])
    plain = elfs.library(tmp_path / "libplain.so", soname="libplain.so.2")
    built = elfs.library(
        tmp_path / "libdemo.so.1.2",
        soname="libdemo.so.1",
        defines=["DEMO_1.0", "DEMO_1.1"],
        needs={libc: ["GLIBC_2.17", "GLIBC_2.99"], plain: []},
        runpath="$ORIGIN/../deps:/opt/vendor/lib",
    )
    file = elf.read(str(built))
    assert (file.soname, file.needed) == ("libdemo.so.1", ("libc.so.6", "libplain.so.2"))
    assert [(name, set(versions)) for name, versions in file.needs] == [("libc.so.6", {"GLIBC_2.17", "GLIBC_2.99"})]
    assert set(file.defines) == {"DEMO_1.0", "DEMO_1.1"}
    assert (file.runpath, file.is_rpath) == (("$ORIGIN/../deps", "/opt/vendor/lib"), False)
    assert (file.bits, file.is_shared, file.interpreter) == (64, True, "")
    assert file.machine == os.uname().machine


def test_rpath_is_told_from_runpath(tmp_path: Path) -> None:
    file = elf.read(str(elfs.library(tmp_path / "libold.so", rpath="/opt/old")))
    assert (file.runpath, file.is_rpath) == (("/opt/old",), True)


def test_a_program_is_no_library_and_names_its_loader() -> None:
    file = elf.read(sys.executable)
    assert not file.is_shared and Path(file.interpreter).exists()


def test_a_static_program_needs_nothing(tmp_path: Path) -> None:
    file = elf.read(str(elfs.program(tmp_path / "static", "int main(void) { return 0; }", (), "-static")))
    assert not file.needed and not file.interpreter and not file.is_shared and not file.needs


def test_every_library_of_this_machine_reads_as_pyelftools_reads_it() -> None:
    assert len(LIBRARIES) > 20
    for path in LIBRARIES[:150]:
        with path.open("rb") as opened:
            try:
                expected = _by_pyelftools(ELFFile(opened))
            except ELFError:
                continue
        file = elf.read(str(path))
        assert (file.soname, file.needed, dict(file.needs), set(file.defines)) == expected, path


def _by_pyelftools(file: Any) -> tuple[str, tuple[str, ...], dict[str, tuple[str, ...]], set[str]]:
    dynamic = next(segment for segment in file.iter_segments() if isinstance(segment, DynamicSegment))
    tags: list[Any] = list(dynamic.iter_tags())
    needs: dict[str, tuple[str, ...]] = {}
    if section := file.get_section_by_name(".gnu.version_r"):
        for version, parts in section.iter_versions():
            names = [part.name for part in parts if not part.entry.vna_flags & 2]
            needs[version.name] = tuple(dict.fromkeys(names))
    defines = set()
    if section := file.get_section_by_name(".gnu.version_d"):
        for version, parts in section.iter_versions():
            names = [part.name for part in parts]
            if not version.entry.vd_flags & 1:
                defines.add(names[0])
    return (
        next((tag.soname for tag in tags if tag.entry.d_tag == "DT_SONAME"), ""),
        tuple(tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"),
        needs,
        defines,
    )


def test_a_file_that_is_replaced_is_read_anew(tmp_path: Path) -> None:
    path = elfs.library(tmp_path / "libx.so", soname="libx.so.1")
    assert elf.read(str(path)).soname == "libx.so.1"
    elfs.library(tmp_path / "new", soname="libx.so.2").rename(path)
    assert elf.read(str(path)).soname == "libx.so.2"


def test_a_second_look_at_a_file_does_not_parse_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = elfs.library(tmp_path / "libx.so", soname="libx.so.1")
    first = elf.read(str(path))

    def parse(_: object) -> ElfFile:
        raise AssertionError

    monkeypatch.setattr(elf, "parse", parse)
    assert elf.read(str(path)) is first


def test_what_is_no_elf_file_is_said_and_kept(tmp_path: Path) -> None:
    text = tmp_path / "libc.so"
    text.write_text("/* GNU ld script */")
    for _ in range(2):
        with pytest.raises(NotElf):
            elf.read(str(text))


@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
def test_what_is_no_regular_file_is_not_opened(tmp_path: Path, kind: str) -> None:
    path = Path("/dev/null") if kind == "device" else tmp_path / "x"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    with pytest.raises(NotElf, match="regular"):
        elf.read(str(path))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    tmp_path = tmp_path_factory.mktemp("elf")
    libc = elfs.library(tmp_path / "libc.so.6", soname="libc.so.6", defines=["GLIBC_2.17", "GLIBC_2.99"])
    return elfs.library(tmp_path / "l.so", soname="l.so.1", defines=["L_1"], needs={libc: ["GLIBC_2.99"]}).read_bytes()


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_damaged_library_is_a_library_or_none(whole: bytes, data: st.DataObject) -> None:
    raw = bytearray(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
    for _ in range(data.draw(st.integers(1, 6))):
        # Headers and the dynamic segment, more often than the rest.
        limit = min(len(raw), data.draw(st.sampled_from([64, 1024, len(raw)])))
        at = data.draw(st.integers(0, max(limit - 1, 0)))
        size = data.draw(st.sampled_from([1, 2, 4, 8]))
        raw[at : at + size] = data.draw(st.sampled_from([b"\xff" * size, b"\0" * size, os.urandom(size)]))
    try:
        file = elf.parse(io.BytesIO(bytes(raw)))
    except NotElf:
        return
    assert all(len(text) <= 65536 for text in (file.soname, *file.needed, *file.runpath, *file.defines))


@pytest.mark.parametrize("step", [0xFFFFFFF0, 0x7FFFFFFF, 1])
def test_a_version_table_that_leads_on_for_ever_ends(whole: bytes, step: int) -> None:
    raw = bytearray(whole)
    file: Any = ELFFile(io.BytesIO(whole))
    at = file.get_section_by_name(".gnu.version_r").header.sh_offset
    struct.pack_into("<HHIII", raw, at, 1, 0xFFFF, 1, 16, step)
    struct.pack_into("<IHHII", raw, at + 16, 0, 0, 0, 1, step)
    with pytest.raises(NotElf):
        elf.parse(io.BytesIO(bytes(raw)))


def test_counts_that_promise_everything_take_no_memory(whole: bytes) -> None:
    """A program header table, a dynamic segment and strings that are said to be as large as can be."""
    raw = bytearray(whole)
    struct.pack_into("<H", raw, 56, 0xFFFF)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(NotElf, match="program headers"):
        elf.parse(io.BytesIO(bytes(raw)))
    for at in range(64, 64 + 56 * 11, 8):
        changed = bytearray(whole)
        struct.pack_into("<Q", changed, at, 2**64 - 1)
        try:
            elf.parse(io.BytesIO(bytes(changed)))
        except NotElf:
            continue
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
