"""Fixtures of the attacks: a world for the program enter, and the check that a test leaves nothing in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import enter
from tests.support.hostile_caller import asked_node, requests_of
from tests.support.node import Node
from tests.support.scratch import scratch
from tests.support.users import User


@pytest.fixture(scope="session")
def enter_world() -> Iterator[enter.World]:
    """One world for all tests that leave it as it was."""
    with scratch("enter") as place, enter.world(place) as made:
        yield made


@pytest.fixture
def world(enter_world: enter.World) -> Iterator[enter.World]:
    """The shared world; the test may leave neither mounts nor processes."""
    before = enter_world.own_mounts()
    yield enter_world
    enter_world.require_nothing_left(before)


@pytest.fixture
def systemd_like_world() -> Iterator[enter.World]:
    """A world whose mounts are all shared, as systemd makes them at boot."""
    with scratch("enter") as place, enter.world(place, propagation="shared") as made:
        before = made.own_mounts()
        yield made
        made.require_nothing_left(before)


@pytest.fixture(scope="module")
def asked(busybox_image: str) -> Iterator[Node]:
    """A node of its own: what these tests send its engine is nobody else's."""
    with asked_node(busybox_image) as made:
        yield made


@pytest.fixture(scope="module")
def requests(asked: Node, alice: User, busybox_image: str) -> Iterator[dict[str, bytes]]:
    """One request of each verb, all of which alice may make."""
    with requests_of(asked, alice, busybox_image) as made:
        yield made
