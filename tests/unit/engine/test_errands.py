"""What the engine decides about errands; what storekeepers do is proven in tests/attacks and tests/e2e."""

from __future__ import annotations

import os
import socket
from concurrent.futures import Future
from pathlib import Path

import pytest

from hpcctr.engine import errands
from hpcctr.engine.errands import Errands
from hpcctr.errand import Ended, Errand
from hpcctr.errors import EngineBusy, ImageNotYours, PolicyDenied, PullRefused, ReferenceWrong, StoreUnusable
from hpcctr.site import LimitSettings, Site
from tests.support.values import a_caller

pytestmark = pytest.mark.root

ALICE = a_caller(uid=4711)


def _errands(tmp_path: Path, rules: str = "", **limits: int) -> Errands:
    directory, store = tmp_path / "policy.d", tmp_path / "store"
    store.mkdir(exist_ok=True)
    os.chown(store, 61950, 61950)
    if rules:
        directory.mkdir()
        (directory / "1.toml").write_text(rules)
    return Errands(Site(store=str(store), policy_directory=str(directory), limits=LimitSettings(**limits)))


def test_without_rules_everybody_may(tmp_path: Path) -> None:
    for errand in (
        Errand(task="pull", image="python:3.12"),
        Errand(task="import", image="oci-archive", name="localhost/x:1"),
        Errand(task="images"),
        Errand(task="remove", image="x"),
        Errand(task="share", image="x", grantees="uid-1"),
        Errand(task="shared"),
    ):
        assert _errands(tmp_path).may(errand, ALICE)


def test_rules_know_pulls_by_the_images_name_and_imports_as_private(tmp_path: Path) -> None:
    rules = (
        '[[rule]]\nname = "a"\naction = "deny"\nimages = ["private/docker.io/*"]\n'
        '[[rule]]\nname = "b"\naction = "deny"\nimages = ["quay.io/*"]\n'
        '[[rule]]\nname = "c"\naction = "allow"\n'
    )
    engine = _errands(tmp_path, rules)
    for errand, rule in (
        (Errand(task="pull", image="python:3.12"), "c"),
        (Errand(task="pull", image="quay.io/org/app:1"), "b"),
        (Errand(task="import", image="oci-archive", name="python:3.12"), "a"),
        (Errand(task="import", image="oci-archive", name="quay.io/org/app:1"), "c"),
    ):
        if rule == "c":
            assert 'rule "c"' in engine.may(errand, ALICE)
        else:
            with pytest.raises(PolicyDenied, match=f'rule "{rule}"'):
                engine.may(errand, ALICE)


def test_the_sites_store_takes_no_files_and_no_other_names(tmp_path: Path) -> None:
    for errand in (
        Errand(task="pull", image="oci-archive:/etc/shadow"),
        Errand(task="pull", image="python:3.12", name="ubuntu:24.04"),
    ):
        with pytest.raises(StoreUnusable, match="under their own names"):
            _errands(tmp_path).may(errand, ALICE)
    for name in ("", "../x", "oci:/x"):
        with pytest.raises(ReferenceWrong):
            _errands(tmp_path).may(Errand(task="import", image="oci-archive", name=name), ALICE)


def test_a_store_of_roots_is_not_written_for_users(tmp_path: Path) -> None:
    engine = _errands(tmp_path)
    os.chown(tmp_path / "store", 0, 0)
    for errand in (Errand(task="pull", image="x:1"), Errand(task="import", image="oci-archive", name="localhost/x:1")):
        with pytest.raises(PullRefused, match="belongs to root"):
            engine.may(errand, ALICE)


def test_what_another_user_shares_is_looked_at_and_nothing_else(tmp_path: Path) -> None:
    engine = _errands(tmp_path)
    assert engine.may(Errand(task="inspect", image="@bob/app:1"), ALICE)
    for task in ("share", "unshare", "shares", "remove"):
        with pytest.raises(ImageNotYours, match="its owner's"):
            engine.may(Errand(task=task, image="@bob/app:1"), ALICE)
    with pytest.raises(ReferenceWrong):
        engine.may(Errand(task="pull", image="@bob/app:1"), ALICE)
    os.chown(tmp_path / "store", 0, 0)
    with pytest.raises(PullRefused, match="belongs to root"):
        engine.may(Errand(task="share", image="app:1", grantees="uid-1"), ALICE)


def test_storekeepers_are_counted_by_user_and_in_all(tmp_path: Path) -> None:
    engine = _errands(tmp_path, errands=3, errands_per_uid=2)
    with engine._counted(1), engine._counted(1):
        with pytest.raises(EngineBusy, match="2 yours"), engine._counted(1):
            pass
        with engine._counted(2), pytest.raises(EngineBusy, match="3 pulls"), engine._counted(3):
            pass
    with engine._counted(1), engine._counted(1):
        pass


def test_who_waits_for_another_launch_may_leave() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    done: Future[errands._Outcome | None] = Future()
    with ours:
        with pytest.raises(ConnectionAbortedError):
            errands._wait(done, ours)
        done.set_result(Ended())
        assert errands._wait(done, ours) == Ended()
