"""Errands: what users have the storekeeper do. The engine says whether, starts it, introduces the two, and sees it end.

However many launches of a user's on this node want the same image, one storekeeper brings it: the others wait for its
outcome here. Between nodes and users, storekeepers agree in the store itself (:mod:`hpcctr.image.claims`): what one
user's job can slow down, another's never waits for here.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future

import msgspec

from hpcctr.context import Caller
from hpcctr.errand import Ended, Errand, Failed, Pulled
from hpcctr.errors import (
    CallerRefused,
    EngineBusy,
    HpcctrError,
    ImageNotYours,
    PullRefused,
    ReferenceWrong,
    StoreUnusable,
)
from hpcctr.image.reference import ImageRef
from hpcctr.image.shelves import is_shared_name
from hpcctr.policy import account
from hpcctr.policy.decide import allowing
from hpcctr.policy.load import load
from hpcctr.proc import read_lines
from hpcctr.site import Site
from hpcctr.storekeeper.job import Place
from hpcctr.storekeeper.start import Storekeeper, require_owner, start
from hpcctr.wire import Frame

#: Replies to an errand: a socket to the storekeeper comes with the first; the second says that another launch of the
#: same user brings the image, and the third that it has.
KEEPER, WAITING, DONE = "storekeeper", "waiting", "done"
#: Seconds a storekeeper gets to clean up once nobody wants its work, and between two looks at who waits.
_END_SECONDS = 10.0
_LOOK_SECONDS = 0.25
#: Bytes of an outcome: two texts of at most 4000 characters, escaped.
_OUTCOME_MAX = 65536

#: A job's cgroup, as Slurm's plug-ins name it in both versions of cgroups.
_JOB = re.compile(r"/job_[0-9]+(/|$)")

_Outcome = Pulled | Ended | Failed


class Errands:
    """The storekeepers of one engine."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._lock = threading.Lock()
        self._running: Counter[int] = Counter()
        self._pulls: dict[tuple[int, str, str, str], Future[_Outcome | None]] = {}

    def settle(self, site: Site) -> None:
        """From now on go by ``site``."""
        self._site = site

    def may(self, errand: Errand, caller: Caller) -> str:
        """The label of the rule that allows the errand. Raises :class:`PolicyDenied`, :class:`ReferenceWrong`."""
        if errand.task in ("pull", "import"):
            require_owner(self._site.store)
        rules = load(self._site.policy_directory)
        names = account.names_for(rules, caller)
        if errand.task == "pull":
            ref = ImageRef.parse(errand.image)
            if ref.is_file or errand.name:
                raise StoreUnusable("the site's store takes images from registries, under their own names")
            self._require_a_place_to_pull(ref, caller)
            return allowing(rules, user_names=names, image_name=str(ref.name_in_store()))
        if errand.task == "import":
            named = ImageRef.parse(errand.name)
            if named.is_file:
                raise ReferenceWrong("an image is named by repository and tag", hint="for instance local/app:1.0")
            return allowing(rules, user_names=names, image_name=f"private/{named.name_in_store()}")
        if errand.task in ("share", "unshare"):
            require_owner(self._site.store)
        if is_shared_name(errand.image) and errand.task != "inspect":
            raise ImageNotYours(f"{errand.image}: its owner's to change, share and remove", hint="hpcctr images --mine")
        return "their own images"

    def _require_a_place_to_pull(self, ref: ImageRef, caller: Caller) -> None:
        """Raise :class:`PullRefused` where the site has users pull elsewhere."""
        where = self._site.pull
        if where == "nowhere":
            raise PullRefused(
                f"{ref.familiar}: this site's images are brought by its administrators", hint="ask them; hpcctr images"
            )
        if where == "outside-jobs" and _is_in_job(caller.pid):
            raise PullRefused(
                f"{ref.familiar}: this site does not pull in jobs", hint=f"on a login node: hpcctr pull {ref.familiar}"
            )

    def serve(self, errand: Errand, caller: Caller, peer: socket.socket) -> None:
        """See an allowed errand to its end. Raises :class:`HpcctrError` to be told, OSError when the caller has
        gone.
        """
        if errand.task != "pull":
            with self._counted(caller.uid):
                self._have_done(errand, caller, peer)
            return
        key = (caller.uid, errand.image, errand.platform, errand.verify)
        peer_is_told = False
        while True:
            with self._lock:
                earlier = self._pulls.get(key)
                mine = self._pulls.setdefault(key, Future())
            if earlier is None:
                self._bring(key, mine, errand, caller, peer)
                return
            if not peer_is_told:
                peer.sendall(Frame(WAITING).pack())
                peer_is_told = True
            outcome = _wait(earlier, peer)
            if isinstance(outcome, Failed):
                raise outcome.error()
            if outcome is not None:
                peer.sendall(Frame(DONE).pack())
                return

    def _bring(
        self,
        key: tuple[int, str, str, str],
        mine: Future[_Outcome | None],
        errand: Errand,
        caller: Caller,
        peer: socket.socket,
    ) -> None:
        outcome = None
        try:
            with self._counted(caller.uid):
                outcome = self._have_done(errand, caller, peer)
        except HpcctrError as error:
            outcome = Failed.of(error)
            raise
        finally:
            with self._lock:
                del self._pulls[key]
            # None: its user went away before the end, and whoever waits brings the image instead.
            mine.set_result(outcome)

    def _have_done(self, errand: Errand, caller: Caller, peer: socket.socket) -> _Outcome | None:
        keeper = start(
            errand,
            site=self._site,
            uid=caller.uid,
            gids=(caller.gid, *caller.groups),
            place=Place.of_process(caller.pid),
        )
        try:
            caller.require_alive()
            with keeper.peer:
                socket.send_fds(peer, [Frame(KEEPER).pack()], [keeper.peer.fileno()])
            return _outcome(keeper, peer)
        finally:
            keeper.peer.close()
            os.close(keeper.outcome)
            _end(keeper.process)

    @contextlib.contextmanager
    def _counted(self, uid: int) -> Iterator[None]:
        limits = self._site.limits
        with self._lock:
            if self._running[uid] >= limits.errands_per_uid or self._running.total() >= limits.errands:
                raise EngineBusy(
                    f"{self._running.total()} pulls and imports are under way on this node, {self._running[uid]} yours",
                    hint="try again; the limits are [limits] of the site file",
                )
            self._running[uid] += 1
        try:
            yield
        finally:
            with self._lock:
                self._running[uid] -= 1
                if not self._running[uid]:
                    del self._running[uid]


