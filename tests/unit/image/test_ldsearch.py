"""What ld.so would find in an image: directories, links, layers, and what is left out."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcctr.image import ldsearch
from hpcctr.image.record import ImageFacts
from tests.support.linked_images import debian, facts_of_layers, facts_of_members, glibc, holding, library
from tests.support.oci import Member, directory, file, hardlink, opaque, symlink, tar, whiteout

LIB = "usr/lib/x86_64-linux-gnu"
DEMO = library("libdemo.so.1", "DEMO_1.0", "DEMO_1.1")
OTHER = library("libdemo.so.1", "DEMO_2.0")


def demos(facts: ImageFacts) -> list[tuple[str, tuple[str, ...]]]:
    """Path and versions of every library but libc's."""
    return [(one.path, one.defines) for one in facts.libraries if one.soname == "libdemo.so.1"]


def test_libc_loader_and_libraries_of_a_debian_are_noted() -> None:
    facts = facts_of_members(
        debian(file(f"{LIB}/libdemo.so.1.0", DEMO), symlink(f"{LIB}/libdemo.so.1", "libdemo.so.1.0"))
    )
    assert (facts.libc, facts.libc_version, facts.loader) == ("glibc", "2.36", "/lib64/ld-linux-x86-64.so.2")
    assert demos(facts) == [(f"/{LIB}/libdemo.so.1.0", ("DEMO_1.0", "DEMO_1.1"))]
    assert [one.soname for one in facts.libraries] == ["libc.so.6", "libdemo.so.1"]


def test_libraries_of_a_red_hat_are_found_below_lib64() -> None:
    facts = facts_of_members(
        [
            directory("usr/lib64"),
            symlink("lib64", "usr/lib64"),
            file("usr/lib64/libc.so.6", glibc("GLIBC_2.2.5", "GLIBC_2.34")),
            file("usr/lib64/ld-linux-x86-64.so.2", library("ld-linux-x86-64.so.2")),
            file("usr/lib64/libdemo.so.1", DEMO),
            file("usr/lib/libdemo.so.1", OTHER),
        ]
    )
    assert (facts.libc_version, facts.loader) == ("2.34", "/lib64/ld-linux-x86-64.so.2")
    assert [path for path, _ in demos(facts)] == ["/usr/lib64/libdemo.so.1", "/usr/lib/libdemo.so.1"]


def test_a_later_layer_replaces_and_removes_libraries() -> None:
    first = debian(file(f"{LIB}/libdemo.so.1", DEMO), file(f"{LIB}/libgone.so.1", library("libgone.so.1")))
    facts = facts_of_members(first, [file(f"{LIB}/libdemo.so.1", OTHER), whiteout(f"{LIB}/libgone.so.1")])
    assert demos(facts) == [(f"/{LIB}/libdemo.so.1", ("DEMO_2.0",))]
    assert "libgone.so.1" not in [one.soname for one in facts.libraries]


def test_nothing_is_left_of_an_opaque_directory() -> None:
    facts = facts_of_members(debian(file(f"{LIB}/libdemo.so.1", DEMO)), [directory(LIB), opaque(LIB)])
    assert facts == ImageFacts()


def test_directories_of_ld_so_conf_come_first_with_what_it_includes() -> None:
    facts = facts_of_members(
        debian(
            file("etc/ld.so.conf", b"# first\n/opt/one /opt/two:\ninclude ld.so.conf.d/*.conf\nhwcap 0 nosegneg\n"),
            file("etc/ld.so.conf.d/b.conf", b"/opt/b # and why\ninclude /etc/ld.so.conf\n"),
            symlink("etc/ld.so.conf.d/a.conf", "/etc/vendor/real.conf"),
            file("etc/vendor/real.conf", b"/opt/linked\n/nowhere\n"),
            file("etc/ld.so.conf.d/c.txt", b"/opt/never\n"),
            *(file(f"opt/{name}/libdemo.so.1", DEMO) for name in ("one", "two", "b", "a", "never")),
            symlink("opt/linked", "a"),
            file(f"{LIB}/libdemo.so.1", OTHER),
        )
    )
    assert [path for path, _ in demos(facts)] == [
        f"/{path}/libdemo.so.1" for path in ("opt/one", "opt/two", "opt/a", "opt/b", LIB)
    ]


