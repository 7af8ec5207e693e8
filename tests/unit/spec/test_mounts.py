"""The section mounts."""

from __future__ import annotations

from hpcctr.spec.mounts import mounts


def test_nothing_of_the_host_is_mounted() -> None:
    assert [(mount["destination"], mount["type"]) for mount in mounts()] == [("/proc", "proc"), ("/dev", "tmpfs")]


def test_proc_shows_no_process_and_no_tunable_of_the_host() -> None:
    assert {"hidepid=2", "subset=pid", "nosuid", "nodev", "noexec"} == set(mounts()[0]["options"])  # type: ignore[call-overload]


def test_dev_is_read_only_and_nosuid() -> None:
    assert {"ro", "nosuid", "noexec"} <= set(mounts()[1]["options"])  # type: ignore[call-overload]
