"""The section mounts."""

from __future__ import annotations

from hpcctr.spec.mounts import BindMount, mounts


def test_nothing_of_the_host_is_mounted() -> None:
    assert [(mount["destination"], mount["type"]) for mount in mounts()] == [("/proc", "proc"), ("/dev", "tmpfs")]


def test_proc_shows_no_process_and_no_tunable_of_the_host() -> None:
    assert {"hidepid=2", "subset=pid", "nosuid", "nodev", "noexec"} == set(mounts()[0]["options"])  # type: ignore[call-overload]


def test_dev_is_read_only_and_nosuid() -> None:
    assert {"ro", "nosuid", "noexec"} <= set(mounts()[1]["options"])  # type: ignore[call-overload]


def _bind(**changes: object) -> BindMount:
    values: dict[str, object] = {
        "source": "/opt/a",
        "target": "/b",
        "kind": "f",
        "is_read_only": True,
        "is_noexec": False,
        "identity": "1:2",
        "origin": "site",
    }
    return BindMount(**{**values, **changes})  # type: ignore[arg-type]


def test_what_the_site_adds_comes_last_and_in_its_order() -> None:
    added = mounts([_bind(), _bind(target="/b/c")])[len(mounts()) :]
    assert [(one["type"], one["source"], one["destination"]) for one in added] == [
        ("bind", "/opt/a", "/b"),
        ("bind", "/opt/a", "/b/c"),
    ]


def test_every_mount_of_the_hosts_is_private_without_set_user_id_and_devices() -> None:
    for bind in (_bind(), _bind(kind="d"), _bind(is_read_only=False), _bind(kind="d", is_noexec=True)):
        options = mounts([bind])[-1]["options"]
        assert isinstance(options, list)
        prefix = "r" if bind.kind == "d" else ""
        assert options[:2] == [f"{prefix}bind", f"{prefix}private"]
        assert {f"{prefix}nosuid", f"{prefix}nodev"} <= set(options)
        assert (f"{prefix}ro" in options, f"{prefix}noexec" in options) == (bind.is_read_only, bind.is_noexec)
