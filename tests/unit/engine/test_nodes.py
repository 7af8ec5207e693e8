"""The parts of the engine's containers that need no containerd; tests/containerd has the rest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from hpcctr.containerd import Containerd
from hpcctr.engine import nodes
from hpcctr.engine.nodes import NodeContainers
from hpcctr.errors import ContainerdUnavailable, DeadlinePassed, TargetImpossible
from hpcctr.host.edits import HostEdits
from hpcctr.policy.grant import Grant
from hpcctr.site import Site
from tests.support.scratch import scratch
from tests.support.values import a_caller, a_stored_image


@pytest.fixture
def base() -> Iterator[Path]:
    with scratch("nodes") as directory:
        yield directory


def _grant() -> Grant:
    return Grant(caller=a_caller(), image=a_stored_image(), edits=HostEdits(), targets=(), rule="test")


def test_without_containerd_nothing_is_opened_and_nothing_is_left(base: Path) -> None:
    engine = NodeContainers(
        site=Site(), containerd=Containerd(f"{base}/no.sock"), state=f"{base}/direct-1", owner="direct-1"
    )

    def open_image() -> int:
        raise AssertionError("the image was opened")

    for _ in range(2):
        with pytest.raises(ContainerdUnavailable, match=f"{base}/no.sock"):
            engine.get(_grant(), open_image=open_image)
    engine.close(remove=True)
    assert os.listdir(base) == []


def test_whoever_waits_for_another_gets_an_error_of_its_own() -> None:
    ready: Future[None] = Future()
    failure = TargetImpossible("mount target /x: no", hint="another")
    ready.set_exception(failure)
    with pytest.raises(TargetImpossible) as raised:
        nodes._wait_for_another(ready)
    assert raised.value is not failure
    assert (raised.value.message, raised.value.hint) == (failure.message, failure.hint)


def test_waiting_for_another_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "_BUILD_SECONDS", 0.01)
    with pytest.raises(DeadlinePassed):
        nodes._wait_for_another(Future())
