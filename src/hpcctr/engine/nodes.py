"""The node containers of one engine: found or built, kept while they have members, removed after a linger.

Whatever the engine makes carries its name, the owner: an engine that starts finds what an earlier one of the same owner
left, takes over what is still in use, and removes the rest. Engines are told apart by a lock on their state directory,
which the kernel gives back when an engine dies in whatever way.
"""

from __future__ import annotations

import functools
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from hpcctr.containerd.client import Containerd
from hpcctr.context import Caller
from hpcctr.engine.adopt import clear_after_direct_engines, places_of_direct_engines, survivors
from hpcctr.engine.deadline import all_within
from hpcctr.engine.imagemount import ImageMounts, name_of_mount
from hpcctr.engine.log import log
from hpcctr.engine.members import Members, members_in_proc
from hpcctr.engine.neighbour import require_common_mounts
from hpcctr.engine.node import LABEL_OWNER, NodeBuilder, NodeContainer
from hpcctr.engine.pace import Pace
from hpcctr.engine.state import StateDirectory
from hpcctr.engine.uses import Uses
from hpcctr.engine.view import Place, View
from hpcctr.errors import DeadlinePassed, EngineBusy, EngineUnreachable, HpcctrError
from hpcctr.policy.grant import Grant
from hpcctr.site import Site

__all__ = ["NodeContainer", "NodeContainers"]

#: Seconds somebody waits for a container another caller is building; longer than all deadlines of building together.
_BUILD_SECONDS = 180.0
#: Seconds until what could not be removed is tried again.
_RETRY_SECONDS = 30.0
#: Seconds somebody waits for containers to be removed; one whose image is on a silent file server may never be.
_REMOVE_SECONDS = 100.0


@dataclass(kw_only=True)
class _Slot:
    """The place of one key: being built, then the container. Everything but ``ready`` is under the engine's lock."""

    key: str
    uid: int
    container_id: str
    #: Done when the building has ended, with the error if there was one.
    ready: Future[None] = field(default_factory=Future)
    #: Closed when it leaves the slot.
    container: NodeContainer | None = None
    #: time.monotonic() since when it has had no member; None while it has one.
    idle_since: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Leaving:
    """The names of a container on its way out."""

    container_id: str
    image_mount: str


