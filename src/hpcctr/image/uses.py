"""Which nodes use an image, and when one did last: what keeps an image that runs anywhere from being removed.

    IMAGE/uses/<node>+<engine>+<mount>    an engine has the image mounted, or is about to
    IMAGE/used                            empty; its time is when a node last began or ended to use the image

A mark is made before the image is mounted and removed when its last mount on the node has gone; nothing renews it
meanwhile, for nothing of hpcctr runs while programs run. A mark whose node has vanished counts for some days by the
file server's clock.

**The gate.** ``uses`` is made by whoever publishes the image, in the directory that is renamed into place, and by
nobody else. Whoever removes an image begins with rmdir(2) of ``uses``: the file server does it only when no mark is in
it, and from then on no mark can be made, for an engine makes no directory. The server does one of the two first,
rmdir or the creation of a mark, however many clients ask and whatever they remember: both are calls that change the
directory, which no NFS client answers from its caches (RFC 1813, RFC 8881; a name in a removed directory is ESTALE
or ENOENT). So of a removal and a node that begins to use the image exactly one fails, and nothing has to be looked at
twice: a mark that was made keeps the image, and an engine whose mark could not be made for want of the gate mounts
nothing. A call that a client sends twice because the first answer was lost finds its own work done: a gate that is
gone counts as closed, a mark that is there as made.

What is removed by path afterwards may be another image of the same digest, published in between. It has a gate of its
own, so who removes looks for one in what it took, and puts it back (:func:`hpcctr.image.publish.remove_image`).

An image that is removed while it is marked is moved aside as a whole, with its marks: ``STORE/leaving``. New launches
no longer find it, nodes keep the file by its handle, which does not change with its place, and
:mod:`hpcctr.image.gc` takes it when its gate closes.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from hpcctr.image.stale import looked_up_again

GATE = "uses"
STAMP = "used"
LEAVING = "leaving"
#: uname(2) gives at most 64 bytes; a plus sign is in no host's name (RFC 1123; some sites have underscores).
_NODE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_MARK = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]{0,63})\+([a-z]{1,16}(?:-[0-9]{1,10})?)\+([0-9a-f]{32})")
#: Of what is in a gate and is no mark: how it is called.
UNKNOWN = "?"


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A node that uses an image: ``engine`` is the engine's name on that node, ``mount`` that of the mount there."""

    node: str
    engine: str
    mount: str
    #: Seconds since the epoch by the file server's clock.
    since: float
    file: str

    @staticmethod
    def file_of(node: str, engine: str, mount: str) -> str:
        """The name of a mark's file."""
        return f"{node}+{engine}+{mount}"


def is_node_name(text: str) -> bool:
    """Whether marks can be made under that name."""
    return _NODE.fullmatch(text) is not None


def make_gate(directory: str) -> None:
    """Give an image that is about to be published its gate and stamp. Raises OSError."""
    os.mkdir(f"{directory}/{GATE}", 0o700)
    os.chmod(f"{directory}/{GATE}", 0o700)
    descriptor = os.open(f"{directory}/{STAMP}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    os.fchmod(descriptor, 0o644)
    os.close(descriptor)


def has_gate(directory: str) -> bool:
    """Whether the image is there to be used, as far as this node knows. Raises OSError."""
    try:
        looked_up_again(lambda: os.lstat(f"{directory}/{GATE}"))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def make_mark(directory: int, file: str) -> None:
    """Make a mark, below the descriptor of an image's directory, and stamp the image.

    Raises FileNotFoundError when the gate is closed: the image is being removed. Other OSErrors say that this node
    cannot write there.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    mark = os.open(f"{GATE}/{file}", flags, 0o600, dir_fd=directory)
    try:
        # One of an earlier life of this node may be there.
        os.utime(mark)
    finally:
        os.close(mark)
    _stamp(directory)


def remove_mark(directory: int, file: str) -> None:
    """Remove a mark, and stamp the image. Raises OSError unless it is gone."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{GATE}/{file}", dir_fd=directory)
    _stamp(directory)


