"""Launches in every mode: the gateway as an ordinary user, and root's direct mode."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.leftovers import Leftovers, require_nothing_new
from tests.support.node import Node, node
from tests.support.registry import Registry
from tests.support.scratch import scratch
from tests.support.users import User

OWNER = 61900
"""The service account of stores: a number is all it needs."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One way of launching: through the engine as a user, or as root without it."""

    name: str
    node: Node
    #: None is root.
    user: User | None
    #: In the store.
    image: str

    @property
    def uid(self) -> int:
        return 0 if self.user is None else self.user.uid

    @property
    def home(self) -> str:
        return "/root" if self.user is None else str(self.user.home)

    def run(self, *command: str, flags: Sequence[str] = (), **options: Any) -> subprocess.CompletedProcess[bytes]:
        """``hpcctr run FLAGS IMAGE -- COMMAND`` to its end."""
        return self.node.run(self.image, *command, user=self.user, flags=flags, **options)

    def output(self, *command: str, flags: Sequence[str] = (), **options: Any) -> str:
        """The same, and what it printed."""
        return self.run(*command, flags=flags, **options).stdout.decode(errors="surrogateescape")

    def start(self, *command: str, flags: Sequence[str] = ()) -> tuple[subprocess.Popen[bytes], str]:
        """A program that has printed a line, which is returned too; by default one that runs until its stdin ends."""
        words = command or ("sh", "-c", "echo; exec cat")
        process = self.node.popen(
            "run", *flags, self.image, "--", *words, user=self.user, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        return process, process.stdout.readline().decode().rstrip("\n")

    def native(self, *command: str, **options: Any) -> str:
        """What a command prints without a container."""
        return self.node.host.run(command, user=self.user, **options).stdout.decode(errors="surrogateescape")

    def refusal(self, *command: str, flags: Sequence[str] = (), status: int = 125, **options: Any) -> str:
        """The error text of a launch that must fail with ``status``."""
        done = self.run(*command, flags=flags, check=status, **options)
        assert done.stdout == b""
        return done.stderr.decode(errors="replace")


@pytest.fixture(scope="module")
def module_leaves_nothing(shared_node: Node) -> Iterator[None]:
    """The tests of a module together leave nothing on the shared node; one by one, the linger would cost a second
    each.
    """
    before = Leftovers.of(shared_node.host, shared_node.containerd)
    yield
    require_nothing_new(before)


@pytest.fixture(scope="session")
def busybox(shared_node: Node, busybox_image: str) -> str:
    """A tiny image in the shared node's store."""
    shared_node.pull(busybox_image)
    return busybox_image


@pytest.fixture(params=["gateway-user", "gateway-second-user", "direct"])
def profile(request: pytest.FixtureRequest, shared_node: Node, alice: User, bob: User, busybox: str) -> Profile:
    """Every mode in turn."""
    user = {"gateway-user": alice, "gateway-second-user": bob, "direct": None}[request.param]
    return Profile(name=request.param, node=shared_node, user=user, image=busybox)


@pytest.fixture
def gateway(shared_node: Node, alice: User, busybox: str) -> Profile:
    """An ordinary user through the engine."""
    return Profile(name="gateway-user", node=shared_node, user=alice, image=busybox)


@pytest.fixture
def own_node_with_busybox(own_node: Node, alice: User, busybox_image: str) -> Profile:
    """A node for one test, with the tiny image in its store and an ordinary user."""
    own_node.pull(busybox_image)
    return Profile(name="gateway-user", node=own_node, user=alice, image=busybox_image)


@pytest.fixture
def registry(place: Path) -> Iterator[Registry]:
    with Registry.start(place / "registry") as started:
        yield started


@pytest.fixture
def desk(place: Path, alice: User) -> Path:
    """A directory that nobody but alice can enter, root aside."""
    directory = place / "desk"
    directory.mkdir(mode=0o700)
    os.chown(directory, alice.uid, alice.gid)
    return directory


@pytest.fixture(scope="module")
def node_of_all() -> Iterator[Node]:
    """One node for the tests of a file."""
    with scratch("node-of-all") as directory, node(directory) as started:
        yield started


@pytest.fixture
def shop(node_of_all: Node) -> Node:
    """A node whose store is empty and belongs to a service account."""
    store = node_of_all.site.store
    for path in store.iterdir():
        shutil.rmtree(path)
    os.chown(store, OWNER, OWNER)
    return node_of_all
