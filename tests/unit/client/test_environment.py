"""The command's environment."""

from __future__ import annotations

import pytest

from hpcctr.client.environment import build, is_match
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
    assert is_match(name, (glob,)) is fits
