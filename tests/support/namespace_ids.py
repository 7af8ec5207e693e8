"""On which processor a mount namespace must be made so that all later ones have a higher id.

The kernel lets a mount namespace be bind-mounted only in one with a lower id (mnt_ns_loop in fs/namespace.c), and since
Linux 6.18 each processor hands ids out of a batch of its own (gen_cookie): a later namespace may have a lower one.
Whoever binds namespaces into a Host, as Slurm's job_container/tmpfs does, needs a Host with the lowest id.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator

# NS_GET_MNTNS_ID of linux/nsfs.h; kernels without it count namespaces in order, and any processor will do.
_PRINT_ID = """
import fcntl, os
answer = bytearray(8)
try:
    fcntl.ioctl(os.open("/proc/self/ns/mnt", os.O_RDONLY), 0x8008B705, answer)
except OSError:
    pass
print(int.from_bytes(answer, "little"))
"""


def _id_made_on(cpu: int) -> int:
    argv = ["unshare", "--mount", "/usr/bin/python3", "-IS", "-c", _PRINT_ID]
    with _on(cpu):
        return int(subprocess.run(argv, capture_output=True, check=True).stdout)


@contextlib.contextmanager
def _on(cpu: int) -> Iterator[None]:
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, everywhere)


@contextlib.contextmanager
def lowest() -> Iterator[None]:
    """Within the block a mount namespace made by a child process gets the lowest id there can be."""
    with _on(min(os.sched_getaffinity(0), key=_id_made_on)):
        yield
