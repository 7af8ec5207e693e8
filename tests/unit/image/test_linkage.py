"""Contents are looked at while they pass: the stream stays what it is, and hostile files are only not known."""

from __future__ import annotations

import random
import resource
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcctr.host import elf
from hpcctr.image import linkage
from hpcctr.image.layers import LayerMerge
from hpcctr.image.linkage import Linkage
from hpcctr.image.treestream import write_tree
from tests.support.linked_images import debian, facts_of_members, holding, library
from tests.support.oci import file, member_bytes, tar

LIB = "usr/lib/x86_64-linux-gnu"
DEMO = library("libdemo.so.1", "DEMO_1.0")


def stream_of(layer: bytes, chunk: int) -> bytes:
    merge = LayerMerge()
    merge.apply(iter([layer]), "layer 1")

    def again(_: int) -> Iterator[bytes]:
        return (layer[at : at + chunk] for at in range(0, len(layer), chunk))

    out = bytearray()
    write_tree(merge.tree, 1, again, out.extend, lambda done, total: None)
    return bytes(out)


def test_what_is_looked_at_is_written_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    large = DEMO + random.Random(1).randbytes(3 << 20)
    layer = tar(
        *debian(
            file(f"{LIB}/liblarge.so.1", large), file(f"{LIB}/libdemo.so.1", DEMO), file("etc/ld.so.conf", b"/opt\n")
        )
    )
    looked_at = [stream_of(layer, chunk) for chunk in (1000, 1 << 20)]
    monkeypatch.setattr(Linkage, "wants", lambda self, leaf: False)
    assert looked_at == [stream_of(layer, 4096)] * 2


def test_of_a_large_library_beginning_and_end_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linkage, "_SMALL", 100)
    monkeypatch.setattr(linkage, "HEAD_MAX", 0x1000)
    monkeypatch.setattr(linkage, "TAIL_MAX", 0x2000)
    body = "const char filler[1 << 20] = {1};"
    large = library("liblarge.so.1", "LARGE_1.0", body=body)
    facts = facts_of_members(debian(file(f"{LIB}/liblarge.so.1.5", large)))
    assert [(one.soname, one.defines) for one in facts.libraries][-1] == ("liblarge.so.1", ("LARGE_1.0",))


def test_a_large_library_that_does_not_tell_is_noted_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linkage, "_SMALL", 100)
    monkeypatch.setattr(linkage, "HEAD_MAX", 1 << 20)
    monkeypatch.setattr(linkage, "TAIL_MAX", 10)
    broken = bytearray(2 << 20)
    broken[:64] = DEMO[:64]
    broken[32:40] = (1 << 30).to_bytes(8, "little")
    facts = facts_of_members(debian(file(f"{LIB}/liblarge.so.12", bytes(broken))))
    assert [(one.soname, one.path) for one in facts.libraries][-1] == ("liblarge.so.12", f"/{LIB}/liblarge.so.12")


@pytest.mark.parametrize(
    "content", [b"", b"\x7fELF", b"INPUT(libdemo.so.1)\n", DEMO[:100], DEMO[:5000], b"\x7fELF" + b"\xff" * 9000]
)
def test_a_broken_library_is_just_not_noted(content: bytes) -> None:
    facts = facts_of_members(debian(file(f"{LIB}/libbroken.so.1", content), file(f"{LIB}/libdemo.so.1", DEMO)))
    assert [one.soname for one in facts.libraries] == ["libc.so.6", "libdemo.so.1"]


@settings(deadline=None, max_examples=200)
@given(st.integers(0, len(DEMO) - 9), st.binary(min_size=1, max_size=8))
def test_a_library_with_any_bytes_changed_ends_no_conversion(at: int, changed: bytes) -> None:
    content = DEMO[:at] + changed + DEMO[at + len(changed) :]
    facts_of_members(debian(file(f"{LIB}/libdemo.so.1", content), file("opt/libmpi.so.12", content)))


def test_whatever_a_parser_raises_ends_no_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(file: object) -> elf.ElfFile:
        raise RecursionError

    monkeypatch.setattr(linkage, "parse", raising)
    assert facts_of_members(debian()).libc == ""


def test_so_many_broken_files_are_looked_at_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def counting(file: object) -> elf.ElfFile:
        seen.append(file)
        raise elf.NotElf

    monkeypatch.setattr(linkage, "parse", counting)
    facts_of_members([file(f"lib/lib{number}.so.1", b"\x7fELF" + bytes(60)) for number in range(1000)])
    assert len(seen) == 256


def test_so_many_libraries_are_looked_at_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    left = linkage._Left(files=5)
    gathering = Linkage(_left=left)
    monkeypatch.setattr("hpcctr.image.treestream.Linkage", lambda: gathering)
    facts_of_members([file(f"lib/lib{number}.so.1", DEMO) for number in range(50)])
    assert left.files == 0


def test_a_gigabyte_of_libraries_takes_the_memory_of_one() -> None:
    """One of them at a time is held, and of that its beginning and end."""
    mpi = holding("libmpi.so.12", "MPICH Version:      %s")
    size = 96 << 20
    block = bytes(1 << 20)

    def chunks() -> Iterator[bytes]:
        for number in range(4):
            yield member_bytes(file(f"opt/{number}/libmpi.so.12", size=size))
            yield mpi + bytes(len(block) - len(mpi))
            for _ in range(size // len(block) - 1):
                yield block
        yield bytes(1024)

    merge = LayerMerge()
    merge.apply(chunks(), "layer 1")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    facts = write_tree(merge.tree, 1, lambda _: chunks(), lambda _: None, lambda done, total: None).facts
    assert facts is not None and len(facts.mpi) == 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10
