"""A compute node for tests: a Host with containerd, a site, and the gateway engine; and the words people type on it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.support import containerd, engine
from tests.support.containerd import Containerd
from tests.support.engine import HPCCTR, Engine
from tests.support.host import Host
from tests.support.site import Site
from tests.support.users import User


@dataclass(kw_only=True)
class Node:
    """Everything of one node. `engine` may be stopped and started again by a test."""

    host: Host
    containerd: Containerd
    site: Site
    engine: Engine

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        return {**self.site.environment, **(extra or {})}

    def hpcctr(
        self, *arguments: str, user: User | None = None, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[bytes]:
        """`hpcctr ARGUMENTS` to its end; options as for `Host.run`."""
        return self.host.run([str(HPCCTR), *arguments], user=user, env=self.environment(env), **options)

    def popen(
        self, *arguments: str, user: User | None = None, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[bytes]:
        """`hpcctr ARGUMENTS` in the background; options as for `Host.popen`."""
        return self.host.popen([str(HPCCTR), *arguments], user=user, env=self.environment(env), **options)

    def run(
        self, image: str, *command: str, user: User | None = None, flags: Sequence[str] = (), **options: Any
    ) -> subprocess.CompletedProcess[bytes]:
        """`hpcctr run FLAGS IMAGE -- COMMAND`."""
        return self.hpcctr("run", *flags, image, "--", *command, user=user, **options)

    @contextlib.contextmanager
    def held(
        self, image: str, *command: str, user: User | None = None, flags: Sequence[str] = ()
    ) -> Iterator[subprocess.Popen[bytes]]:
        """`hpcctr run` of a program that has printed an empty line; its input ends at the end, and so does it."""
        words = command or ("sh", "-c", "echo; exec cat")
        process = self.popen(
            "run", *flags, image, "--", *words, user=user, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
            process.communicate()

    def pull(self, *images: str, user: User | None = None, timeout: float = 300) -> None:
        """`hpcctr pull`, by default as root: what the site offers to everyone."""
        self.hpcctr("pull", *images, user=user, timeout=timeout)


@contextlib.contextmanager
def equipped(
    host: Host,
    *,
    runtime: Literal["runc", "crun"] = "runc",
    store: Path | None = None,
    linger_seconds: int = 1,
    carry: Sequence[str] = (),
    keys: str = "",
    more: str = "",
) -> Iterator[Node]:
    """Make a Host a node: containerd, site and engine, which end at the end."""
    daemon = containerd.start(host)
    try:
        site = Site.write(
            host.root,
            containerd_socket=daemon.socket,
            store=store,
            runtime=runtime,
            linger_seconds=linger_seconds,
            carry=carry,
            keys=keys,
            more=more,
        )
        engine.install_enter(site)
        gateway = engine.start(host, site)
        try:
            yield Node(host=host, containerd=daemon, site=site, engine=gateway)
        finally:
            gateway.stop()
    finally:
        daemon.stop()


@contextlib.contextmanager
def node(
    root: Path,
    *,
    propagation: Literal["private", "shared"] = "private",
    own_network: bool = False,
    cgroup2_only: bool = False,
    runtime: Literal["runc", "crun"] = "runc",
    linger_seconds: int = 1,
    carry: Sequence[str] = (),
    keys: str = "",
    more: str = "",
) -> Iterator[Node]:
    """Start a Host below ROOT with everything a node has."""
    with (
        Host.start(root, propagation=propagation, own_network=own_network, cgroup2_only=cgroup2_only) as host,
        equipped(host, runtime=runtime, linger_seconds=linger_seconds, carry=carry, keys=keys, more=more) as made,
    ):
        yield made