def test_a_processors_own_directories_are_searched_as_well() -> None:
    hwcaps = [file(f"{LIB}/glibc-hwcaps/x86-64-v{level}/libdemo.so.1", DEMO) for level in (2, 3)]
    facts = facts_of_members(debian(*hwcaps, file(f"{LIB}/libdemo.so.1", OTHER)))
    assert [path for path, _ in demos(facts)] == [
        f"/{LIB}/libdemo.so.1",
        f"/{LIB}/glibc-hwcaps/x86-64-v3/libdemo.so.1",
        f"/{LIB}/glibc-hwcaps/x86-64-v2/libdemo.so.1",
    ]


def test_a_library_elsewhere_counts_where_a_link_leads_to_it() -> None:
    facts = facts_of_members(
        debian(
            file("opt/blas/libdemo-r1.so", DEMO),
            symlink("etc/alternatives/demo", "/opt/blas/libdemo-r1.so"),
            symlink(f"{LIB}/libdemo.so.1", "../../../etc/alternatives/demo"),
            symlink(f"{LIB}/libdemo.so", "libdemo.so.1"),
            symlink(f"{LIB}/libround.so.1", "libround.so.1"),
            symlink(f"{LIB}/libnone.so.1", "/nowhere"),
            symlink(f"{LIB}/libup.so.1", "../../../../../../.."),
            directory(f"{LIB}/libdir.so.1"),
        )
    )
    assert demos(facts) == [("/opt/blas/libdemo-r1.so", ("DEMO_1.0", "DEMO_1.1"))]
    assert len(facts.libraries) == 2


def test_every_hard_link_of_a_library_is_noted_with_its_path() -> None:
    facts = facts_of_members(
        debian(file("aaa/odd-name", DEMO)),
        [hardlink(f"{LIB}/libdemo.so.1", "aaa/odd-name"), hardlink("usr/lib/libdemo.so.1", "aaa/odd-name")],
    )
    assert [path for path, _ in demos(facts)] == [f"/{LIB}/libdemo.so.1", "/usr/lib/libdemo.so.1"]


def test_libraries_of_another_processor_are_left_out() -> None:
    foreign = bytearray(DEMO)
    foreign[18:20] = (183).to_bytes(2, "little")
    facts = facts_of_members(debian(file(f"{LIB}/libdemo.so.1", bytes(foreign)), file("usr/lib/libdemo.so.1", DEMO)))
    assert [path for path, _ in demos(facts)] == ["/usr/lib/libdemo.so.1"]


def test_programs_plugins_and_libraries_outside_the_search_are_left_out() -> None:
    facts = facts_of_members(
        debian(
            file(f"{LIB}/demo.so", DEMO), file("opt/conda/lib/libdemo.so.1", DEMO), file(f"{LIB}/sub/libdemo.so", DEMO)
        )
    )
    assert not demos(facts)


def test_an_image_without_libc_has_no_libraries() -> None:
    assert facts_of_members([file("bin/static", b"\x7fELF"), file("lib/libdemo.so.1", DEMO)]) == ImageFacts()
    assert facts_of_members([]) == ImageFacts()


def musl(*more: Member) -> list[Member]:
    body = 'const char a[] = "\\0" "1.2.5"; const char b[] = "musl libc (x86_64)\\nVersion %s\\n";'
    loader = library("libc.musl-x86_64.so.1", body=body)
    return [
        file("lib/ld-musl-x86_64.so.1", loader),
        symlink("lib/libc.musl-x86_64.so.1", "ld-musl-x86_64.so.1"),
        *more,
    ]


