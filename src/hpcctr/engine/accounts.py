"""The generated /etc of a node container: passwd, group, and what names the network and the time.

passwd and group are the image's own with the caller put in: programs look up who they run as. The image's lines are
hostile: only well-formed ones of bounded length stay, and none that would speak of the caller. The caller's come from
the host's name service (NSS), which may be a network away and gets a deadline.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import re
import stat
from collections.abc import Mapping

from hpcctr.context import Caller
from hpcctr.image.record import ImageRecord
from hpcctr.policy.account import with_deadline

#: Files of the host that are copied when they exist.
HOST_FILES = ("resolv.conf", "hosts", "localtime")
_FILE_MAX = 1 << 20
_LINE_MAX = 4096
_LINES_MAX = 10_000
_NAME = re.compile(rb"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,255}\$?")
_NUMBER = re.compile(rb"[0-9]{1,10}")
#: uid_t and gid_t have 32 bits; C libraries differ in what they make of a larger number.
_ID_MAX = 2**32 - 2
_FIELD_BREAKERS = re.compile(r"[\x00-\x1f\x7f:]")


def generated_etc(caller: Caller, record: ImageRecord, *, host_etc: str = "/etc") -> dict[str, bytes]:
    """Name below /etc → content. Raises :class:`DeadlinePassed` when the name service does not answer."""
    account, groups = with_deadline(lambda: (_account(caller.uid), _groups(caller)), uid=caller.uid)
    files = {
        "passwd": passwd(record.passwd, account=account),
        "group": group(record.group, groups=groups, member=account.pw_name if account else None),
    }
    for name in HOST_FILES:
        content = _host_file(os.path.join(host_etc, name))
        if content is not None:
            files[name] = content
    return files


def passwd(untrusted_passwd: bytes, *, account: pwd.struct_passwd | None) -> bytes:
    """The image's passwd(5) with the caller's account and no other of its name or number."""
    own: list[bytes] = []
    name = uid = None
    if account is not None:
        uid = account.pw_uid
        fields = (
            account.pw_name,
            "x",
            str(account.pw_uid),
            str(account.pw_gid),
            account.pw_gecos,
            account.pw_dir,
            account.pw_shell,
        )
        own = [":".join(_FIELD_BREAKERS.sub("", text) for text in fields).encode("utf-8", "surrogateescape")]
        name = own[0].partition(b":")[0]
    kept = [
        b":".join(fields)
        for fields in _records(untrusted_passwd, count=7, numbers=(2, 3))
        if fields[0] != name and int(fields[2]) != uid
    ]
    return b"".join(line + b"\n" for line in [*own, *kept])


def group(untrusted_group: bytes, *, groups: Mapping[int, str], member: str | None) -> bytes:
    """The image's group(5) with the caller's groups and no other of their names or numbers."""
    names = {name.encode("utf-8", "surrogateescape") for name in groups.values()}
    own = [
        ":".join(_FIELD_BREAKERS.sub("", text) for text in (name, "x", str(gid), member or "")).encode(
            "utf-8", "surrogateescape"
        )
        for gid, name in sorted(groups.items())
    ]
    kept = [
        b":".join(fields)
        for fields in _records(untrusted_group, count=4, numbers=(2,))
        if fields[0] not in names and int(fields[2]) not in groups
    ]
    return b"".join(line + b"\n" for line in [*own, *kept])


def _records(untrusted: bytes, *, count: int, numbers: tuple[int, ...]) -> list[list[bytes]]:
    """The well-formed lines: ``count`` fields, a plain name first, decimal numbers where there must be some."""
    records = []
    for line in untrusted[:_FILE_MAX].split(b"\n", _LINES_MAX)[:_LINES_MAX]:
        fields = line.split(b":")
        if (
            len(line) <= _LINE_MAX
            and len(fields) == count
            and _NAME.fullmatch(fields[0])
            and all(_NUMBER.fullmatch(fields[at]) and int(fields[at]) <= _ID_MAX for at in numbers)
            and b"\0" not in line
        ):
            records.append(fields)
    return records


def _account(uid: int) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(uid)
    except KeyError:
        return None


def _groups(caller: Caller) -> dict[int, str]:
    """Names of the caller's groups, where the host has one; an image's name for another number stays."""
    names = {}
    for gid in {caller.gid, *caller.groups}:
        with contextlib.suppress(KeyError):
            names[gid] = grp.getgrgid(gid).gr_name
    return names


def _host_file(path: str) -> bytes | None:
    """The content of a regular file of the host's that everybody may read; None when there is none, or it is too large
    to be one of these.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            # Root reads everything, and what it reads here everybody reads inside.
            if not stat.S_ISREG(mode) or not mode & stat.S_IROTH:
                return None
            content = file.read(_FILE_MAX + 1)
    except OSError:
        return None
    return content if len(content) <= _FILE_MAX else None
