"""What doctor thinks of what it finds; tests/e2e/test_cli.py has it on nodes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hpcctr.cli.doctor_cmd import _with_known_escapes
from hpcctr.cli.finding import Finding


def _looked_at(path: Path | str, version: str) -> Finding:
    return _with_known_escapes(Finding(thing="runc", is_good=True, what=f"{path}, runc version {version}"))


@pytest.mark.parametrize("version", ["1.1.5", "1.2.9", "1.3.5", "1.4.2", "1.4.0-rc.3", "0.1.1", "1.0.0-rc93"])
def test_a_runc_of_no_package_with_known_ways_out_is_named_with_the_remedy(tmp_path: Path, version: str) -> None:
    (tmp_path / "runc").touch()
    found = _looked_at(tmp_path / "runc", version)
    assert not found.is_good
    assert "CVE-2025-52881" in found.what and "1.3.6 or 1.4.3" in found.remedy


@pytest.mark.parametrize(
    "version", ["1.3.6", "1.3.10", "1.4.3", "1.5.0", "1.10.0", "2.0.0", "1.5.0+dev", "unknown", ""]
)
def test_a_runc_that_is_mended_or_does_not_say_raises_no_alarm(tmp_path: Path, version: str) -> None:
    (tmp_path / "runc").touch()
    assert _looked_at(tmp_path / "runc", version) == Finding(
        thing="runc", is_good=True, what=f"{tmp_path / 'runc'}, runc version {version}"
    )


def test_the_number_of_a_packaged_runc_raises_no_alarm_whatever_it_is() -> None:
    """A distribution mends without a new number; any file of a package stands for its runc here."""
    path = shutil.which("dpkg-query") or shutil.which("rpm")
    assert path is not None
    found = _looked_at(path, "1.1.5+ds1")
    assert found.is_good and not found.remedy
    assert found.what.endswith(("of the package dpkg: keep that updated", "of the package rpm: keep that updated"))
