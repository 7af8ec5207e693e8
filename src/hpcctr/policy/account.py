"""The names rules may know a caller by: uid, login name, groups."""

from __future__ import annotations

import contextlib
import grp
import pwd

from hpcctr.context import Caller


def names_of(caller: Caller) -> frozenset[str]:
    """Uid, login name, and ``@`` before the name and number of every group. What NSS does not know is left out."""
    names = {str(caller.uid)}
    with contextlib.suppress(KeyError):
        names.add(pwd.getpwuid(caller.uid).pw_name)
    for gid in (caller.gid, *caller.groups):
        names.add(f"@{gid}")
        with contextlib.suppress(KeyError):
            names.add("@" + grp.getgrgid(gid).gr_name)
    return frozenset(names)
