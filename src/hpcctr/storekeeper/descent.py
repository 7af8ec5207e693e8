"""The first moments of a storekeeper: from root to the store's owner, for good.

Until the last line of :func:`descend` nothing is imported that parses what comes from outside, and nothing of a user's
is opened. Every step is read back; one that fails ends the process, and its user is told.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import sys

import msgspec

from hpcctr.context import read_status
from hpcctr.errand import Failed
from hpcctr.errors import HpcctrError, StoreUnusable
from hpcctr.image import confinement
from hpcctr.storekeeper.job import Job, Place

_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_DUMPABLE = 4
_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Run the job on standard input."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    peer = socket.socket(fileno=job.peer)
    try:
        converter = descend(job)
    except (HpcctrError, OSError) as error:
        failed = error if isinstance(error, HpcctrError) else StoreUnusable(f"the storekeeper cannot start: {error}")
        line = msgspec.json.encode(Failed.of(failed)) + b"\n"
        with contextlib.suppress(OSError):
            peer.sendall(line)
        os.write(job.outcome, line)
        raise SystemExit(1) from None

    from hpcctr.storekeeper.work import work

    raise SystemExit(work(job, peer, converter))


def descend(job: Job) -> socket.socket | None:
    """Go to the caller's place, start the converter, and become the store's owner; the converter's socket.

    Raises :class:`StoreUnusable`, OSError.
    """
    if not (0 < job.owner_uid < 2**31 and 0 < job.owner_gid < 2**31):
        raise StoreUnusable(f"store {job.site.store} belongs to uid {job.owner_uid}, gid {job.owner_gid}")
    if job.place is not None:
        _go_to(job.place)
    os.umask(0o022)
    converter = confinement.spawn() if job.errand.task in ("pull", "import") else None
    os.setgroups([])
    os.setresgid(job.owner_gid, job.owner_gid, job.owner_gid)
    os.setresuid(job.owner_uid, job.owner_uid, job.owner_uid)
    for option, value in ((_PR_SET_NO_NEW_PRIVS, 1), (_PR_SET_DUMPABLE, 0)):
        if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0):
            raise OSError(ctypes.get_errno(), f"prctl {option}")
    _require_owner(job)
    return converter


def _go_to(place: Place) -> None:
    for file in place.cgroups:
        with open(file, "w", encoding="ascii") as procs:
            procs.write("0")  # the writer itself
    os.setpriority(os.PRIO_PROCESS, 0, place.niceness)
    # A cpuset of the cgroup may have less.
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, place.processors)


def _require_owner(job: Job) -> None:
    """Raise :class:`StoreUnusable` unless the kernel says that this is the store's owner and nothing else."""
    status = read_status(os.getpid())
    wanted = {
        "Uid": [str(job.owner_uid)] * 4,
        "Gid": [str(job.owner_gid)] * 4,
        "Groups": [],
        "NoNewPrivs": ["1"],
        **{name: ["0" * 16] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")},
    }
    for name, words in wanted.items():
        if status[name].split() != words:
            raise StoreUnusable(f"the storekeeper has {name} {status[name]}, not {' '.join(words)}")
