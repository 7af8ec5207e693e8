"""The program behind tests/support/node_engine.py: node containers of one engine, asked in JSON lines on stdin.

Runs inside a Host, since containers are mounted where containerd is. A line is [method, arguments]; the answer is
["ok", value] or ["error", slug, message, hint].
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

import hpcctr.engine.nodes
from hpcctr.containerd import Containerd
from hpcctr.context import Caller
from hpcctr.engine.nodes import NodeContainer, NodeContainers
from hpcctr.errors import HpcctrError
from hpcctr.host.edits import HostEdits
from hpcctr.image.record import ImageConfig, ImageRecord, Platform, StoredImage
from hpcctr.policy.grant import Grant
from hpcctr.request import Target
from hpcctr.site import LimitSettings, Site


def _grant(asked: dict[str, Any], *, pid: int, pidfd: int) -> Grant:
    record = ImageRecord(
        schema=1,
        digest="sha256:" + asked["digest"] * 64,
        platform=Platform(os="linux", architecture="amd64"),
        config=ImageConfig(env=tuple(asked["image_env"])),
        file="root.squashfs",
        file_size=1,
        file_digest="sha256:" + "0" * 64,
        content_size=1,
        entries=1,
        created="2026-01-01T00:00:00Z",
        source="test",
        passwd=asked["passwd"].encode(),
    )
    return Grant(
        caller=Caller(pid=pid, pidfd=pidfd, uid=asked["uid"], gid=asked["gid"], groups=tuple(asked["groups"])),
        image=StoredImage(record=record, path=asked["image"], name="test"),
        edits=msgspec.convert(asked["edits"], HostEdits),
        targets=tuple(Target(kind, path.encode()) for kind, path in asked["targets"]),
        rule="test",
    )


class Driver:
    """The methods tests may call."""

    def __init__(self, settings: dict[str, Any]) -> None:
        site = Site(
            linger_seconds=settings["linger_seconds"],
            runtime=settings["runtime"],
            limits=LimitSettings(containers_per_uid=settings["containers_per_uid"]),
        )
        if settings["retry_seconds"]:
            hpcctr.engine.nodes._RETRY_SECONDS = settings["retry_seconds"]
        self.nodes = NodeContainers(
            site=site, containerd=Containerd(settings["socket"]), state=settings["state"], owner=settings["owner"]
        )
        self.held: dict[str, list[NodeContainer]] = {}
        self.opened: list[str] = []
        self.remembered: list[NodeContainer | None] = []

    def adopt(self) -> None:
        self.nodes.adopt()

    def get(self, asked: dict[str, Any]) -> dict[str, Any]:
        def open_image() -> int:
            self.opened.append(asked["image"])
            return os.open(asked["image"], os.O_RDONLY | os.O_CLOEXEC)

        pidfd = os.pidfd_open(os.getpid())
        before = time.perf_counter()
        try:
            container = self.nodes.get(_grant(asked, pid=os.getpid(), pidfd=pidfd), open_image=open_image)
        finally:
            os.close(pidfd)
        seconds = time.perf_counter() - before
        self.held.setdefault(container.container_id, []).append(container)
        return {
            "container_id": container.container_id,
            "key": container.key,
            "uid": container.uid,
            "digest": container.image_digest,
            "namespace": f"/proc/{os.getpid()}/fd/{container.namespace}",
            "seconds": seconds,
        }

    def get_at_once(self, asked: list[dict[str, Any]]) -> list[Any]:
        """Every request in a thread of its own, all let go at the same moment."""
        answers: list[Any] = [None] * len(asked)
        barrier = threading.Barrier(len(asked))

        def one(position: int) -> None:
            barrier.wait()
            answers[position] = answer(lambda: self.get(asked[position]))

        threads = [threading.Thread(target=one, args=(position,)) for position in range(len(asked))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers

    def join(self, container_id: str, pid: int) -> None:
        pidfd = os.pidfd_open(pid)
        try:
            caller = Caller(pid=pid, pidfd=pidfd, uid=0, gid=0, groups=())
            self.nodes.join(self.held[container_id][0], caller)
        finally:
            os.close(pidfd)

    def forget(self) -> None:
        for container in itertools.chain.from_iterable(self.held.values()):
            container.close()
        self.held.clear()

    def remember(self) -> None:
        """What the frames of an exception in a reference cycle do: keep every container there is now."""
        self.remembered = [slot.container for slot in self.nodes._slots.values()]

    def open_namespace(self, container_id: str, pid: int) -> None:
        os.close(self.nodes._builder.open_namespace(container_id, pid))

    def listing(self) -> dict[str, list[int]]:
        return {container.container_id: sorted(pids) for container, pids in self.nodes.listing()}

    def images_opened(self) -> int:
        return len(self.opened)

    def descriptors(self) -> int:
        return len(os.listdir("/proc/self/fd"))

    def wake_ups(self) -> int:
        """How often the watching thread has gone to sleep (proc(5), voluntary context switches)."""
        native = next(thread.native_id for thread in threading.enumerate() if thread.name == "node-containers")
        with open(f"/proc/self/task/{native}/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("voluntary_ctxt_switches"))

    def close(self, remove: bool) -> None:
        self.forget()
        self.nodes.close(remove=remove)


def answer(call: Callable[[], Any]) -> list[Any]:
    try:
        return ["ok", call()]
    except HpcctrError as error:
        return ["error", error.slug, error.message, error.hint]


def main() -> None:
    driver = Driver(json.loads(sys.argv[1]))
    for line in sys.stdin:
        method, arguments = json.loads(line)
        print(json.dumps(answer(lambda: getattr(driver, method)(*arguments))), flush=True)  # noqa: B023


if __name__ == "__main__":
    main()
