"""Direct mode: root, who may open containerd's socket, is their own engine for one launch.

The child becomes the command; this process serves it over a socketpair, stays as its parent
(:mod:`hpcctr.cli.parent`) and takes the container down when it has ended. The fork comes first, before any thread of
gRPC exists.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable

import msgspec

import hpcctr.enter
from hpcctr.cli.parent import Parent
from hpcctr.client.preflight import require_outside
from hpcctr.containerd import Containerd
from hpcctr.context import Caller
from hpcctr.engine import session
from hpcctr.engine.nodes import NodeContainers
from hpcctr.engine.serve import make_run_directory
from hpcctr.errors import HpcctrError, ImageNotInStore
from hpcctr.request import ExecWords, RunWords
from hpcctr.site import Site
from hpcctr.wire import RUN_DIRECTORY


def run(words: RunWords) -> int:
    """Run the command in a container of this process's own; its end, as a shell would tell it, or death by its
    signal.
    """
    require_outside()
    site = _with_enter(Site.of_this_process())
    _pull_if_wanted(words, site)

    def become(sock: socket.socket) -> None:
        if words.explain:
            from hpcctr.cli.explain import show
            from hpcctr.client.run import prepare

            _, planned = prepare(words, sock)
            show(planned)
            sys.stdout.flush()
        else:
            from hpcctr.client.run import run

            run(words, sock)

    return _serve_child(site, become)


def join(words: ExecWords) -> int:
    """Run the command where a running program of root's is; its end, as for :func:`run`."""

    def become(sock: socket.socket) -> None:
        from hpcctr.client.exec import join

        join(words, sock)

    require_outside()
    return _serve_child(_with_enter(Site.of_this_process()), become)


def _serve_child(site: Site, become: Callable[[socket.socket], None]) -> int:
    """Fork the process that becomes the command, and be its engine and its parent."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        ours.close()
        _be_the_client(become, its)
    its.close()
    caller = Caller.of_child(child)
    nodes: NodeContainers | None = None
    try:
        # Before the first thread of gRPC: threads inherit what is blocked.
        parent = Parent.of_child(child)
        make_run_directory()
        nodes = NodeContainers(
            site=site,
            containerd=Containerd(site.containerd.socket),
            state=f"{RUN_DIRECTORY}/direct-{os.getpid()}",
            owner=f"direct-{os.getpid()}",
        )
        with ours:
            session.serve(session.Door(site=site, nodes=nodes, errands=None, is_gateway=False), ours, caller)
        status = parent.wait()
    finally:
        if nodes is not None:
            nodes.close(remove=True)
        os.close(caller.pidfd)
    return parent.end_like_child(status)


def _with_enter(site: Site) -> Site:
    """The site with an enter that exists: root has the capabilities already, so the one in the package will do."""
    if os.path.exists(site.enter):
        return site
    return msgspec.structs.replace(site, enter=os.path.join(os.path.dirname(hpcctr.enter.__file__), "enter"))


def _be_the_client(become: Callable[[socket.socket], None], sock: socket.socket) -> None:
    """The child: the client's half. Never returns."""
    status = 125
    try:
        become(sock)
        status = 0
    except HpcctrError as error:
        error.tell()
        status = error.exit_status
    finally:
        os._exit(status)


def _pull_if_wanted(words: RunWords, site: Site) -> None:
    from hpcctr.cli.bringing import bring_for
    from hpcctr.context import machine
    from hpcctr.image.record import Platform
    from hpcctr.image.shelves import find

    if words.pull == "always":
        bring_for(words)
    elif words.pull == "missing":
        try:
            find(site.store, os.getuid(), words.image, Platform(os="linux", architecture=machine()))
        except ImageNotInStore as error:
            bring_for(words, error)
