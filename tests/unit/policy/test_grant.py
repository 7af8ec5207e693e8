"""The key of a grant."""

from __future__ import annotations

from hpcctr.host.edits import EnvEdit, HostEdits
from hpcctr.policy.grant import Grant
from hpcctr.request import Target
from tests.support.values import a_caller, a_stored_image


def _key(
    *, uid: int = 1000, digest: str = "sha256:" + "a" * 64, env: str = "x", targets: tuple[Target, ...] = ()
) -> str:
    return Grant(
        caller=a_caller(uid=uid),
        image=a_stored_image(digest=digest),
        edits=HostEdits(env=(EnvEdit(name="A", value=env, origin="test"),)),
        targets=targets,
        rule="r",
    ).key


def test_every_part_of_a_grant_that_shapes_a_container_changes_its_key() -> None:
    keys = {
        _key(),
        _key(uid=1001),
        _key(digest="sha256:" + "b" * 64),
        _key(env="y"),
        _key(targets=(Target("d", b"/a"),)),
        _key(targets=(Target("f", b"/a"),)),
        _key(targets=(Target("d", b"/a"), Target("d", b"/b"))),
    }
    assert len(keys) == 7


def test_equal_grants_share_a_key() -> None:
    assert _key() == _key()
