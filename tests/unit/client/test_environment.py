"""The command's environment."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from pathlib import Path

import pytest

from hpcctr.client import environment
from hpcctr.client.environment import Globs, build
from hpcctr.errors import UsageWrong

CALLER = {
    b"HOME": b"/home/u",
    b"PATH": b"/host/bin",
    b"LD_LIBRARY_PATH": b"/host/lib",
    b"PYTHONPATH": b"/host/py",
    b"OMP_NUM_THREADS": b"4",
    b"SLURM_JOB_ID": b"7",
    b"MINE": b"1",
    b"BASH_FUNC_module%%": b"() { :; }",
    b"REQUESTS_CA_BUNDLE": b"/etc/ca",
    b"\xff\xfe": b"\xfd",
}
IMAGE = [b"PATH=/image/bin", b"LANG=C.UTF-8", b"MINE=2", b"HOME=/root"]


def _values(**options: object) -> dict[bytes, bytes]:
    variables, _ = build(CALLER, image=IMAGE, **options)  # type: ignore[arg-type]
    return {name: variable.value for name, variable in variables.items()}


def test_the_callers_value_wins() -> None:
    values = _values()
    assert values[b"MINE"] == b"1"
    assert values[b"HOME"] == b"/home/u"
    assert values[b"\xff\xfe"] == b"\xfd"


def test_what_describes_the_hosts_files_is_the_images_or_gone() -> None:
    values = _values()
    assert values[b"PATH"] == b"/image/bin"
    for name in (b"LD_LIBRARY_PATH", b"PYTHONPATH", b"BASH_FUNC_module%%", b"REQUESTS_CA_BUNDLE"):
        assert name not in values


def test_what_was_dropped_is_told_with_the_reason() -> None:
    _, dropped = build({**CALLER, b"TMPDIR": b"/nowhere/tmp"}, image=IMAGE)
    assert dropped[b"LD_LIBRARY_PATH"] == "describes the host's files"
    assert dropped[b"TMPDIR"] == "no such directory"
    assert b"PATH" not in dropped


def test_variables_of_the_image_the_caller_lacks_are_added() -> None:
    assert _values()[b"LANG"] == b"C.UTF-8"


def test_an_image_without_path_gets_one() -> None:
    variables, _ = build({}, image=[])
    assert variables[b"PATH"].value.startswith(b"/usr/local/sbin:")


def test_packages_under_the_home_are_not_imported_unless_asked_for() -> None:
    assert _values()[b"PYTHONNOUSERSITE"] == b"1"
    variables, _ = build({b"PYTHONNOUSERSITE": b""}, image=[])
    assert variables[b"PYTHONNOUSERSITE"].value == b""


def test_e_is_last_and_takes_the_callers_value_without_one() -> None:
    values = _values(
        requested=[b"PATH=/mine", b"LD_LIBRARY_PATH", b"ABSENT", b"EMPTY=", b"WITH=a=b"], host=[b"PATH=/site", b"S=1"]
    )
    assert values[b"PATH"] == b"/mine"
    assert values[b"LD_LIBRARY_PATH"] == b"/host/lib"
    assert b"ABSENT" not in values
    assert values[b"EMPTY"] == b""
    assert values[b"WITH"] == b"a=b"
    assert values[b"S"] == b"1"


def test_an_e_without_a_name_is_refused() -> None:
    with pytest.raises(UsageWrong):
        _values(requested=[b"=x"])


def test_clean_env_keeps_who_one_is_and_the_launchers_wire_up() -> None:
    values = _values(clean=True)
    assert values[b"MINE"] == b"2"
    assert values[b"HOME"] == b"/home/u"
    assert values[b"SLURM_JOB_ID"] == b"7"
    assert b"\xff\xfe" not in values


def test_the_sites_globs_extend_the_list() -> None:
    assert _values(extra_globs=[b"MIN*"])[b"MINE"] == b"2"


@pytest.mark.parametrize(
    ("name", "glob", "fits"),
    [
        (b"PATH", b"PATH", True),
        (b"PATHS", b"PATH", False),
        (b"LD_X", b"LD_*", True),
        (b"X_CA_BUNDLE", b"*_CA_BUNDLE", True),
        (b"PMIX_TMPDIR", b"PMIX_*TMPDIR", True),
        (b"PMIX_SERVER_TMPDIR", b"PMIX_*TMPDIR", True),
        (b"AB", b"AB*B", False),
    ],
)
def test_globs_have_one_star(name: bytes, glob: bytes, fits: bool) -> None:
    assert (name in Globs([glob])) is fits


def test_a_path_of_the_hosts_that_is_not_inside_loses_against_the_images() -> None:
    image = [b"CUDA_X=/usr/local/cuda", b"DATA=/image", b"LIST=/a:/b", b"PROXY=http://image:1", b"HOME=/root"]
    caller = {
        b"CUDA_X": b"/opt/cuda-12",
        b"DATA": b"/scratch/data",
        b"LIST": b"/scratch/x:/opt/y",
        b"PROXY": b"http://host:3128",
        b"HOME": b"/home/u",
        b"MINE": b"/opt/mine",
    }
    variables, _ = build(caller, image=image, shown=[b"/scratch"])
    assert {name: variables[name].value for name in caller} == {
        b"CUDA_X": b"/usr/local/cuda",
        b"DATA": b"/scratch/data",
        b"LIST": b"/a:/b",
        b"PROXY": b"http://host:3128",
        b"HOME": b"/home/u",
        b"MINE": b"/opt/mine",
    }


def test_what_lies_in_an_environment_activated_outside_stays_outside() -> None:
    caller = {
        b"CONDA_PREFIX": b"/home/u/env/",
        b"PROJ_DATA": b"/home/u/env/share/proj",
        b"CPPFLAGS": b"-O2 -isystem /home/u/env/include",
        b"XML_CATALOG_FILES": b"file:///home/u/env/etc/xml/catalog",
        b"NEAR": b"/home/u/environment/x",
        b"PWD": b"/home/u/env/share",
    }
    variables, dropped = build(caller, image=[b"PROJ_DATA=/usr/share/proj"], shown=[b"/home/u"])
    assert set(dropped) == {b"CONDA_PREFIX", b"CPPFLAGS", b"XML_CATALOG_FILES"}
    assert variables[b"PROJ_DATA"].value == b"/usr/share/proj"
    assert {b"NEAR", b"PWD"} <= set(variables)


def test_a_temporary_directory_that_is_not_carried_in_is_dropped(tmp_path: Path) -> None:
    caller = {b"TMPDIR": bytes(tmp_path), b"TMP": bytes(tmp_path)}
    variables, dropped = build(caller, image=[], shown=[b"/elsewhere"])
    assert b"TMPDIR" not in variables and dropped[b"TMP"] == "the directory is not carried in"
    variables, _ = build(caller, image=[], shown=[bytes(tmp_path.parent)])
    assert variables[b"TMPDIR"].value == bytes(tmp_path)


def test_the_name_of_the_working_directory_stays_where_it_leads_there_inside_too(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    real, link = bytes(tmp_path / "real"), bytes(tmp_path / "link")

    def inside(value: bytes, *shown: bytes, directory: bytes = real) -> bytes:
        variables, _ = build({b"PWD": value}, image=[], shown=shown, directory=directory)
        return variables[b"PWD"].value

    assert inside(link, bytes(tmp_path)) == link
    assert inside(link, real) == real
    assert inside(b"/nowhere", bytes(tmp_path)) == real
    assert inside(link, bytes(tmp_path), directory=b"/workspace") == b"/workspace"
    variables, _ = build({}, image=[], directory=real)
    assert b"PWD" not in variables


def _lists_of_the_document() -> dict[str, list[bytes]]:
    """Heading → the words of the block below it, for the sections that have one."""
    sections = (Path(__file__).parents[3] / "docs/environment.md").read_text().split("\n## ")[1:]
    found = {
        section.partition("\n")[0]: re.search(r"^```text\n(.*?)^```", section, flags=re.M | re.S)
        for section in sections
    }
    return {heading: block[1].encode().split() for heading, block in found.items() if block}


def test_the_document_lists_what_the_code_has() -> None:
    assert _lists_of_the_document() == {
        "Variables that describe the host": list(environment.OF_THE_HOST),
        "What --clean-env keeps": list(environment.KEPT_WHEN_CLEAN),
        "Directories named by variables": list(environment.DIRECTORIES),
    }


def _handed_on(entries: list[bytes], changes: str) -> list[bytes]:
    """The environment of what a Python in the environment `entries` executes after `changes` to the variables."""
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from hpcctr.client import environment\n"
        f"final = environment.of_this_process(); {changes}; environment.set_in_this_process(final)\n"
        "os.execv('/bin/cat', ['cat', '/proc/self/environ'])"
    )
    words = [os.fsencode(sys.executable), b"-IS", b"-c", code.encode(), os.fsencode(Path(__file__).parents[3] / "src")]
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 1)
        # execve itself: Python's refuses what the kernel takes.
        libc = ctypes.CDLL(None)
        libc.execve(
            words[0], (ctypes.c_char_p * 6)(*words, None), (ctypes.c_char_p * (len(entries) + 1))(*entries, None)
        )
        os._exit(1)
    os.close(write)
    with open(read, "rb") as file:
        text = file.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return text.split(b"\0")[:-1]


ODD = [b"B=1", b"TWICE=1", b"NO_SIGN", b"A=", b"=NO_NAME", b"TWICE=2", b"\xff=\xfe", b"LC_CTYPE=POSIX", b"Z=a=b"]


def test_an_environment_that_is_not_changed_stays_as_the_kernel_handed_it_over() -> None:
    assert _handed_on(ODD, "pass") == ODD


def test_python_adds_nothing_to_an_empty_environment() -> None:
    assert _handed_on([], "pass") == []
    # PEP 538 sets LC_CTYPE in the C locale.
    assert _handed_on([b"A=1"], "pass") == [b"A=1"]


def test_only_what_changes_is_changed() -> None:
    changes = "final[b'B'] = b'2'; del final[b'TWICE']; final[b'NEW'] = b'3'; os.environ['LEAK'] = '1'"
    kept = [entry for entry in ODD if not entry.startswith((b"TWICE", b"B="))]
    assert _handed_on(ODD, changes) == [*kept, b"B=2", b"NEW=3"]


def test_of_a_name_that_occurs_twice_the_first_value_counts() -> None:
    assert _handed_on(ODD, "final = {b'SEEN': final[b'TWICE']}") == [b"NO_SIGN", b"=NO_NAME", b"SEEN=1"]


def test_an_entry_of_the_image_without_a_name_is_no_variable() -> None:
    variables, _ = build({}, image=[b"=x", b"A=1", b"B"])
    assert b"" not in variables and b"B" not in variables and variables[b"A"].value == b"1"
