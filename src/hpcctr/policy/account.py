"""The names rules may know a caller by: uid, login name, groups.

They come from the node's name service (NSS), which may be a network away and gets a deadline.
"""

from __future__ import annotations

import contextlib
import grp
import pwd
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from hpcctr.context import Caller
from hpcctr.errors import DeadlinePassed
from hpcctr.policy.rules import Rule

#: Seconds for the look-ups of one launch.
_LOOKUP_SECONDS = 20.0
#: Look-ups at once. Those that hang count, so they cannot become many.
_look_ups = threading.BoundedSemaphore(32)

Found = TypeVar("Found")


def names_for(rules: Sequence[Rule], caller: Caller) -> frozenset[str]:
    """What ``rules`` may know a caller by: uid, login name, and ``@`` before the name and number of every group.

    What NSS does not know is left out; where every rule is about everybody, NSS is not asked. Raises
    :class:`DeadlinePassed`.
    """
    if all("*" in rule.users for rule in rules):
        return frozenset()
    return with_deadline(lambda: _names_of(caller), uid=caller.uid)


def _names_of(caller: Caller) -> frozenset[str]:
    names = {str(caller.uid)}
    with contextlib.suppress(KeyError):
        names.add(pwd.getpwuid(caller.uid).pw_name)
    for gid in (caller.gid, *caller.groups):
        names.add(f"@{gid}")
        with contextlib.suppress(KeyError):
            names.add("@" + grp.getgrgid(gid).gr_name)
    return frozenset(names)


def uid_of(user: str, *, asked_by: int) -> int | None:
    """The number of a user, who may be named by it; None when there is no such user. Raises :class:`DeadlinePassed`."""
    if user.isascii() and user.isdigit():
        return int(user) if len(user) <= 10 else None
    with contextlib.suppress(KeyError):
        return with_deadline(lambda: pwd.getpwnam(user), uid=asked_by).pw_uid
    return None


def gid_of(group: str, *, asked_by: int) -> int | None:
    """The number of a group, which may be named by it; None when there is no such group. Raises
    :class:`DeadlinePassed`.
    """
    if group.isascii() and group.isdigit():
        return int(group) if len(group) <= 10 else None
    with contextlib.suppress(KeyError):
        return with_deadline(lambda: grp.getgrnam(group), uid=asked_by).gr_gid
    return None


def with_deadline(look_up: Callable[[], Found], *, uid: int) -> Found:
    """The answer of NSS about ``uid``. Raises :class:`DeadlinePassed`.

    NSS has no time limit of its own: a look-up that hangs keeps its thread, and this one goes on.
    """
    answer: list[Found] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            answer.append(look_up())
        except BaseException as error:  # noqa: BLE001
            failure.append(error)
        finally:
            _look_ups.release()

    late = time.monotonic() + _LOOKUP_SECONDS
    if _look_ups.acquire(timeout=_LOOKUP_SECONDS):
        thread = threading.Thread(target=work, name=f"nss-{uid}", daemon=True)
        thread.start()
        thread.join(max(0.0, late - time.monotonic()))
    if failure:
        raise failure[0]
    if not answer:
        raise DeadlinePassed(
            f"the node's name service did not tell who uid {uid} is within {_LOOKUP_SECONDS:.0f} s",
            hint=f"getent passwd {uid}; systemctl status sssd nscd",
        )
    return answer[0]
