"""The names rules may know a caller by: uid, login name, groups."""

from __future__ import annotations

import grp
import pwd

from hpcctr.context import Caller


def names_of(caller: Caller) -> frozenset[str]:
    """Uid, login name, and ``@`` before the name and number of every group. What NSS does not know is left out."""
    names = {str(caller.uid)}
    try:
        names.add(pwd.getpwuid(caller.uid).pw_name)
    except KeyError:
        pass
    for gid in (caller.gid, *caller.groups):
        names.add(f"@{gid}")
        try:
            names.add("@" + grp.getgrgid(gid).gr_name)
        except KeyError:
            pass
    return frozenset(names)
