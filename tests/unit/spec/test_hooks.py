"""The section hooks."""

from __future__ import annotations

from hpcctr.host.edits import HookEdit
from hpcctr.spec.hooks import TIMEOUT, TIMEOUT_MAX, hooks


def _hook(**changes: object) -> HookEdit:
    values: dict[str, object] = {
        "stage": "createRuntime",
        "path": "/usr/bin/hook",
        "args": ("hook", "--now"),
        "env": ("A=1",),
        "timeout": None,
        "origin": "x.json",
    }
    return HookEdit(**{**values, **changes})  # type: ignore[arg-type]


def test_hooks_are_as_the_site_has_written_them_in_their_order() -> None:
    assert hooks([_hook(), _hook(stage="prestart", args=()), _hook(path="/usr/bin/other")]) == {
        "createRuntime": [
            {"path": "/usr/bin/hook", "args": ["hook", "--now"], "env": ["A=1"], "timeout": TIMEOUT},
            {"path": "/usr/bin/other", "args": ["hook", "--now"], "env": ["A=1"], "timeout": TIMEOUT},
        ],
        "prestart": [{"path": "/usr/bin/hook", "args": ["/usr/bin/hook"], "env": ["A=1"], "timeout": TIMEOUT}],
    }


def test_an_empty_environment_is_said_and_not_left_out() -> None:
    assert hooks([_hook(env=())])["createRuntime"][0]["env"] == []


def test_no_hook_runs_for_ever() -> None:
    times = [hooks([_hook(timeout=seconds)])["createRuntime"][0]["timeout"] for seconds in (3, 0, 86400)]
    assert times == [3, TIMEOUT, TIMEOUT_MAX]
