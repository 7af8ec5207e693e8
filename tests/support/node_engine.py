"""The node containers of one engine, running in a Host, without gateway, store or policy."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from hpcctr import errors
from hpcctr.host.edits import HostEdits
from tests.support.containerd import Containerd
from tests.support.host import Host

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Got:
    """A container as the engine gave it; `namespace` is a path of its mount namespace."""

    container_id: str
    key: str
    uid: int
    digest: str
    namespace: str
    seconds: float


@dataclass(kw_only=True)
class NodeEngine:
    """One running driver. Errors of the engine are raised here as what they are there."""

    host: Host
    containerd: Containerd
    process: subprocess.Popen[bytes]
    state: str
    image: Path

    def call(self, method: str, *arguments: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([method, arguments]).encode() + b"\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the engine has ended with status {self.process.wait(10)}"
        return _value(json.loads(line))

    def request(
        self,
        *,
        uid: int = 61000,
        gid: int = 61000,
        groups: Sequence[int] = (),
        targets: Sequence[tuple[str, str]] = (),
        digest: str = "a",
        image: Path | None = None,
        passwd: str = "",
        edits: HostEdits | None = None,
        image_env: Sequence[str] = (),
    ) -> dict[str, Any]:
        return {
            "uid": uid,
            "gid": gid,
            "groups": list(groups),
            "targets": list(targets),
            "digest": digest,
            "image": str(image or self.image),
            "passwd": passwd,
            "edits": msgspec.to_builtins(edits or HostEdits()),
            "image_env": list(image_env),
        }

    def get(self, **asked: Any) -> Got:
        return Got(**self.call("get", self.request(**asked)))

    def get_at_once(self, asked: Sequence[dict[str, Any]]) -> list[Got | errors.HpcctrError]:
        results: list[Got | errors.HpcctrError] = []
        for answer in self.call("get_at_once", list(asked)):
            try:
                results.append(Got(**_value(answer)))
            except errors.HpcctrError as error:
                results.append(error)
        return results

    def enter(self, container: Got, *, uid: int | None = None) -> subprocess.Popen[bytes]:
        """A process inside that stays until it is killed or its stdin ends, joined as a member."""
        member = self.popen_inside(container, "/bin/cat", uid=container.uid if uid is None else uid)
        self.call("join", container.container_id, member.pid)
        return member

    def popen_inside(self, container: Got, *argv: str, uid: int) -> subprocess.Popen[bytes]:
        identity = [f"--setuid={uid}", f"--setgid={uid}"]
        # Once it has written a line it has gone in.
        script = 'echo in && exec "$@"'
        entered = ["nsenter", f"--mount={container.namespace}", *identity, "/bin/sh", "-c", script, "sh", *argv]
        process = self.host.popen(entered, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said == b"in\n", f"{argv} did not get in: said {said!r}, status {process.poll()}"
        return process

    def run_inside(self, container: Got, *argv: str, uid: int | None = None, check: bool = True) -> str:
        """What a program prints inside."""
        uid = container.uid if uid is None else uid
        entered = ["nsenter", f"--mount={container.namespace}", f"--setuid={uid}", f"--setgid={uid}", *argv]
        return self.host.run(entered, check=check).stdout.decode()

    def kill(self) -> None:
        """SIGKILL, as the OOM killer would."""
        self.process.kill()
        self.process.wait()

    def close(self, *, remove: bool) -> None:
        self.call("close", remove)
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(20) == 0


def _value(answer: list[Any]) -> Any:
    if answer[0] == "error":
        _, slug, message, hint = answer
        raise errors.of_slug(slug)(message, hint=hint)
    return answer[1]


def launch(
    containerd: Containerd,
    image: Path,
    *,
    linger_seconds: float = 60.0,
    runtime: str = "runc",
    containers_per_uid: int = 64,
    state: str = "/run/hpcctr/state",
    owner: str = "gateway",
    socket: str | None = None,
    retry_seconds: float = 0.0,
) -> NodeEngine:
    """Start an engine; what it leaves is the caller's to look at."""
    settings = {
        "linger_seconds": linger_seconds,
        "runtime": runtime,
        "containers_per_uid": containers_per_uid,
        "state": state,
        "owner": owner,
        "socket": socket or str(containerd.socket),
        "retry_seconds": retry_seconds,
    }
    process = containerd.host.popen(
        [sys.executable, "-m", "tests.support.node_engine_driver", json.dumps(settings)],
        env={"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd="/",
    )
    return NodeEngine(host=containerd.host, containerd=containerd, process=process, state=state, image=image)


@contextlib.contextmanager
def node_engine(containerd: Containerd, image: Path, **settings: Any) -> Iterator[NodeEngine]:
    """An engine that removes everything at the end, unless the test has ended it."""
    engine = launch(containerd, image, **settings)
    try:
        yield engine
    finally:
        if engine.process.poll() is None:
            engine.close(remove=True)
