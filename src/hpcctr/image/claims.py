"""Claims: of all processes that want the same image, on however many nodes, one does the work and the others wait.

    STORE/claims/<digest>/<number>     who works: :class:`Worker`, written once
    STORE/claims/<digest>/<token>      that it lives and how far it is: :class:`Beat`, renamed into place

A claim is taken by link(2), which is atomic on every shared filesystem, NFS included; there is no flock. A server's
answer to link may be lost on the way, so the link count tells whether it was made (open(2), under O_EXCL). The holder
is the worker of the highest number. A claim is taken over by linking the next number: nothing that somebody else may
hold is ever removed or renamed, so nobody breaks the claim of a third by mistake.

No clock is compared with another one. A claim is dead when its beat has not changed for :data:`STALE_AFTER` seconds of
the watcher's own monotonic clock. A worker that was only suspended finds the higher number when it goes on, and gives
up; had it just published, nothing is lost: publishing the same image twice leaves one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec

from hpcctr.errors import HpcctrError, of_slug
from hpcctr.image.imagefile import store_unusable

#: Seconds between two beats. Each is one small file and one rename on the shared filesystem, for each image that is
#: being brought, not for each process that waits.
HEARTBEAT = 2.0
#: Seconds without a new beat after which another one takes over: ten beats, so that a slow file server, a client's
#: cached attributes (nfs(5): acregmin is 3 s) or a busy node is not taken for a dead one.
STALE_AFTER = 20.0
#: Seconds between two looks of a process that waits, at first and at most.
_LOOK_FIRST = 0.1
_LOOK_LAST = 1.0
#: A look that took longer says nothing about the worker: the filesystem or the watcher itself was standing still.
_LOOK_COUNTS_AT_MOST = 2.0
_FILE_SIZE_MAX = 65536
#: Failures of the same work in a row after which those who wait stop trying it themselves.
_FAILURES_MAX = 3


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    """Who works. ``since`` is the time on the worker's own clock, for people only."""

    host: str
    pid: int
    since: str
    token: str
    #: Workers before this one that failed at the same work.
    failures: int = 0

    def __str__(self) -> str:
        return f"{self.host} pid {self.pid}"


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """An :class:`hpcctr.errors.HpcctrError` as a beat holds it."""

    slug: str
    message: str
    hint: str


class Beat(msgspec.Struct, frozen=True, kw_only=True):
    """A sign of life. ``elapsed`` is in seconds, by the worker's monotonic clock."""

    number: int
    elapsed: float = 0.0
    stage: str = ""
    done: int = 0
    total: int = 0
    released: bool = False
    failure: Failure | None = None


class ClaimLost(Exception):
    """Somebody took the claim over while this worker stood still."""


