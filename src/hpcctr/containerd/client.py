"""What hpcctr asks of containerd: records of containers and created tasks, in a containerd namespace of its own.

Tasks are created and never started, without stdio and with the runtime the site names; there is no way to say anything
else. A method raises :class:`ContainerdUnavailable`, :class:`DeadlinePassed`, :class:`ContainerNotFound`,
:class:`ContainerExists` or :class:`ContainerdFailed`.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.any_pb2 import Any
from google.protobuf.empty_pb2 import Empty

from hpcctr.containerd.api.services.containers.v1 import containers_pb2 as containers
from hpcctr.containerd.api.services.tasks.v1 import tasks_pb2 as tasks
from hpcctr.containerd.api.services.version.v1 import version_pb2 as version
from hpcctr.containerd.api.types import mount_pb2
from hpcctr.containerd.api.types.runc.options import oci_pb2
from hpcctr.containerd.channel import Channel
from hpcctr.errors import ContainerNotFound

#: containerd's namespace of everything hpcctr makes.
NAMESPACE = "hpcctr"
_RUNTIME = "io.containerd.runc.v2"
#: containerd finds the type of an Any by exactly these names (typeurl; 1.6 strips no prefix).
_SPEC_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
_OPTIONS_TYPE = "containerd.runc.v1.Options"
#: Seconds: what only touches containerd's database, and what runs a shim and an OCI runtime.
_QUICK = 10.0
_SLOW = 60.0


@dataclass(frozen=True, kw_only=True)
class ContainerEntry:
    """One record in containerd."""

    container_id: str
    labels: Mapping[str, str]
    #: Seconds since the epoch.
    created: float


@dataclass(frozen=True, kw_only=True)
class RootfsMount:
    """A mount the shim makes on the bundle's rootfs."""

    kind: str
    source: str
    options: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TaskState:
    """The init of a task; its pid is 0 once the task has stopped and containerd has forgotten it."""

    pid: int
    is_created: bool


class Containerd:
    """A containerd, from any thread. The connection is made by the first call and again after a restart."""

    def __init__(self, socket: str, *, namespace: str = NAMESPACE) -> None:
        self.socket = socket
        self._channel = Channel(socket, namespace=namespace)

    def version(self) -> str:
        """The daemon's version, ``1.6.20~ds1``."""
        answer = self._channel.call(
            "/containerd.services.version.v1.Version/Version",
            Empty(),
            version.VersionResponse.FromString,
            seconds=_QUICK,
            what="tell its version",
        )
        return answer.version

    def list_containers(self, *, label: str, value: str | None = None) -> list[ContainerEntry]:
        """The records that have ``label``, with ``value`` when given. Both are ours: nothing is escaped."""
        answer = self._channel.call(
            "/containerd.services.containers.v1.Containers/List",
            containers.ListContainersRequest(
                filters=[f'labels."{label}"' if value is None else f'labels."{label}"=="{value}"']
            ),
            containers.ListContainersResponse.FromString,
            seconds=_QUICK,
            what="list containers",
        )
        return [
            ContainerEntry(
                container_id=entry.id,
                labels=dict(entry.labels),
                created=entry.created_at.seconds + entry.created_at.nanos / 1e9,
            )
            for entry in answer.containers
        ]

    def create_container(
        self, container_id: str, *, labels: Mapping[str, str], spec: Mapping[str, object], binary_name: str = ""
    ) -> None:
        """Write the record. ``binary_name`` is the OCI runtime when it is not runc."""
        runtime = containers.Container.Runtime(name=_RUNTIME)
        if binary_name:
            runtime.options.CopyFrom(
                Any(type_url=_OPTIONS_TYPE, value=oci_pb2.Options(binary_name=binary_name).SerializeToString())
            )
        container = containers.Container(
            id=container_id,
            labels=dict(labels),
            runtime=runtime,
            spec=Any(type_url=_SPEC_TYPE, value=json.dumps(spec).encode()),
        )
        self._channel.call(
            "/containerd.services.containers.v1.Containers/Create",
            containers.CreateContainerRequest(container=container),
            containers.CreateContainerResponse.FromString,
            seconds=_QUICK,
            what="record the container",
        )

    def delete_container(self, container_id: str) -> None:
        """Forget the record. Its task must be deleted before: containerd would lose it."""
        self._channel.call(
            "/containerd.services.containers.v1.Containers/Delete",
            containers.DeleteContainerRequest(id=container_id),
            Empty.FromString,
            seconds=_QUICK,
            what="forget the container",
        )

    def create_task(self, container_id: str, *, rootfs: Sequence[RootfsMount]) -> int:
        """Build the container and leave it created; the pid of its init."""
        answer = self._channel.call(
            "/containerd.services.tasks.v1.Tasks/Create",
            tasks.CreateTaskRequest(
                container_id=container_id,
                rootfs=[
                    mount_pb2.Mount(type=mount.kind, source=mount.source, options=list(mount.options))
                    for mount in rootfs
                ],
            ),
            tasks.CreateTaskResponse.FromString,
            seconds=_SLOW,
            what="build the container",
        )
        return answer.pid

    def find_task(self, container_id: str) -> TaskState | None:
        """The task of a container; None when it has none."""
        try:
            answer = self._channel.call(
                "/containerd.services.tasks.v1.Tasks/Get",
                tasks.GetRequest(container_id=container_id),
                tasks.GetResponse.FromString,
                seconds=_QUICK,
                what="find the task",
            )
        except ContainerNotFound:
            return None
        # Status.CREATED of containerd.v1.types.
        return TaskState(pid=answer.process.pid, is_created=answer.process.status == 1)

    def kill_task(self, container_id: str) -> None:
        """Send SIGKILL to the init."""
        self._channel.call(
            "/containerd.services.tasks.v1.Tasks/Kill",
            tasks.KillRequest(container_id=container_id, signal=signal.SIGKILL),
            Empty.FromString,
            seconds=_QUICK,
            what="kill the init",
        )

    def wait_for_task(self, container_id: str, *, seconds: float) -> None:
        """Return when the init has ended; :class:`DeadlinePassed` after ``seconds``."""
        self._channel.call(
            "/containerd.services.tasks.v1.Tasks/Wait",
            tasks.WaitRequest(container_id=container_id),
            tasks.WaitResponse.FromString,
            seconds=seconds,
            what="see the init end",
        )

    def delete_task(self, container_id: str) -> None:
        """Take the ended task down: shim, bundle, rootfs mount and cgroup."""
        self._channel.call(
            "/containerd.services.tasks.v1.Tasks/Delete",
            tasks.DeleteTaskRequest(container_id=container_id),
            tasks.DeleteResponse.FromString,
            seconds=_SLOW,
            what="delete the task",
        )

    def close(self) -> None:
        """End the connection."""
        self._channel.close()