def _is_in_job(pid: int) -> bool:
    """Whether a process is in a job of Slurm's, by its cgroups. Raises :class:`CallerRefused`."""
    try:
        return any(_JOB.search(line) for line in read_lines(f"/proc/{pid}/cgroup"))
    except OSError:
        raise CallerRefused(f"pid {pid} has ended") from None


def _outcome(keeper: Storekeeper, peer: socket.socket) -> _Outcome | None:
    """What a storekeeper came to; None when its user has gone, or it ended without a word."""
    poll = select.poll()
    poll.register(keeper.outcome, select.POLLIN)
    poll.register(peer, select.POLLRDHUP)
    ready = dict(poll.poll())
    if keeper.outcome not in ready:
        return None
    untrusted = os.read(keeper.outcome, _OUTCOME_MAX)
    try:
        outcome: _Outcome = msgspec.json.decode(untrusted, type=_Outcome)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return outcome


def _wait(pull: Future[_Outcome | None], peer: socket.socket) -> _Outcome | None:
    """The outcome of another launch's pull. Raises ConnectionAbortedError when this one's user has gone."""
    poll = select.poll()
    poll.register(peer, select.POLLRDHUP)
    while True:
        try:
            return pull.result(_LOOK_SECONDS)
        except TimeoutError:
            if poll.poll(0):
                raise ConnectionAbortedError from None


def _end(process: subprocess.Popen[bytes]) -> None:
    """It ends by itself after its outcome; else in good order, or by force."""
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        if number is not None:
            process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS if number is not None else 1.0)
            return
