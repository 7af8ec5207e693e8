"""The caller's half of ``hpcctr exec``: this process goes where another of the user's is, and becomes the command."""

from __future__ import annotations

import os

from hpcctr.client import connect, enter, environment, preflight
from hpcctr.client.carry import require_absolute
from hpcctr.client.run import IMAGE_VARIABLE, inheritable, variables_for
from hpcctr.request import ExecRequest, ExecWords

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from typing import NoReturn


def join(words: ExecWords, sock: _socket.socket | None = None) -> NoReturn:
    """Become the command of ``words`` in the view of a running process; ``sock`` is a connection to an engine in this
    session (root), else the node's is asked.

    Nothing is carried in: the process has what it was given. Raises any :class:`hpcctr.errors.HpcctrError` before that.
    """
    if words.workdir is not None:
        require_absolute(words.workdir)
    preflight.require_outside()
    request = ExecRequest(pid=words.pid, image=image_name(words.pid))
    sock, granted = connect.asked(request.frame(), sock)
    directory = words.workdir or working_directory(words.pid)
    variables, _ = variables_for(
        granted,
        environment.of_this_process(),
        clean=words.clean_env,
        requested=words.env,
        root=b"/proc/%d/root" % words.pid,
        directory=directory,
    )
    argv = enter.plan(
        inheritable(sock),
        (),
        directory,
        words.command,
        variables[b"PATH"].value,
        kernel_trees=(),
    )
    final = {name: variable.value for name, variable in variables.items()}
    if words.clean_env:
        enter.become(granted.one("enter"), argv, final)
    environment.set_in_this_process(final)
    enter.become(granted.one("enter"), argv)


def image_name(pid: int) -> str:
    """The name of its image as a process has it in its environment; empty when it has none or may not be looked at."""
    prefix = IMAGE_VARIABLE + b"="
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            entries = file.read().split(b"\0")
        return next((entry[len(prefix) :].decode() for entry in entries if entry.startswith(prefix)), "")
    except (OSError, UnicodeDecodeError):
        return ""


def working_directory(pid: int) -> bytes:
    """Where a process stands, as a path in its own view; ``/`` when that is no directory this user can enter.

    The kernel names the directory of another view by its path there, and one that has gone by a path that leads
    elsewhere or nowhere.
    """
    try:
        path = os.readlink(b"/proc/%d/cwd" % pid)
        there = b"/proc/%d/root" % pid + path
        if os.path.samestat(os.stat(there), os.stat(f"/proc/{pid}/cwd")) and os.access(there, os.X_OK):
            return path
    except OSError:
        pass
    return b"/"