def test_a_musl_image_is_told_by_its_loader() -> None:
    facts = facts_of_members(musl(file("usr/local/lib/libdemo.so.1", DEMO), file("opt/lib/libdemo.so.1", OTHER)))
    assert (facts.libc, facts.libc_version, facts.loader) == ("musl", "1.2.5", "/lib/ld-musl-x86_64.so.1")
    assert [path for path, _ in demos(facts)] == ["/usr/local/lib/libdemo.so.1"]


def test_a_musl_image_searches_where_its_path_file_says() -> None:
    conf = file("etc/ld-musl-x86_64.path", b"/opt/lib:/lib\n/nowhere\n")
    facts = facts_of_members(musl(conf, file("usr/lib/libdemo.so.1", DEMO), file("opt/lib/libdemo.so.1", OTHER)))
    assert [path for path, _ in demos(facts)] == ["/opt/lib/libdemo.so.1"]


def test_a_glibc_image_with_musl_beside_is_a_glibc_image() -> None:
    assert (
        facts_of_members(debian(file(f"{LIB}/libx.so.1", DEMO)), [file("usr/lib/ld-musl-x86_64.so.1", DEMO)]).libc
        == "glibc"
    )


def test_a_libc_without_its_loader_has_none() -> None:
    assert facts_of_members([file(f"{LIB}/libc.so.6", glibc())]).loader == ""


def test_what_an_open_mpi_speaks_is_told_by_the_plugins_below_it() -> None:
    old = holding("libmpi.so.40", "ompi_mpi_init", "Open MPI v4.1.4, package: x")
    facts = facts_of_members(
        [
            file("opt/a/lib/libmpi.so.40", old),
            file(
                "opt/a/lib/openmpi/mca_pmix_pmix3x.so",
                library("mca_pmix_pmix3x.so", body="int mca_pmix_pmix3x_component;"),
            ),
            file("opt/b/lib/libmpi.so.40", old),
            file("opt/b/lib/openmpi/mca_pmix_s2.so", library("mca_pmix_s2.so", body="int mca_pmix_s2_component;")),
            file("opt/b/lib/openmpi/mca_pmix_s1.so", library("mca_pmix_s1.so", body="int mca_pmix_s1_component;")),
            file("opt/c/lib/libmpi.so.40", old),
        ]
    )
    assert [(one.path, one.pmi, one.version) for one in facts.mpi] == [
        ("/opt/a/lib/libmpi.so.40", ("pmix",), "4.1.4"),
        ("/opt/b/lib/libmpi.so.40", ("pmi1", "pmi2"), "4.1.4"),
        ("/opt/c/lib/libmpi.so.40", (), "4.1.4"),
    ]


def test_of_several_copies_in_one_directory_the_one_that_is_loaded_is_noted() -> None:
    mpich = holding("libmpi.so.12", "MPICH Version:      %s", "PMI_FD")
    facts = facts_of_members(
        [file(f"venv/lib/{name}", mpich) for name in ("libmpi.so", "libmpi.so.12", "libmpi.so.12.0.0")]
    )
    assert [one.path for one in facts.mpi] == ["/venv/lib/libmpi.so.12"]


def test_a_library_that_may_load_pmix_speaks_it_where_the_image_has_one() -> None:
    intel = holding("libmpi.so.12", "Intel(R) MPI Library %s", "PMI_FD", "libpmix.so")
    assert [one.pmi for one in facts_of_members([file("opt/libmpi.so.12", intel)]).mpi] == [("pmi1",)]
    pmix = holding("libpmix.so.2", "OpenPMIx 5.0.7a1 (PMIx Standard: 5.1)")
    facts = facts_of_members([file("opt/libmpi.so.12", intel), file("usr/lib/libpmix.so.2", pmix)])
    assert [one.pmi for one in facts.mpi] == [("pmi1", "pmix")]
    assert facts.pmix == "5.0.7a1"