class NodeContainers:
    """All node containers of an engine; every method may be called from any thread."""

    def __init__(self, *, site: Site, containerd: Containerd, state: str, owner: str) -> None:
        self._site = site
        self._state = StateDirectory(state)
        self._containerd = containerd
        self._owner = owner
        self._uses = Uses(site.store, engine=owner)
        self._images = ImageMounts(self._state.images, self._uses)
        self._builder = NodeBuilder(
            containerd=containerd,
            images=self._images,
            directory=self._state.containers,
            owner=owner,
            binary_name="" if site.runtime == "runc" else site.runtime,
            verify_at_mount=site.verify_at_mount,
        )
        self._members = Members()
        #: Every container a user may have is built without waiting.
        self._pace = Pace(burst=site.limits.containers_per_uid)
        self._lock = threading.Lock()
        self._slots: dict[str, _Slot] = {}
        #: Containers on their way out: in no slot any more, and not yet anybody else's to remove.
        self._leaving: set[str] = set()
        self._retry_at: float | None = None
        self._is_closing = False
        self._adopting = threading.Lock()
        self._watcher: threading.Thread | None = None

    def settle(self, site: Site) -> None:
        """From now on keep containers by the limits and the linger of ``site``; the rest of it is for a restart."""
        with self._lock:
            self._site = site
        self._members.ring()

    def adopt(self) -> None:
        """Take over or remove what an earlier engine of this owner left, and what dead direct engines left.

        Raises :class:`ContainerdUnavailable` and the like; then :meth:`get` tries again before it does anything.
        """
        if self._watcher is not None:
            return
        if not self._adopting.acquire(timeout=_BUILD_SECONDS):
            raise DeadlinePassed(
                "the engine has not come to know its containers in time", hint="journalctl -u containerd"
            )
        try:
            if self._watcher is None:
                require_common_mounts(self._site.containerd.socket)
                self._state.claim()
                clear_after_direct_engines(self._builder, self._state)
                self._take_over()
                self._sweep()
                self._tell_the_store()
                self._watcher = threading.Thread(target=self._watch, name="node-containers", daemon=True)
                self._watcher.start()
        finally:
            self._adopting.release()

    def get(self, grant: Grant, *, open_image: Callable[[], int]) -> NodeContainer:
        """The container for a grant, found, or built by exactly one of those who ask for it. The caller closes it.

        ``open_image`` gives a descriptor of the image file, checked by the store and closed here. Raises what building
        raises (:meth:`NodeBuilder.build`) and :class:`EngineBusy` when the caller has too many containers in use.
        """
        self.adopt()
        key = grant.key
        is_looked_after = False
        while True:
            with self._lock:
                if self._is_closing:
                    raise EngineUnreachable("the engine is stopping", hint="try again when it has started")
                slot = self._slots.get(key)
                idle = self._to_choose_from(grant.caller.uid) if slot is None and not is_looked_after else {}
                if slot is None and not idle:
                    evicted = self._make_room(grant.caller.uid)
                    slot = _Slot(key=key, uid=grant.caller.uid, container_id=f"{key}-{secrets.token_hex(4)}")
                    self._slots[key] = slot
                    break
                if slot is not None and slot.container is not None:
                    if slot.idle_since is not None:
                        slot.idle_since = time.monotonic()
                    return _again(slot.container)
                ready = slot.ready if slot is not None else None
            if ready is not None:
                # Then it is there, or gone again already.
                _wait_for_another(ready)
            else:
                self._keep_for_children(idle)
                is_looked_after = True
        if evicted is not None:
            self._remove_all([evicted], _REMOVE_SECONDS)
        return self._build(grant, slot, open_image)

    def view(self, pid: int, caller: Caller) -> View:
        """What process ``pid`` sees, if it is a program of ``caller``'s in one of these containers.

        Root's containers are each of an engine of their own: for root, all of those count. Raises
        :class:`ProcessOutOfReach`, and what :meth:`adopt` raises.
        """
        if caller.uid == 0:
            return View.of_process(pid, caller, places_of_direct_engines(self._containerd, self._state))
        self.adopt()
        with self._lock:
            places = {
                self._builder.upper(slot.container_id): Place.of_container(slot.container)
                for slot in self._slots.values()
                if slot.container is not None
            }
        return View.of_process(pid, caller, places)

    def join(self, container: NodeContainer | Place, caller: Caller) -> None:
        """Keep a container while ``caller`` lives. The caller's pidfd stays the caller's."""
        with self._lock:
            slot = self._slots.get(container.key)
            if slot is None or slot.container_id != container.container_id or self._is_closing:
                # Removed between get and join: who is inside keeps what it sees, and nothing else is left to keep.
                return
            try:
                self._members.add(container.container_id, pid=caller.pid, pidfd=os.dup(caller.pidfd))
            except OSError as error:
                raise EngineBusy(
                    f"the engine cannot watch another process: {error.strerror}", hint="try again"
                ) from None
            slot.idle_since = None

    def listing(self) -> list[tuple[NodeContainer, tuple[int, ...]]]:
        """The containers and the pids of their members."""
        with self._lock:
            containers = [slot.container for slot in self._slots.values() if slot.container is not None]
        return [(container, self._members.pids(container.container_id)) for container in containers]

    def remove_idle(self, *, seconds: float) -> tuple[list[str], list[str]]:
        """Remove the containers that have no member now, whatever is left of their linger: (ids of the removed, ids of
        those that were not removed after ``seconds`` and go on being removed).

        Raises what :meth:`adopt` raises.
        """
        self.adopt()
        with self._lock:
            idle = self._by_upper(self._is_without_members)
        self._keep_for_children(idle)
        with self._lock:
            slots = self._by_upper(self._is_without_members).items()
            # What has lost its last member since was not looked for in /proc.
            leaving = [self._leave(slot) for upper, slot in slots if idle.get(upper) is slot]
        done = self._remove_all(leaving, seconds)
        ids = [names.container_id for names in leaving]
        return (
            [name for name, is_done in zip(ids, done, strict=True) if is_done],
            [name for name, is_done in zip(ids, done, strict=True) if not is_done],
        )

    def close(self, *, remove: bool) -> None:
        """End the engine's work: remove all containers, or with ``remove`` False those without members."""
        with self._lock:
            self._is_closing = True
            leaving = [
                self._leave(slot)
                for slot in list(self._slots.values())
                if slot.container is not None and (remove or slot.idle_since is not None)
            ]
        if self._watcher is not None:
            self._members.ring()
            self._watcher.join()
            self._remove_all(leaving, _REMOVE_SECONDS)
        if remove:
            self._state.remove()
        self._members.close()
        self._state.release()

    # building

    def _build(self, grant: Grant, slot: _Slot, open_image: Callable[[], int]) -> NodeContainer:
        rate = self._site.limits.builds_per_minute / 60
        time.sleep(self._pace.delay(slot.uid, per_second=rate, now=time.monotonic()))
        try:
            image = open_image()
            try:
                container = self._builder.build(grant, image=image, container_id=slot.container_id)
            finally:
                os.close(image)
        except BaseException as error:
            with self._lock:
                del self._slots[grant.key]
            # Something of it may have been left in containerd.
            self._retry_later()
            self._members.ring()
            slot.ready.set_exception(error)
            raise
        try:
            return _again(container)
        finally:
            with self._lock:
                slot.container = container
                slot.idle_since = time.monotonic()
                ready = slot.ready
            ready.set_result(None)
            self._members.ring()

    def _to_choose_from(self, uid: int) -> dict[str, _Slot]:
        """Under the lock: when ``uid`` has all containers it may have, those of which one would have to go."""
        theirs = self._by_upper(lambda slot: slot.uid == uid)
        if len(theirs) < self._site.limits.containers_per_uid:
            return {}
        return {upper: slot for upper, slot in theirs.items() if slot.idle_since is not None}

    def _make_room(self, uid: int) -> _Leaving | None:
        """Under the lock: the idle container to remove so that ``uid`` may have one more; None when there is room."""
        limit = self._site.limits.containers_per_uid
        theirs = [slot for slot in self._slots.values() if slot.uid == uid]
        if len(theirs) < limit:
            return None
        idle = [slot for slot in theirs if slot.container is not None and slot.idle_since is not None]
        if not idle:
            raise EngineBusy(
                f"uid {uid} has {limit} node containers in use, the limit of this node",
                hint="use the same image and -v targets in all programs, or raise containers-per-uid in site.toml",
            )
        oldest = min(idle, key=lambda slot: slot.idle_since or 0.0)
        return self._leave(oldest)

    # watching and removing

    def _watch(self) -> None:
        while self._attend(self._members.wait(self._seconds_to_sleep())):
            pass

    def _attend(self, lost: set[str]) -> bool:
        """One round of the watcher; False at the end."""
        now = time.monotonic()
        with self._lock:
            for slot in self._slots.values():
                if slot.container_id in lost and not self._members.pids(slot.container_id):
                    slot.idle_since = now
        # /proc is read only when a container would go, so at most once in a linger.
        with self._lock:
            going = self._by_upper(lambda slot: self._is_expired(slot, now))
        self._keep_for_children(going)
        expired = []
        with self._lock:
            if self._is_closing:
                return False
            for slot in list(self._slots.values()):
                if self._is_expired(slot, now):
                    expired.append(self._leave(slot))
            is_retry = self._retry_at is not None and self._retry_at <= now
            if is_retry:
                self._retry_at = None
        self._remove_all(expired, _REMOVE_SECONDS)
        if is_retry:
            try:
                self._sweep()
            except (HpcctrError, OSError):
                self._retry_later()
        return True

    def _is_expired(self, slot: _Slot, now: float) -> bool:
        return slot.idle_since is not None and slot.idle_since + self._site.linger_seconds <= now

    def _is_without_members(self, slot: _Slot) -> bool:
        return slot.container is not None and self._members.is_empty(slot.container_id)

    def _by_upper(self, is_meant: Callable[[_Slot], bool]) -> dict[str, _Slot]:
        """Under the lock: slots by the upper layers of their containers."""
        return {self._builder.upper(slot.container_id): slot for slot in self._slots.values() if is_meant(slot)}

    def _keep_for_children(self, going: Mapping[str, _Slot]) -> None:
        """What is left of a program that came in and ended, a background process, is a member as well: hpcctr exec
        finds it in its container for as long as it runs.
        """
        if not going:
            return
        for upper, pid, pidfd in members_in_proc({upper: slot.uid for upper, slot in going.items()}):
            with self._lock:
                # Joined under the lock, for a slot that leaves takes no member any more.
                if self._slots.get(going[upper].key) is going[upper]:
                    self._members.add(going[upper].container_id, pid=pid, pidfd=pidfd)
                    going[upper].idle_since = None
                else:
                    os.close(pidfd)

    def _seconds_to_sleep(self) -> float | None:
        with self._lock:
            moments = [
                slot.idle_since + self._site.linger_seconds
                for slot in self._slots.values()
                if slot.idle_since is not None
            ]
            if self._retry_at is not None:
                moments.append(self._retry_at)
        return max(0.0, min(moments) - time.monotonic()) if moments else None

    def _leave(self, slot: _Slot) -> _Leaving:
        """Under the lock: nobody finds the container any more. Sessions that have found it have it for themselves."""
        assert slot.container is not None  # noqa: S101
        leaving = _Leaving(container_id=slot.container_id, image_mount=slot.container.image_mount)
        del self._slots[slot.key]
        self._leaving.add(slot.container_id)
        slot.container.close()
        slot.container = None
        return leaving

    def _remove_all(self, leaving: Sequence[_Leaving], seconds: float) -> list[bool]:
        """For each, whether it was removed in time."""
        if not leaving:
            return []
        return all_within(seconds, [functools.partial(self._remove, names) for names in leaving])

    def _remove(self, leaving: _Leaving) -> None:
        try:
            self._builder.take_down_in_containerd(leaving.container_id)
        except HpcctrError:
            self._retry_later()
        # The mounts go whether containerd answers or not: overlay and programs have a hold of their own on them.
        for take_down, name in (
            (self._builder.take_down_mount, leaving.container_id),
            (self._images.release, leaving.image_mount),
        ):
            try:
                take_down(name)
            except OSError as error:
                log(f"{name} cannot be unmounted: {error.strerror}")
                self._retry_later()
        with self._lock:
            self._leaving.discard(leaving.container_id)

    def _retry_later(self) -> None:
        with self._lock:
            if self._retry_at is None:
                self._retry_at = time.monotonic() + _RETRY_SECONDS

    def _take_over(self) -> None:
        with self._lock:
            known = {slot.container_id for slot in self._slots.values()}
        for container, members in survivors(self._builder, known=known):
            slot = _Slot(key=container.key, uid=container.uid, container_id=container.container_id, container=container)
            with self._lock:
                self._slots[container.key] = slot
            for pid, pidfd in members:
                self._members.add(container.container_id, pid=pid, pidfd=pidfd)

    def _tell_the_store(self) -> None:
        """Which images this node uses now: after a restart or a reboot the store knows otherwise."""
        with self._lock:
            mounts = {
                slot.container.image_mount: slot.container.image_digest
                for slot in self._slots.values()
                if slot.container is not None
            }
        self._uses.adopt(list(mounts))
        if self._state.sibling(self._owner) is None:  # direct engines come to nothing they have not made
            make_true = functools.partial(self._uses.make_true, mounts, name=name_of_mount, is_gone=self._state.is_gone)
            # A thread of its own: the file server may be silent.
            threading.Thread(target=make_true, name="uses", daemon=True).start()

    def _sweep(self) -> None:
        """Remove everything of this owner that is in no slot; what cannot be removed now is tried again later."""
        for entry in self._containerd.list_containers(label=LABEL_OWNER, value=self._owner):
            if not self._is_known(entry.container_id):
                try:
                    self._builder.take_down_in_containerd(entry.container_id)
                except HpcctrError:
                    self._retry_later()
        for name in os.listdir(self._state.containers):
            if not self._is_known(name):
                self._builder.take_down_mount(name)
        self._images.sweep()

    def _is_known(self, container_id: str) -> bool:
        with self._lock:
            return container_id in self._leaving or any(
                slot.container_id == container_id for slot in self._slots.values()
            )


def _again(container: NodeContainer) -> NodeContainer:
    try:
        return container.again()
    except OSError as error:
        raise EngineBusy(f"the engine cannot hold another namespace: {error.strerror}", hint="try again") from None


def _wait_for_another(ready: Future[None]) -> None:
    try:
        ready.result(_BUILD_SECONDS)
    except TimeoutError:
        raise DeadlinePassed(
            f"the node container was not built within {_BUILD_SECONDS:.0f} s", hint="journalctl -u hpcctr-engine"
        ) from None
    except HpcctrError as error:
        # Each thread raises an error of its own: a traceback grows on the object.
        raise type(error)(error.message, hint=error.hint) from None
