"""Real users of this machine, made for the tests and removed after them.

Several test sessions may run at once: whoever uses the users holds a shared lock, and only a session that is alone
makes or removes them. What an aborted session left is removed by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import platform
import pwd
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.polling import wait_until
from tests.support.processes import processes

LOCKS = Path("/var/lib/hpcctr-test")
SHARED_GROUPS = ("hpcctr-project", "hpcctr-render")
"""Extra groups of every test user: one group of files, and one as sites make them for devices."""


@dataclass(frozen=True, kw_only=True)
class User:
    """An account: `groups` are the supplementary gids a login gives, the primary one included."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: Path

    @classmethod
    def named(cls, name: str) -> User:
        entry = pwd.getpwnam(name)
        groups = tuple(os.getgrouplist(name, entry.pw_gid))
        return cls(name=name, uid=entry.pw_uid, gid=entry.pw_gid, groups=groups, home=Path(entry.pw_dir))


def _exists(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def _run(argv: Sequence[str]) -> None:
    subprocess.run(argv, check=True, capture_output=True)


def _uids() -> int:
    """The first number for accounts: another one in each release of Debian, for tests of one that runs in another's
    machine (`scripts/on-debian`) must not end the other's processes.
    """
    release = platform.freedesktop_os_release().get("VERSION_ID", "0")
    return 40000 + 100 * int(release.partition(".")[0])


def _make(name: str, groups: Sequence[str]) -> None:
    for group in groups:
        _run(["groupadd", "--force", group])
    options = ["--create-home", "--shell", "/bin/bash", "--groups", ",".join(groups), "-K", f"UID_MIN={_uids()}"]
    _run(["useradd", *options, name])
    Path(f"/home/{name}").chmod(0o700)


def _remove(name: str) -> None:
    uid = pwd.getpwnam(name).pw_uid

    def nobody_runs() -> bool:
        # The account exists for the tests only: whatever runs under it is ours to end.
        running = [process for process in processes() if process.uid == uid and not process.is_zombie]
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        return not running

    wait_until(nobody_runs, what=f"end of the processes of {name}")
    # No --remove: userdel reports a missing mail spool on standard error, and status 12 for it.
    _run(["userdel", "--force", name])
    _run(["rm", "--recursive", "--force", "--one-file-system", f"/home/{name}", f"/var/mail/{name}"])


def _remove_all(names: Sequence[str], groups: Sequence[str]) -> None:
    for name in names:
        if _exists(name):
            _remove(name)
    for group in groups:
        with contextlib.suppress(KeyError):
            # Another set of users may still be in it.
            if not grp.getgrnam(group).gr_mem:
                _run(["groupdel", group])


@contextlib.contextmanager
def users(*names: str, groups: Sequence[str] = SHARED_GROUPS) -> Iterator[tuple[User, ...]]:
    """Make the named users with a home under /home, and remove them at the end. Names begin with `hpcctr-`."""
    assert names and all(name.startswith("hpcctr-") for name in names)
    LOCKS.mkdir(mode=0o755, parents=True, exist_ok=True)
    lock = os.open(LOCKS / f"users.{'.'.join(names)}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_all(names, groups)
            for name in names:
                _make(name, groups)
        # From exclusive to shared, or waiting until the session that makes them is ready.
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield tuple(User.named(name) for name in names)
    finally:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_all(names, groups)
        os.close(lock)
