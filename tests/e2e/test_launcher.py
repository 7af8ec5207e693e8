"""How the command hpcctr starts: through front, which `hpcctr engine install` installs and doctor looks at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Profile
from tests.support.engine import HPCCTR

pytestmark = [pytest.mark.root, pytest.mark.containerd]


def _launcher_of(findings: bytes) -> dict[str, object]:
    (found,) = [finding for finding in json.loads(findings) if finding["thing"] == "launcher"]
    assert isinstance(found, dict)
    return found


def test_the_installed_command_starts_through_front(gateway: Profile) -> None:
    front = gateway.node.site.enter.with_name("front")
    assert HPCCTR.read_text().startswith(f"#!{front} {HPCCTR.parent}/python")
    done = gateway.node.hpcctr("doctor", "--format", "json", user=gateway.user, check=False)
    found = _launcher_of(done.stdout)
    assert found["is_good"] is True and found["what"] == f"{HPCCTR}: starts through {front}"


def test_doctor_says_when_the_command_starts_otherwise(gateway: Profile, place: Path) -> None:
    script = place / "hpcctr"
    script.write_text(HPCCTR.read_text().replace(HPCCTR.read_text().partition("\n")[0], f"#!{HPCCTR.parent}/python"))
    script.chmod(0o755)
    done = gateway.node.host.run(
        [str(script), "doctor", "--format", "json"], user=gateway.user, env=gateway.node.environment(), check=1
    )
    found = _launcher_of(done.stdout)
    assert found["is_good"] is False and "it begins with" in str(found["what"])
    assert found["remedy"] == "hpcctr engine install"


def test_a_front_whose_name_is_too_long_for_a_first_line_is_refused_before_anything_is_installed(
    gateway: Profile, place: Path
) -> None:
    deep = place / ("d" * 120) / ("e" * 120)
    site = place / "site.toml"
    site.write_text(gateway.node.site.file.read_text().replace(str(gateway.node.site.enter), f"{deep}/enter"))
    done = gateway.node.hpcctr("engine", "install", "--site", str(site), check=125)
    assert b"error[launcher]" in done.stderr and b"255" in done.stderr and b"\nhint: " in done.stderr
    assert not deep.exists()


@pytest.mark.parametrize("descriptors", ["2>&-", "0<&- 1>&- 2>&-"])
def test_an_error_that_nobody_can_read_still_has_its_status(profile: Profile, descriptors: str) -> None:
    script = f'"$@" {descriptors}'
    words = ["sh", "-c", script, "sh", str(HPCCTR), "run", "oci:/nowhere", "--", "true"]
    profile.node.host.run(words, user=profile.user, env=profile.node.environment(), check=125)
