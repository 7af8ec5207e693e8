"""What doctor says of devices, profiles and GPUs; PCI devices are files of the form that sysfs has."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hpcctr.cli import doctor_host
from hpcctr.site import CdiSettings, Site


def _pci(place: Path, slot: str, kind: str, vendor: str) -> None:
    (place / slot).mkdir(parents=True)
    (place / slot / "class").write_text(f"{kind}\n")
    (place / slot / "vendor").write_text(f"{vendor}\n")


def test_gpus_are_counted_by_vendor_and_other_devices_are_none(tmp_path: Path) -> None:
    _pci(tmp_path, "0000:01:00.0", "0x030200", "0x10de")
    _pci(tmp_path, "0000:02:00.0", "0x030200", "0x10de")
    _pci(tmp_path, "0000:03:00.0", "0x120000", "0x1002")
    _pci(tmp_path, "0000:04:00.0", "0x020000", "0x10de")
    _pci(tmp_path, "0000:05:00.0", "0x030000", "0x1a03")
    (tmp_path / "0000:06:00.0").mkdir()
    assert doctor_host.gpus_of(tmp_path) == {"0x10de": 2, "0x1002": 1}
    assert doctor_host.gpus_of(tmp_path / "none") == {}


def _cdi(directory: Path, name: str, text: str) -> None:
    directory.mkdir(exist_ok=True)
    directory.chmod(0o755)
    (directory / name).write_text(text)


def test_described_devices_are_counted_and_a_broken_file_is_named(tmp_path: Path) -> None:
    devices = [{"name": name, "containerEdits": {"deviceNodes": [{"path": "/dev/null"}]}} for name in ("0", "1")]
    good = {"cdiVersion": "0.5.0", "kind": "example.com/net", "devices": devices}
    _cdi(tmp_path / "cdi", "good.json", json.dumps(good))
    _cdi(tmp_path / "cdi", "broken.json", "{")
    found = list(doctor_host.devices(Site(cdi=CdiSettings(directories=(str(tmp_path / "cdi"),)))))
    assert found[0].is_good and "example.com/net (2)" in found[0].what
    assert [one.is_good for one in found[1:]] == [False]
    assert str(tmp_path / "cdi/broken.json") in found[1].what


def test_a_default_feature_without_a_profile_is_named(tmp_path: Path) -> None:
    (tmp_path / "ib.toml").write_text('devices = ["/dev/null"]\n')
    tmp_path.chmod(0o755)
    [found] = doctor_host.profiles(Site(profile_directory=str(tmp_path), features=("ib",)))
    assert found.is_good and "for every launch: ib" in found.what
    [found] = doctor_host.profiles(Site(profile_directory=str(tmp_path), features=("ib", "gone")))
    assert not found.is_good and "gone" in found.remedy


def test_a_wrong_profile_is_named(tmp_path: Path) -> None:
    (tmp_path / "ib.toml").write_text("nonsense = 1\n")
    tmp_path.chmod(0o755)
    [found] = doctor_host.profiles(Site(profile_directory=str(tmp_path)))
    assert not found.is_good and "ib.toml" in found.what


def test_slurm_is_told_by_version_and_ways_to_start_mpi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in prints what srun of Slurm 24.11 prints."""
    srun = tmp_path / "srun"
    lines = [
        "MPI plugin types are...",
        "\tnone",
        "\tpmi2",
        "\tpmix",
        "specific pmix plugin versions available: pmix_v5",
    ]
    (tmp_path / "list").write_text("\n".join(lines) + "\n")
    srun.write_text(f"#!/bin/sh\ncase $1 in --version) echo slurm-wlm 24.11.5;; *) cat {tmp_path}/list >&2;; esac\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    [found] = doctor_host.scheduler(Site())
    assert found.what == "slurm-wlm 24.11.5; --mpi=none|pmi2|pmix"
    srun.write_text("#!/bin/sh\necho 'srun: fatal: Could not establish a configuration source' >&2; exit 1\n")
    [found] = doctor_host.scheduler(Site())
    assert found.what == f"{srun}, which finds no configuration of a cluster"
    monkeypatch.setenv("PATH", "/nonexistent")
    [found] = doctor_host.scheduler(Site())
    assert found.what == "no srun here"


def test_mpi_of_the_node_is_told_whatever_is_wrong_with_profiles(tmp_path: Path) -> None:
    (tmp_path / "mpi.toml").write_text("nonsense = 1\n")
    [found] = doctor_host.mpi(Site(profile_directory=str(tmp_path)))
    assert found.is_good and "launchers: " in found.what
