"""The view of a running process: what ``hpcctr exec`` lets another process of the same user see.

A user's right to it is the one they have without hpcctr: the rules are those of ptrace(2) for looking at a process, put
to the kernel under a pidfd, so that a number that changes hands in between is noticed. The namespace must be one that
only root can have made, on a container of this engine's: a user can make a mount table that says anything.
"""

from __future__ import annotations

import os
import select
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from hpcctr.context import INITIAL_USER_NAMESPACE, Caller, read_status
from hpcctr.engine.members import is_anchor, is_roots, root_upper
from hpcctr.engine.node import NodeContainer
from hpcctr.errors import ProcessOutOfReach

_CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapAmb")


@dataclass(frozen=True, kw_only=True)
class Place:
    """A container somebody may be in, and whose it is."""

    container_id: str
    key: str
    uid: int
    image_digest: str

    @classmethod
    def of_container(cls, container: NodeContainer) -> Self:
        return cls(
            container_id=container.container_id,
            key=container.key,
            uid=container.uid,
            image_digest=container.image_digest,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """The mount namespace of one process. A context manager: both descriptors close at its end."""

    pid: int
    pidfd: int
    namespace: int
    place: Place

    @classmethod
    def of_process(cls, pid: int, caller: Caller, places: Mapping[str, Place]) -> Self:
        """The view of process ``pid``, if ``caller`` may have it.

        ``places`` are the engine's containers by their upper layers. Raises :class:`ProcessOutOfReach`.
        """
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            raise _not_theirs(pid) from None
        try:
            namespace = _open_namespace(pid)
            try:
                view = cls(pid=pid, pidfd=pidfd, namespace=namespace, place=_place_of(pid, namespace, caller, places))
                view.require_unchanged(caller)
            except BaseException:
                os.close(namespace)
                raise
        except BaseException:
            os.close(pidfd)
            raise
        return view

    def require_unchanged(self, caller: Caller) -> None:
        """Raise :class:`ProcessOutOfReach` unless the process lives, is still ``caller``'s to look at, and in the same
        namespace.
        """
        _require_theirs(self.pid, caller)
        try:
            now = os.stat(f"/proc/{self.pid}/ns/mnt")
        except OSError:
            raise _not_theirs(self.pid) from None
        if not os.path.samestat(now, os.fstat(self.namespace)):
            raise _unfit(self.pid, "it has gone to another mount namespace")
        # Last: while the process lives its number is nobody else's, so all that was read is about it.
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        if poll.poll(0):
            raise _not_theirs(self.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self.namespace)
        os.close(self.pidfd)


def _open_namespace(pid: int) -> int:
    try:
        return os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        raise _not_theirs(pid) from None


def _place_of(pid: int, namespace: int, caller: Caller, places: Mapping[str, Place]) -> Place:
    """Which container the process is in. Its mount table is read only when no user can have written it."""
    _require_theirs(pid, caller)
    try:
        if not is_roots(namespace) or os.path.samestat(os.fstat(namespace), os.stat("/proc/self/ns/mnt")):
            raise _unfit(pid, "it is in no container of hpcctr")
        upper = root_upper(pid)
        if is_anchor(pid):
            raise _unfit(pid, "it only holds a container in place and runs nothing")
    except (OSError, ValueError):
        raise _not_theirs(pid) from None
    place = places.get(upper or "")
    if place is None or place.uid != caller.uid:
        raise _unfit(pid, "it is in no container the engine of this node keeps")
    return place


def _require_theirs(pid: int, caller: Caller) -> None:
    """The rules by which the kernel lets a user look into a process (ptrace(2), "Ptrace access mode checking").

    Stricter where a program in a container is plainer than processes are in general: no capability of any kind, and
    no_new_privs, both of which enter sees to.
    """
    try:
        status = read_status(pid)
        # Files here are root's instead of the user's while the process is not dumpable (proc(5)).
        dumpable_by = os.stat(f"/proc/{pid}/maps").st_uid
        user_namespace = os.stat(f"/proc/{pid}/ns/user").st_ino
    except OSError:
        raise _not_theirs(pid) from None
    if status["Uid"].split() != [str(caller.uid)] * 4 or status["State"][:1] in "ZX":
        raise _not_theirs(pid)
    if status["Gid"].split() != [str(caller.gid)] * 4:
        raise _unfit(
            pid, f"its group ids are {status['Gid']}, yours is {caller.gid}", hint="newgrp to the group it has"
        )
    if user_namespace != INITIAL_USER_NAMESPACE:
        raise _unfit(pid, "it is in a user namespace of its own", hint="hpcctr exec to the process that made it")
    if any(int(status[name], 16) for name in _CAPABILITIES) or status.get("NoNewPrivs") != "1":
        raise _unfit(pid, "it is in no container of hpcctr, or just going in")
    if dumpable_by != caller.uid:
        raise _unfit(pid, "it does not let you look into it: it is not dumpable, see prctl(2)")


def _not_theirs(pid: int) -> ProcessOutOfReach:
    """One text for all that is somebody else's or nobody's: a user who may not see a process does not learn of it."""
    return ProcessOutOfReach(f"pid {pid} is not a living process of yours", hint="hpcctr ps")


def _unfit(pid: int, reason: str, *, hint: str = "hpcctr ps") -> ProcessOutOfReach:
    return ProcessOutOfReach(f"pid {pid} cannot be joined: {reason}", hint=hint)
