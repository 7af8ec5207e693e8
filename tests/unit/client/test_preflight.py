"""Launches that are refused before they start."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcctr.client import preflight
from hpcctr.client.environment import Variable
from hpcctr.client.preflight import require_launcher_outside, require_outside
from hpcctr.errors import InsideContainer, LauncherInside
from hpcctr.spec.process import ANCHOR

SLURM = {b"SLURM_JOB_ID": b"7"}


def _require(command: list[bytes], variables: dict[bytes, bytes]) -> None:
    require_launcher_outside(
        command, {name: Variable(value, "caller") for name, value in variables.items()}, image="img:1"
    )


@pytest.mark.parametrize(
    "name", [b"mpirun", b"/usr/bin/mpirun.openmpi", b"mpiexec", b"mpiexec.hydra", b"orterun", b"/opt/prterun"]
)
def test_a_launcher_in_an_allocation_is_refused(name: bytes) -> None:
    with pytest.raises(LauncherInside, match="img:1, in an allocation of Slurm") as raised:
        _require([name, b"-n", b"2", b"prog"], SLURM)
    assert "put it outside" in raised.value.hint and "on one node" in raised.value.hint
    _require([name, b"-n", b"2", b"prog"], {})


@pytest.mark.parametrize(
    ("variable", "command"), [(b"SLURM_JOB_ID", "srun"), (b"LSB_JOBID", "blaunch"), (b"PE_HOSTFILE", "qrsh")]
)
def test_the_schedulers_command_is_named(variable: bytes, command: str) -> None:
    with pytest.raises(LauncherInside, match=command):
        _require([b"mpirun", b"x"], {variable: b"1"})


@pytest.mark.parametrize("variable", preflight.CHOICES)
def test_who_has_chosen_a_way_to_start_processes_by_a_variable_is_not_refused(variable: bytes) -> None:
    _require([b"mpirun", b"x"], {**SLURM, variable: b"^slurm"})


@pytest.mark.parametrize("variable", preflight.CHOICES)
def test_a_variable_that_names_the_scheduler_is_no_choice(variable: bytes) -> None:
    with pytest.raises(LauncherInside):
        _require([b"mpirun", b"x"], {**SLURM, variable: b"slurm"})


@pytest.mark.parametrize("word", preflight.CHOOSING_WORDS)
def test_who_has_chosen_a_way_to_start_processes_by_an_option_is_not_refused(word: bytes) -> None:
    _require([b"mpirun", word, b"fork", b"x"], SLURM)


def test_who_means_it_is_not_refused() -> None:
    _require([b"mpirun", b"x"], {**SLURM, preflight.ALLOW_VARIABLE: b"1"})
    for off in (b"", b"0"):
        with pytest.raises(LauncherInside):
            _require([b"mpirun", b"x"], {**SLURM, preflight.ALLOW_VARIABLE: off})


@pytest.mark.parametrize("count", [b"SLURM_JOB_NUM_NODES", b"SLURM_NNODES"])
def test_open_mpis_launcher_is_not_refused_on_one_node_where_it_works(count: bytes) -> None:
    for name in preflight.OPEN_MPI_LAUNCHERS:
        _require([b"/usr/bin/" + name, b"x"] if b"." not in name else [name, b"x"], {**SLURM, count: b"1"})
        with pytest.raises(LauncherInside):
            _require([name, b"x"], {**SLURM, count: b"2"})
    # It may be Hydra's, which would hang.
    with pytest.raises(LauncherInside):
        _require([b"mpirun", b"x"], {**SLURM, count: b"1"})


@pytest.mark.parametrize("name", [b"hostname", b"mpirun-wrapper", b"./my-mpirun", b"sh"])
def test_other_commands_are_nobodys_business(name: bytes) -> None:
    _require([name, b"mpirun"], SLURM)


def test_hpcctr_inside_a_container_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_outside()
    anchor = tmp_path / "anchor"
    monkeypatch.setattr(preflight, "ANCHOR", bytes(anchor))
    require_outside()
    anchor.touch()
    with pytest.raises(InsideContainer, match="no_new_privs"):
        require_outside()


def test_the_sign_of_a_container_is_the_file_that_the_engine_puts_there() -> None:
    assert ANCHOR.encode() == preflight.ANCHOR


@pytest.mark.parametrize("rank", [b"PMI_RANK", b"PMIX_RANK", b"SLURM_PROCID"])
def test_of_a_job_the_first_rank_warns(capfd: pytest.CaptureFixture[str], rank: bytes) -> None:
    for value in (b"1", b"0"):
        preflight.warn([f"of {value.decode()}"], {rank: Variable(value, "caller")})
    assert capfd.readouterr().err == "hpcctr: warning: of 0\n"


def test_a_warning_is_one_line_that_no_terminal_obeys(capfd: pytest.CaptureFixture[str]) -> None:
    preflight.warn(["a\x1b[31mb\nhpcctr: error[x]: c"], {})
    assert capfd.readouterr().err == "hpcctr: warning: a?[31mb?hpcctr: error[x]: c\n"
