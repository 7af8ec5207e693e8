"""The environment a program gets, end to end; the rules in full are in tests/unit/client/test_environment.py."""

from __future__ import annotations

import json

import pytest

from tests.e2e.conftest import Profile

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.usefixtures("module_leaves_nothing")]


def _environment(profile: Profile, *flags: str, **extra: str) -> dict[str, str]:
    lines = profile.output("env", flags=flags, env=extra).splitlines()
    return dict(line.split("=", 1) for line in lines)


def test_the_callers_variables_arrive_and_the_hosts_paths_do_not(profile: Profile) -> None:
    seen = _environment(profile, MINE="1", LD_LIBRARY_PATH="/host", PYTHONPATH="/host", OMP_NUM_THREADS="3")
    assert (seen["MINE"], seen["OMP_NUM_THREADS"], seen["HOME"]) == ("1", "3", profile.home)
    assert "LD_LIBRARY_PATH" not in seen
    assert "PYTHONPATH" not in seen
    assert seen["HPCCTR_IMAGE_DIGEST"].startswith("sha256:")


def test_a_hostile_pythonpath_does_not_reach_the_client(gateway: Profile) -> None:
    assert (
        _environment(gateway, PYTHONPATH=gateway.home, PYTHONSTARTUP="/nowhere", PYTHONHOME="/nowhere")["HOME"]
        == gateway.home
    )


def test_nothing_is_added_behind_the_callers_back(gateway: Profile) -> None:
    outside = dict(line.split("=", 1) for line in gateway.native("env").splitlines())
    added = {"HPCCTR_IMAGE", "HPCCTR_IMAGE_DIGEST", "PYTHONNOUSERSITE", "HPCCTR_SITE"}
    image = _environment(gateway, "--clean-env")
    inside = _environment(gateway)
    assert set(inside) - set(outside) <= added | set(image) | {"SHLVL", "PWD", "OLDPWD"}


def test_e_sets_passes_and_wins(profile: Profile) -> None:
    seen = _environment(
        profile, "-e", "A=b=c", "-e", "LD_PRELOAD", "-e", "HPCCTR_IMAGE=mine", "-e", "NONE", LD_PRELOAD=""
    )
    assert (seen["A"], seen["LD_PRELOAD"], seen["HPCCTR_IMAGE"]) == ("b=c", "", "mine")
    assert "NONE" not in seen


def test_clean_env_starts_from_the_image(profile: Profile) -> None:
    seen = _environment(profile, "--clean-env", MINE="1", SLURM_JOB_ID="7")
    assert "MINE" not in seen
    assert seen["SLURM_JOB_ID"] == "7"


def test_explain_prints_the_plan_and_runs_nothing(profile: Profile) -> None:
    done = profile.run(
        "touch", f"{profile.home}/never", flags=["--explain", "-e", "A=1", "-v", "/var:/host-var:ro"], env={"LD_X": "1"}
    )
    text = done.stdout.decode()
    for words in ("sha256:", "touch", "/host-var", "A ", "LD_X", "describes the host's files", "built-in policy"):
        assert words in text
    assert (
        "No such file"
        in profile.node.host.run(["ls", f"{profile.home}/never"], user=profile.user, check=2).stderr.decode()
    )


def test_the_image_list_is_machine_readable(gateway: Profile) -> None:
    rows = json.loads(gateway.node.hpcctr("images", "--format", "json", user=gateway.user).stdout)
    assert any(row["digest"].startswith("sha256:") for row in rows)
