"""Direct mode: root, who may open containerd's socket, is their own engine for one launch.

The child becomes the command; this process serves it over a socketpair, stays as its parent and takes the container
down when it has ended. The fork comes first, before any thread of gRPC exists.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from types import FrameType

import msgspec

import hpcctr.enter
from hpcctr.containerd import Containerd
from hpcctr.context import Caller
from hpcctr.engine import session
from hpcctr.engine.nodes import NodeContainers
from hpcctr.engine.serve import make_run_directory
from hpcctr.errors import HpcctrError, ImageNotInStore
from hpcctr.request import RunWords
from hpcctr.site import Site
from hpcctr.wire import RUN_DIRECTORY

#: Sent on to the command; the terminal sends the others to both of us, and the command decides what they do.
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT, signal.SIGWINCH)
_IGNORED = (signal.SIGINT, signal.SIGQUIT)


def run(words: RunWords) -> int:
    """Run the command in a container of this process's own; its end, as a shell would tell it, or death by its
    signal.
    """
    site = _with_enter(Site.of_this_process())
    _pull_if_wanted(words, site)
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        ours.close()
        _become(words, its)
    its.close()
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)

    def forward(number: int, _frame: FrameType | None) -> None:
        os.kill(child, number)

    for number in _FORWARDED:
        signal.signal(number, forward)
    caller = Caller.of_child(child)
    nodes: NodeContainers | None = None
    try:
        make_run_directory()
        nodes = NodeContainers(
            site=site,
            containerd=Containerd(site.containerd.socket),
            state=f"{RUN_DIRECTORY}/direct-{os.getpid()}",
            owner=f"direct-{os.getpid()}",
        )
        with ours:
            session.serve(session.Door(site=site, nodes=nodes, is_gateway=False), ours, caller)
        _, status = os.waitpid(child, 0)
    finally:
        if nodes is not None:
            nodes.close(remove=True)
        os.close(caller.pidfd)
    return _same_end(status)


def _with_enter(site: Site) -> Site:
    """The site with an enter that exists: root has the capabilities already, so the one in the package will do."""
    if os.path.exists(site.enter):
        return site
    return msgspec.structs.replace(site, enter=os.path.join(os.path.dirname(hpcctr.enter.__file__), "enter"))


def _become(words: RunWords, sock: socket.socket) -> None:
    """The child: the client's half. Never returns."""
    status = 125
    try:
        if words.explain:
            from hpcctr.cli.explain import show
            from hpcctr.client.run import prepare

            show(prepare(words, sock))
            sys.stdout.flush()
            status = 0
        else:
            from hpcctr.client.run import run as become

            become(words, sock)
    except HpcctrError as error:
        os.write(2, os.fsencode(error.for_stderr()))
        status = error.exit_status
    finally:
        os._exit(status)


def _pull_if_wanted(words: RunWords, site: Site) -> None:
    from hpcctr.cli.images_cmd import pull_one
    from hpcctr.context import machine
    from hpcctr.image.record import Platform
    from hpcctr.image.store import Store

    if words.pull == "always":
        words.image = pull_one(words.image, platform=words.platform)
    elif words.pull == "missing":
        try:
            Store.open(site.store).find(words.image, Platform(os="linux", architecture=machine()))
        except ImageNotInStore:
            words.image = pull_one(words.image, platform=words.platform)


def _same_end(status: int) -> int:
    """End as the command ended: its exit status, or death by the same signal, so that our parent sees the same."""
    if not os.WIFSIGNALED(status):
        return os.WEXITSTATUS(status)
    number = os.WTERMSIG(status)
    signal.signal(number, signal.SIG_DFL) if number not in (signal.SIGKILL, signal.SIGSTOP) else None
    import resource

    # The command's core is the one of interest, not ours.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    os.kill(os.getpid(), number)
    return 128 + number