def test_more_of_everything_than_is_noted_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ldsearch, "LIBRARIES_MAX", 3)
    monkeypatch.setattr(ldsearch, "MPI_MAX", 2)
    mpi = holding("libmpi.so.12", "MPICH Version:      %s")
    facts = facts_of_members(
        debian(
            *(file(f"{LIB}/libdemo{number}.so.1", DEMO) for number in range(9)),
            *(file(f"opt/{number}/libmpi.so.12", mpi) for number in range(9)),
        )
    )
    assert (len(facts.libraries), len(facts.mpi)) == (3, 2)


def test_strange_names_are_not_noted() -> None:
    facts = facts_of_members(
        debian(
            file(f"{LIB}/libline\n.so.1", DEMO),
            file(LIB.encode() + b"/lib\xff.so.1", DEMO),
            file(f"{LIB}/libesc\x1b[31m.so.1", DEMO),
            file(f"{LIB}/libslash.so.1", library("../libslash.so")),
            file(f"{LIB}/liblong.so.1", library("lib" + "l" * 200)),
        )
    )
    assert not demos(facts)
    assert sorted(one.soname for one in facts.libraries) == ["libc.so.6", "liblong.so.1", "libslash.so.1"]


def test_many_links_and_directories_end_the_search_and_nothing_else() -> None:
    deep = "/".join(["d"] * 1000)
    links = [symlink(f"{LIB}/lib{number}.so.1", f"/{deep}/../{deep}/x{number}") for number in range(20_000)]
    loops = [file("etc/ld.so.conf", b"include /etc/ld.so.conf.d/*.conf\n" * 400)]
    loops += [
        file(f"etc/ld.so.conf.d/{number}.conf", b"include *.conf\ninclude ld.so.conf.d/*\n") for number in range(300)
    ]
    facts = facts_of_members(debian(directory(deep), *links, *loops))
    assert facts.libc in ("glibc", "")


NAMES = st.sampled_from(
    ["lib", "usr", "usr/lib", "lib64", "etc", "opt", "a", "usr/lib/x86_64-linux-gnu", "etc/ld.so.conf.d"]
)
LEAVES = st.sampled_from(
    ["libc.so.6", "libdemo.so.1", "libmpi.so.12", "ld.so.conf", "x.conf", "ld-musl-x86_64.so.1", "libpmix.so.2"]
)
CONTENTS = st.sampled_from(
    [glibc(), DEMO, b"/opt\ninclude *\ninclude ld.so.conf.d/*.conf\n", b"", b"\x7fELF" * 9, DEMO[:300]]
)


@st.composite
def anything(draw: st.DrawFn) -> bytes:
    members: list[Member] = []
    for _ in range(draw(st.integers(0, 12))):
        path = f"{draw(NAMES)}/{draw(LEAVES)}"
        kind = draw(st.integers(0, 3))
        if kind == 0:
            members.append(
                symlink(
                    draw(st.sampled_from([path, draw(NAMES)])),
                    draw(st.sampled_from(["..", "/", path, "a/../..", "/usr/lib"])),
                )
            )
        elif kind == 1:
            members.append(whiteout(path))
        else:
            members.append(file(path, draw(CONTENTS)))
    return tar(*members)


@settings(deadline=None, max_examples=150)
@given(st.lists(anything(), max_size=3))
def test_whatever_the_layers_hold_facts_are_within_their_bounds(layers: list[bytes]) -> None:
    from hpcctr.errors import ImageBroken
    from hpcctr.image.exchange import _is_plain

    try:
        facts = facts_of_layers(*layers)
    except ImageBroken:
        return
    assert _is_plain(facts)
    assert all(re.fullmatch(r"(/[^/]+)+", one.path) for one in facts.libraries)