def _stamp(directory: int) -> None:
    with contextlib.suppress(OSError):
        # UTIME_NOW: the file server's clock tells it (RFC 8881, SET_TO_SERVER_TIME4).
        os.utime(STAMP, dir_fd=directory, follow_symlinks=False)


def is_renewed(directory: str) -> bool:
    """Stamp an image that gets a name, so that no gc takes it for the next hour; False when its gate is closed.

    The stamp comes first: a gc that closes the gate reads the stamp afterwards (:func:`last_used_by_server`), so it
    sees it, or has closed the gate before this looks. Raises OSError.
    """
    try:
        descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    file = f".named-{os.getpid()}-{secrets.token_hex(8)}"
    try:
        _stamp(descriptor)
        make_mark(descriptor, file)
        remove_mark(descriptor, file)
    except FileNotFoundError:
        return False
    finally:
        os.close(descriptor)
    return True


def last_used(directory: str) -> float:
    """When a node last began or ended to use the image, or it got a name; seconds since the epoch, 0 when unknown."""
    try:
        return os.lstat(f"{directory}/{STAMP}").st_mtime
    except OSError:
        return 0.0


def last_used_by_server(directory: str) -> float:
    """The same, as the file server has it now: opening asks it (nfs(5), close-to-open)."""
    try:
        descriptor = os.open(f"{directory}/{STAMP}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return 0.0
    try:
        return os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)


def marks(directory: str) -> list[Mark]:
    """The marks of an image, as far as this node knows; none of one whose gate is closed. Raises OSError."""
    found = []
    try:
        names = looked_up_again(lambda: os.listdir(f"{directory}/{GATE}"))
    except (FileNotFoundError, NotADirectoryError):
        return []
    for name in sorted(names):
        parsed = _MARK.fullmatch(name)
        node, engine, mount = parsed.groups() if parsed else (UNKNOWN, UNKNOWN, UNKNOWN)
        with contextlib.suppress(FileNotFoundError):
            since = os.lstat(f"{directory}/{GATE}/{name}").st_mtime
            found.append(Mark(node=node, engine=engine, mount=mount, since=since, file=name))
    return found


def close_gate(directory: str) -> bool:
    """Close the gate of an image unless it is marked; False when it is. Raises OSError for anything else."""
    try:
        os.rmdir(f"{directory}/{GATE}")
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        # ENOTEMPTY or EEXIST (rmdir(2)); whatever else it is, what is in it decides.
        if marks(directory):
            return False
        raise
    return True


def open_gate_again(directory: str) -> None:
    """Undo :func:`close_gate` of who closed it. Raises OSError."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(f"{directory}/{GATE}", 0o700)


def drop_old_marks(directory: str, *, before: float) -> None:
    """Remove the marks that are older than a time by the file server's clock. Raises OSError.

    Each is renamed first, in the gate, which stays closed to removal meanwhile: one that its node has just made anew
    is put back.
    """
    for mark in marks(directory):
        if mark.since >= before:
            continue
        path, aside = f"{directory}/{GATE}/{mark.file}", f"{directory}/{GATE}/.old-{secrets.token_hex(8)}"
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            continue
        descriptor = os.open(aside, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            is_old = os.fstat(descriptor).st_mtime < before
        finally:
            os.close(descriptor)
        if is_old:
            os.unlink(aside)
        else:
            os.rename(aside, path)


def forget_node(directory: str, node: str) -> int:
    """Remove a dead node's marks of an image; how many there were. Raises OSError."""
    count = 0
    for mark in marks(directory):
        if mark.node == node:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{directory}/{GATE}/{mark.file}")
                count += 1
    return count


def image_directories(part: str) -> Iterator[str]:
    """The directories of all images of a store, or of a user's part of it, those that are leaving as well.

    Raises OSError.
    """
    for place in ("images", LEAVING):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for name in sorted(os.listdir(f"{part}/{place}")):
                if name.startswith("sha256-"):
                    yield f"{part}/{place}/{name}"


def parts_of(store: str) -> Iterator[str]:
    """The paths of a store and of every user's part of it. Raises OSError."""
    yield store
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for user in sorted(os.listdir(f"{store}/users")):
            if user.isascii() and user.isdigit():
                yield f"{store}/users/{user}"