@dataclass(kw_only=True)
class Claim:
    """A claim this process holds; made by :func:`take`."""

    directory: str
    number: int
    worker: Worker
    _stop: threading.Event = field(default_factory=threading.Event)
    _lost: threading.Event = field(default_factory=threading.Event)
    _begun: float = field(default_factory=time.monotonic)
    _beats: int = 0
    _state: tuple[str, int, int] = ("", 0, 0)
    _thread: threading.Thread | None = None

    def tell(self, stage: str, done: int, total: int) -> None:
        """Say how far the work is; those who wait see it with the next beat. Raises :class:`ClaimLost`."""
        self._state = (stage, done, total)
        if self._lost.is_set():
            raise ClaimLost

    def require_held(self) -> None:
        """Raise :class:`ClaimLost` when the claim is somebody else's by now; asks the filesystem."""
        if self._lost.is_set() or not self._is_held():
            raise ClaimLost

    def begin(self) -> None:
        """Beat from now on, by a thread of its own."""
        self._beat()
        self._thread = threading.Thread(target=self._live, name="claim", daemon=True)
        self._thread.start()

    def end(self, error: BaseException | None = None) -> None:
        """Stop beating and let the next one in at once. ``error`` is why the work was not done."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(HEARTBEAT)
        if self._lost.is_set() or not self._is_held():
            with contextlib.suppress(OSError):
                os.unlink(f"{self.directory}/{self.worker.token}")
        elif error is None:
            # The work is done, and whoever claims it anew sees that: the claim can go.
            with contextlib.suppress(OSError):
                for name in os.listdir(self.directory):
                    os.unlink(f"{self.directory}/{name}")
                os.rmdir(self.directory)
        else:
            failure = None
            if isinstance(error, HpcctrError):
                failure = Failure(slug=error.slug, message=error.message, hint=error.hint)
            self._beat(released=True, failure=failure)

    def _live(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            if not self._is_held():
                self._lost.set()
                return
            self._beat()

    def _is_held(self) -> bool:
        """False only when that is certain: a filesystem that does not answer has given the claim to nobody."""
        try:
            numbers = _numbers(self.directory)
            if not numbers or int(numbers[-1]) != self.number:
                return False
            worker = _worker(f"{self.directory}/{numbers[-1]}")
        except OSError as error:
            return not _is_gone(error)
        return worker is not None and worker.token == self.worker.token

    def _beat(self, *, released: bool = False, failure: Failure | None = None) -> None:
        self._beats += 1
        stage, done, total = self._state
        beat = Beat(
            number=self._beats,
            elapsed=round(time.monotonic() - self._begun, 1),
            stage=stage,
            done=done,
            total=total,
            released=released,
            failure=failure,
        )
        path = f"{self.directory}/{self.worker.token}"
        temporary = f"{path}.new"
        try:
            _write(temporary, msgspec.json.encode(beat))
            os.rename(temporary, path)
        except OSError:
            # A full filesystem takes no new file, but it still takes a new time.
            with contextlib.suppress(OSError):
                os.utime(path)
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@dataclass(kw_only=True)
class Watch:
    """What a process that waits has seen of a claim so far."""

    directory: str
    worker: Worker | None = None
    beat: Beat | None = None
    _sign: tuple[object, ...] = ()
    _still: float = 0.0
    _looked: float = 0.0

    def look(self) -> bool:
        """Look once; whether the claim is free: never taken, released, or its holder dead.

        Raises what the worker failed with, when the same would happen to anybody who tries again."""
        moment = time.monotonic()
        passed = min(moment - self._looked, _LOOK_COUNTS_AT_MOST) if self._looked else 0.0
        self._looked = moment
        try:
            numbers = _numbers(self.directory)
            worker = _worker(f"{self.directory}/{numbers[-1]}") if numbers else None
        except OSError as error:
            if _is_gone(error):
                return True
            raise store_unusable(self.directory, error) from None
        if not numbers:
            return True
        earlier, self.worker = self.worker, worker
        beat, sign = _beat_of(self.directory, worker)
        self.beat = beat
        self._still = self._still + passed if sign == self._sign else 0.0
        self._sign = sign
        if beat is not None and beat.released:
            if beat.failure is not None and earlier is not None and worker == earlier:
                self._raise_as_worker(beat.failure)
            return True
        return self._still >= STALE_AFTER

    def _raise_as_worker(self, failure: Failure) -> None:
        """The worker that was waited for failed. What is about the image or the store is true for everybody; a
        conversion may have failed for its node's sake, so another node tries it before all give up."""
        assert self.worker is not None  # noqa: S101 - only called for a worker
        if failure.slug == "conversion" and self.worker.failures + 1 < _FAILURES_MAX:
            return
        raise of_slug(failure.slug)(f"{failure.message} (tried by {self.worker})", hint=failure.hint)


def directory_of(store_path: str, digest: str) -> str:
    """Where the claims on an image are."""
    return f"{store_path}/claims/{digest.replace(':', '-')}"


def take(directory: str, *, since: str, watch: Watch | None = None) -> Claim | None:
    """The claim, if it is free; None when somebody else has it. Raises :class:`StoreUnusable`.

    With ``watch``, also one whose holder is dead: exactly the one that was watched, not one that came after it."""
    for _ in range(3):
        try:
            os.mkdir(directory, 0o755)
        except FileExistsError:
            pass
        except OSError as error:
            raise store_unusable(directory, error) from None
        try:
            return _link_next(directory, since, watch)
        except OSError as error:
            # Gone: the work was done, and the directory removed, between the two steps.
            if not _is_gone(error):
                raise store_unusable(directory, error) from None
    return None


@contextlib.contextmanager
def held(claim: Claim) -> Iterator[Claim]:
    """While this lasts the claim is kept alive; released at once however it ends."""
    claim.begin()
    try:
        yield claim
    except BaseException as error:
        claim.end(error)
        raise
    claim.end()


