"""One node container: how it is built from a grant, checked, and taken down.

    <state>/containers/<container id>/   tmpfs of root's: upper and work of the overlay, the name of the image mount
    <state>/images/<name>/               the image mount (:mod:`hpcctr.engine.imagemount`)
    containerd, namespace hpcctr         a record with our labels; a task in state created

The container id is the key with a random part: what is left of an earlier container of the same key is never mistaken
for this one, by the engine or in the kernel's mount table.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Self

from hpcctr.containerd.client import Containerd, RootfsMount
from hpcctr.engine import bindings
from hpcctr.engine.accounts import generated_etc
from hpcctr.engine.bindings import NotAsAsked
from hpcctr.engine.furnishing import room
from hpcctr.engine.imagemount import ImageMounts
from hpcctr.engine.intact import require_intact
from hpcctr.engine.layers import Layers
from hpcctr.engine.members import is_roots, upper_in
from hpcctr.engine.mounts import MS_NODEV, MS_NOEXEC, MS_NOSUID, mount, unmount
from hpcctr.engine.remains import clear_remains
from hpcctr.engine.upper import UpperLayer
from hpcctr.errors import ContainerdFailed, ContainerNotFound, FeatureUnusable, HpcctrError, TargetImpossible
from hpcctr.host.edits import HostEdits
from hpcctr.mounttable import read_mounts
from hpcctr.policy.grant import Grant
from hpcctr.spec.build import build_spec
from hpcctr.spec.mounts import BindMount
from hpcctr.spec.process import ANCHOR

LABEL_KEY = "hpcctr.key"
LABEL_UID = "hpcctr.uid"
LABEL_DIGEST = "hpcctr.digest"
LABEL_OWNER = "hpcctr.owner"
#: Room of the upper layer: two files of the image's with at most 1 MiB, three of the host's, and mount points; more
#: where the site adds something. An inode takes the kernel about 2 KiB that no size option counts.
_UPPER_BYTES = 8 << 20
_UPPER_INODES = 2048
_IMAGE_NAME = "image"
#: linux/nsfs.h and linux/sched.h.
_NS_GET_NSTYPE = 0xB703
_CLONE_NEWNS = 0x20000
#: Seconds an init may take to die of SIGKILL.
_KILL_SECONDS = 10.0
#: Where a runtime mounts something into the container: what the spec says, and nodes below /dev.
_RUNTIME_TARGETS = ("proc", "dev")


@dataclass(frozen=True, kw_only=True, eq=False)
class NodeContainer:
    """A container callers may walk into. Each value has a descriptor of its own, which whoever has the value closes.

    Closed by hand: an exception in a reference cycle keeps the frames of all its callers, and whatever they name, until
    Python collects; meanwhile a forgotten namespace would keep the image's loop device attached.
    """

    container_id: str
    key: str
    uid: int
    image_digest: str
    #: Descriptor of the mount namespace.
    namespace: int
    #: Name of its image mount.
    image_mount: str
    #: Seconds since the epoch.
    created: float

    def again(self) -> Self:
        """The same with another descriptor. Raises OSError when the node is out of them."""
        return replace(self, namespace=os.dup(self.namespace))

    def close(self) -> None:
        """Let go of the namespace, once."""
        os.close(self.namespace)


@dataclass(frozen=True, kw_only=True)
class NodeBuilder:
    """Builds and takes down the node containers of one engine."""

    containerd: Containerd
    images: ImageMounts
    #: ``<state>/containers``.
    directory: str
    owner: str
    #: OCI runtime when it is not runc.
    binary_name: str = ""
    #: Read an image file as a whole before it is mounted.
    verify_at_mount: bool = False
    layers: Layers = field(default_factory=Layers)

    def build(self, grant: Grant, *, image: int, container_id: str) -> NodeContainer:
        """The container for a grant; ``image`` is a descriptor of its image's file. A failure leaves nothing behind.

        Raises :class:`ImageMountFailed`, :class:`TargetImpossible`, :class:`DeadlinePassed`, :class:`EngineBusy` and
        what :mod:`hpcctr.containerd.client` names; :class:`HpcctrError` when the node is out of something.
        """
        try:
            return self._build(grant, image, container_id)
        except OSError as error:
            raise HpcctrError(
                f"the node container cannot be built: {error.filename or 'node'}: {error.strerror}",
                hint="hpcctr doctor",
            ) from None

    def _build(self, grant: Grant, image: int, container_id: str) -> NodeContainer:
        digest = grant.image.record.digest
        self.layers.require_room(grant.caller.uid)
        etc = generated_etc(grant.caller, grant.image.record)
        with contextlib.ExitStack() as undo:
            image_mount = self.images.take(
                image,
                image_digest=digest,
                path=grant.image.path,
                require_intact=lambda: require_intact(image, grant.image.record, is_read=self.verify_at_mount),
            )
            undo.callback(self.images.release, image_mount)
            undo.callback(self.take_down_mount, container_id)
            binds = self._make_upper(container_id, image_mount, grant, etc)
            undo.callback(self._undo_in_containerd, container_id)
            self.containerd.create_container(
                container_id,
                labels={
                    LABEL_KEY: grant.key,
                    LABEL_UID: str(grant.caller.uid),
                    LABEL_DIGEST: digest,
                    LABEL_OWNER: self.owner,
                },
                spec=build_spec(grant, container_id=container_id, binds=binds),
                binary_name=self.binary_name,
            )
            pid = self.containerd.create_task(container_id, rootfs=[self._rootfs(container_id, image_mount)])
            namespace = self.open_namespace(container_id, pid, is_new=True)
            undo.pop_all()
        return NodeContainer(
            container_id=container_id,
            key=grant.key,
            uid=grant.caller.uid,
            image_digest=digest,
            namespace=namespace,
            image_mount=image_mount,
            created=time.time(),
        )

    def upper(self, container_id: str) -> str:
        """The upper layer's directory, as the kernel's mount table shows it too."""
        return upper_below(self.directory, container_id)

    def image_mount_of(self, container_id: str) -> str:
        """The name of the image mount an earlier engine built the container on. Raises OSError."""
        with open(os.path.join(self.directory, container_id, _IMAGE_NAME), encoding="ascii") as file:
            return file.read()

    def bindings_of(self, container_id: str) -> tuple[BindMount, ...]:
        """The host's files in a container, as they were written down when it was built. Raises :class:`NotAsAsked`."""
        try:
            return bindings.read(os.path.join(self.directory, container_id))
        except OSError:
            raise NotAsAsked("the record of the host's files in it cannot be read") from None

    def open_namespace(self, container_id: str, pid: int, *, is_new: bool = False) -> int:
        """The mount namespace of the init, once it is certain to be the one just built.

        Its mounts are those the record of this container says, each as restricted as it was to be; those of a new one
        are of the very files that were looked at.

        The init belongs to the user, who may kill it and have another process get its number, in a namespace that looks
        the same from within. So the namespace must be one only root can have made (it belongs to the engine's own user
        namespace), and its root the upper layer with this container's random name. Raises :class:`ContainerdFailed`,
        and :class:`FeatureUnusable` when a file of the host's was replaced while the container was built.
        """
        try:
            namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError:
            # As ptrace(2) would be: a Landlock domain or another security module is around this process.
            raise _unlike(container_id, "the kernel forbids this process to look at its init") from None
        except OSError:
            raise _unlike(container_id, "its init has ended") from None
        try:
            self._require_ours(container_id, pid, namespace, is_new=is_new)
        except OSError:
            os.close(namespace)
            raise _unlike(container_id, "its init has ended") from None
        except NotAsAsked as reason:
            os.close(namespace)
            raise _unlike(container_id, str(reason)) from None
        except BaseException:
            os.close(namespace)
            raise
        return namespace

    def _require_ours(self, container_id: str, pid: int, namespace: int, *, is_new: bool) -> None:
        if fcntl.ioctl(namespace, _NS_GET_NSTYPE) != _CLONE_NEWNS:
            raise NotAsAsked("not a mount namespace")
        if not is_roots(namespace):
            raise NotAsAsked("its namespace is not root's")
        identity = os.fstat(namespace)
        if os.path.samestat(identity, os.stat("/proc/self/ns/mnt")):
            raise NotAsAsked("its namespace is the node's own")
        entries = read_mounts(pid)
        if upper_in(entries) != self.upper(container_id):
            raise NotAsAsked("its root is not the overlay that was built for it")
        binds = self.bindings_of(container_id)
        root = next(entry for entry in entries if entry.target == "/" and entry.kind == "overlay")
        for entry in entries:
            if entry.target == "/" and "ro" not in entry.options:
                raise NotAsAsked("its root is writable")
            if any(tag.startswith(("shared:", "master:")) for tag in entry.propagation):
                raise NotAsAsked(f"{entry.target} exchanges mounts with other namespaces")
        bindings.require_as_asked(
            (entry for entry in entries if entry.target != "/" and entry.target.split("/")[1] not in _RUNTIME_TARGETS),
            binds,
        )
        if is_new:
            # Once: what is mounted stays what it is, and a file server may be silent when an engine starts.
            bindings.require_unchanged(pid, root, binds)
        # What was read is about the process that has this number now.
        if not os.path.samestat(identity, os.stat(f"/proc/{pid}/ns/mnt")):
            raise NotAsAsked("its init has been replaced")

    def take_down_in_containerd(self, container_id: str) -> None:
        """Remove task and record, and what they left; what is not there is fine.

        Raises :class:`HpcctrError` when some of it stays.
        """
        with contextlib.suppress(ContainerdFailed):
            self.containerd.kill_task(container_id)
            self.containerd.wait_for_task(container_id, seconds=_KILL_SECONDS)
        # The record goes last: without it containerd no longer finds the task.
        runtime = self.binary_name or "runc"
        try:
            self.containerd.delete_task(container_id)
        except ContainerNotFound:
            pass
        except ContainerdFailed:
            # A shim whose containerd was killed in the middle of a call may refuse for good. Without it containerd
            # gives the task up, at once or by the next attempt.
            clear_remains(container_id, runtime=runtime)
            with contextlib.suppress(ContainerNotFound):
                self.containerd.delete_task(container_id)
        with contextlib.suppress(ContainerNotFound):
            self.containerd.delete_container(container_id)
        clear_remains(container_id, runtime=runtime)

    def take_down_mount(self, container_id: str) -> None:
        """Remove the upper layer; what is not there is fine."""
        place = os.path.join(self.directory, container_id)
        unmount(place)
        self.layers.leave(container_id)
        with contextlib.suppress(OSError):
            os.rmdir(place)

    def _make_upper(
        self, container_id: str, image_mount: str, grant: Grant, etc: dict[str, bytes]
    ) -> tuple[BindMount, ...]:
        place = os.path.join(self.directory, container_id)
        os.makedirs(place, mode=0o700)
        mount("hpcctr", place, "tmpfs", flags=MS_NOSUID | MS_NODEV | MS_NOEXEC, data=_upper_data(grant.edits))
        self.layers.watch(container_id, uid=grant.caller.uid, directory=place)
        with open(os.path.join(place, _IMAGE_NAME), "x", encoding="ascii") as file:
            file.write(image_mount)
        os.mkdir(os.path.join(place, "work"), 0o700)
        os.mkdir(self.upper(container_id))
        # The root directory of the container, whatever the engine's umask is.
        os.chmod(self.upper(container_id), 0o755)  # noqa: S103
        with _directory(self.images.path(image_mount)) as lower, _directory(self.upper(container_id)) as upper:
            try:
                binds = UpperLayer(image=lower, upper=upper).make(
                    targets=grant.targets, etc=etc, anchor=ANCHOR, edits=grant.edits, image_name=grant.image.name
                )
                bindings.write(place, binds)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise _no_room(grant.edits) from None
        return binds

    def _rootfs(self, container_id: str, image_mount: str) -> RootfsMount:
        return RootfsMount(
            kind="overlay",
            source="overlay",
            options=(
                f"lowerdir={self.images.path(image_mount)}",
                f"upperdir={self.upper(container_id)}",
                f"workdir={os.path.join(self.directory, container_id, 'work')}",
                # Features by which attributes of the image's files could steer the overlay; a node may have them on.
                "redirect_dir=nofollow",
                "metacopy=off",
            ),
        )

    def _undo_in_containerd(self, container_id: str) -> None:
        # The first error is the one to tell; what stays behind now is found by its label later.
        with contextlib.suppress(HpcctrError):
            self.take_down_in_containerd(container_id)


def upper_below(directory: str, container_id: str) -> str:
    """The upper layer of a container below an engine's ``<state>/containers``."""
    return os.path.join(directory, container_id, "upper")


@contextlib.contextmanager
def _directory(path: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _upper_data(edits: HostEdits) -> str:
    size, inodes = room(edits)
    return f"size={_UPPER_BYTES + size},nr_inodes={_UPPER_INODES + inodes},mode=0700"


def _no_room(edits: HostEdits) -> HpcctrError:
    if edits.mounts or edits.links or edits.files:
        return FeatureUnusable(
            "the mount targets, and what features of the node add, need more room than a node container has",
            hint="fewer features, fewer or less deep targets (-v SRC:DST)",
        )
    return TargetImpossible(
        "the mount targets need more directories than a node container has room for",
        hint="use fewer or less deep targets: -v SRC:DST",
    )


def _unlike(container_id: str, reason: str) -> ContainerdFailed:
    return ContainerdFailed(
        f"node container {container_id} is not what was asked for: {reason}",
        hint="try again; then journalctl -u containerd",
    )
