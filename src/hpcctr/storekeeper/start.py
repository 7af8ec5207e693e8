"""Starting a storekeeper: root's part, before and outside of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass

import msgspec

import hpcctr
from hpcctr.errand import Errand
from hpcctr.errors import PullRefused
from hpcctr.image.shelves import owner_of
from hpcctr.site import Site
from hpcctr.storekeeper.job import Job, Place

#: Variables of root's own that say how registries are reached from this node.
_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_CODE = "import sys; sys.path.insert(0, sys.argv.pop(1)); from hpcctr.storekeeper.descent import main; main()"


@dataclass(frozen=True, kw_only=True)
class Storekeeper:
    """A started storekeeper. Whoever has it closes ``peer`` and ``outcome`` and waits for the process."""

    process: subprocess.Popen[bytes]
    #: What the user's command talks to.
    peer: socket.socket
    #: A pipe: one line, :data:`hpcctr.errand.Said`, when it has ended by itself.
    outcome: int


def require_owner(store: str) -> tuple[int, int]:
    """(uid, gid) of the account that writes the store for users. Raises :class:`PullRefused` where that is root."""
    uid, gid = owner_of(store)
    if uid == 0:
        raise PullRefused(
            f"store {store} belongs to root, and nobody with root's rights pulls for users",
            hint=f"root pulls: hpcctr pull IMAGE; or the store gets an account: useradd --system hpcctr; "
            f"chown -R hpcctr: {store}",
        )
    return uid, gid


def start(errand: Errand, *, site: Site, uid: int, place: Place | None, gids: tuple[int, ...] = ()) -> Storekeeper:
    """Start one for ``uid``, of the groups ``gids``, in ``place``.

    Raises :class:`PullRefused`, :class:`StoreUnusable`.
    """
    owner_uid, owner_gid = require_owner(site.store)
    peer, its_peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    outcome, its_outcome = os.pipe()
    try:
        job = Job(
            errand=errand,
            site=site,
            uid=uid,
            gids=gids,
            owner_uid=owner_uid,
            owner_gid=owner_gid,
            place=place,
            peer=its_peer.fileno(),
            outcome=its_outcome,
        )
        place_of_code = os.path.dirname(os.path.dirname(hpcctr.__file__))
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _CODE, place_of_code],
            stdin=subprocess.PIPE,
            stdout=2,
            pass_fds=(its_peer.fileno(), its_outcome),
            cwd="/",
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", **_proxies()},
            start_new_session=True,
        )
    except BaseException:
        peer.close()
        os.close(outcome)
        raise
    finally:
        its_peer.close()
        os.close(its_outcome)
    assert process.stdin is not None  # noqa: S101
    try:
        process.stdin.write(msgspec.json.encode(job))
        process.stdin.close()
    except BrokenPipeError:
        pass  # it has ended: the outcome says so
    return Storekeeper(process=process, peer=peer, outcome=outcome)


def _proxies() -> dict[str, str]:
    return {name: os.environ[name] for name in _PROXIES if name in os.environ}  # noqa: TID251