def once(
    directory: str,
    *,
    is_done: Callable[[bool], bool],
    work: Callable[[Claim], None],
    waiting: Callable[[Watch], None],
    now: Callable[[], str],
) -> bool:
    """Let ``work`` be done by one process of all that call this, and return when ``is_done``.

    True when it was this one. ``is_done`` is asked with True when it must not trust what this node remembers of the
    filesystem. ``waiting`` is told again and again what is seen of the one who works; ``now`` gives
    the time for people. ``work`` finishes nothing unless :meth:`Claim.require_held` agrees; when the claim is lost, the
    work of the one who has it now is waited for. Raises what ``work`` raises, here or, where that holds for everybody,
    there.
    """
    watch, pauses = Watch(directory=directory), _pauses()
    while not is_done(False):
        claim = take(directory, since=now(), watch=watch) if watch.look() else None
        if claim is not None:
            try:
                with held(claim):
                    if is_done(True):
                        return False
                    work(claim)
                    return True
            except ClaimLost:
                watch = Watch(directory=directory)
                continue
        if watch.worker is not None:
            waiting(watch)
        time.sleep(next(pauses))
    return False


def _pauses() -> Iterator[float]:
    """Seconds to sleep between looks: soon at first, then once a second, not all watchers at the same moment."""
    pause = _LOOK_FIRST
    while True:
        yield pause * (0.75 + secrets.randbelow(1000) / 2000)
        pause = min(pause * 1.5, _LOOK_LAST)


def _link_next(directory: str, since: str, watch: Watch | None) -> Claim | None:
    numbers = _numbers(directory)
    last = int(numbers[-1]) if numbers else 0
    failures = 0
    if numbers:
        worker = _worker(f"{directory}/{numbers[-1]}")
        beat, _ = _beat_of(directory, worker)
        is_released = beat is not None and beat.released
        is_watched_and_dead = watch is not None and watch.worker == worker and watch._still >= STALE_AFTER  # noqa: SLF001
        if not is_released and not is_watched_and_dead:
            return None
        if worker is not None and beat is not None and beat.failure is not None:
            failures = worker.failures + 1
    mine = Worker(host=os.uname().nodename, pid=os.getpid(), since=since, token=secrets.token_hex(8), failures=failures)
    number = last + 1
    own = f"{directory}/{mine.token}.claim"
    _write(own, msgspec.json.encode(mine))
    try:
        with contextlib.suppress(FileExistsError):
            os.link(own, f"{directory}/{number:09}")
        if os.stat(own).st_nlink != 2:
            return None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(own)
    if _numbers(directory)[-1:] != [f"{number:09}"]:
        # What was seen as the last one had been removed, and a newer one made, before the link.
        return None
    _drop_earlier(directory, number)
    return Claim(directory=directory, number=number, worker=mine)


def _drop_earlier(directory: str, number: int) -> None:
    """Remove claims below ``number``, with their beats. Only its holder does that."""
    for name in _numbers(directory):
        if int(name) < number:
            with contextlib.suppress(OSError):
                worker = _worker(f"{directory}/{name}")
                if worker is not None:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(f"{directory}/{worker.token}")
                os.unlink(f"{directory}/{name}")


def _numbers(directory: str) -> list[str]:
    return sorted(name for name in os.listdir(directory) if len(name) == 9 and name.isascii() and name.isdigit())


def _worker(path: str) -> Worker | None:
    """The worker a claim names; None for a claim that is gone or cannot be read, which nobody beats for."""
    try:
        return msgspec.json.decode(_read(path), type=Worker)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    except OSError as error:
        if _is_gone(error):
            return None
        raise


def _is_gone(error: OSError) -> bool:
    """NFS and GlusterFS say ESTALE for what another node has removed."""
    return error.errno in (errno.ENOENT, errno.ESTALE)


def _beat_of(directory: str, worker: Worker | None) -> tuple[Beat | None, tuple[object, ...]]:
    """The last beat, and what changes with every one."""
    if worker is None or "/" in worker.token:
        return None, ()
    path = f"{directory}/{worker.token}"
    try:
        status = os.stat(path)
        raw = _read(path)
        beat = msgspec.json.decode(raw, type=Beat)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None, (worker.token,)
    return beat, (worker.token, status.st_ino, status.st_mtime_ns, raw)


def _read(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        return file.read(_FILE_SIZE_MAX)


def _write(path: str, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    with open(descriptor, "wb") as file:
        file.write(content)
