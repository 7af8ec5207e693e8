"""A cluster to try things on, started by scripts/cluster: the one of the tests, held by a process in the background.

    scripts/cluster up [--nodes N] [--store directory|gluster] [--accounting]
    scripts/cluster shell NODE [--user alice|bob] [-- COMMAND …]
    scripts/cluster down

`/run/hpcctr-cluster` says what runs; `down` leaves nothing, also when that process was killed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

import msgspec

from tests.cluster.cluster import cluster
from tests.cluster.slurm import remove_cgroups
from tests.support.host import MARK, PATH
from tests.support.polling import wait_until
from tests.support.processes import Process, processes
from tests.support.scratch import scratch
from tests.support.users import User, users

STATE = Path("/run/hpcctr-cluster")
ACCOUNTS = {"alice": "hpcctr-alice", "bob": "hpcctr-bob"}


class NodeState(msgspec.Struct, frozen=True, kw_only=True):
    """A node as another process can find it: `holder` is a pid in its namespaces, its processes are in the mount
    namespace (inode) or carry the mark.
    """

    holder: int
    mount_namespace: int
    mark: str

    def has(self, process: Process) -> bool:
        return process.mount_namespace == self.mount_namespace or process.environment_has(f"{MARK}={self.mark}")


class State(msgspec.Struct, frozen=True, kw_only=True):
    """The file STATE/cluster.json."""

    pid: int
    #: Clock ticks since boot; with the pid it names one process.
    start: int
    root: str
    environment: dict[str, str]
    nodes: dict[str, NodeState]

    @classmethod
    def read(cls) -> State | None:
        try:
            return msgspec.json.decode((STATE / "cluster.json").read_bytes(), type=cls)
        except FileNotFoundError:
            return None

    def is_held(self) -> bool:
        try:
            process = Process.read(self.pid)
        except (FileNotFoundError, ProcessLookupError):
            return False
        return process.start == self.start and not process.is_zombie


def _fail(message: str) -> NoReturn:
    sys.exit(f"cluster: {message}")


def _hold(nodes: int, prefix: str, store: str, accounted: bool) -> None:
    """Start the cluster, write down what it is, say so, and keep it until SIGTERM."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, STATE)
        root = stack.enter_context(scratch("by-hand"))
        *_, owner = stack.enter_context(users(*ACCOUNTS.values(), "hpcctr-store"))
        # A site keeps node containers for a while; whoever types looks at them.
        started = stack.enter_context(
            cluster(
                root,
                nodes=nodes,
                prefix=prefix,
                store="gluster" if store == "gluster" else "directory",
                accounted=accounted,
                linger_seconds=60,
            )
        )
        # As docs/store.md advises, so that everybody can bring images.
        node = started.nodes[started.login.root.name]
        node.host.run(["chown", f"{owner.uid}:{owner.gid}", str(node.site.store)])
        state = State(
            pid=os.getpid(),
            start=Process.read(os.getpid()).start,
            root=str(root),
            environment=started.environment,
            nodes={
                name: NodeState(
                    holder=host.holder.pid,
                    mount_namespace=Process.read(host.holder.pid).mount_namespace,
                    mark=host.mark,
                )
                for name, host in started.slurm.hosts.items()
            },
        )
        (STATE / "cluster.json").write_bytes(msgspec.json.encode(state))
        print("ready", flush=True)
        os.close(1)
        while True:
            signal.pause()


def up(nodes: int, prefix: str, store: str, accounted: bool) -> None:
    STATE.mkdir(mode=0o755, exist_ok=True)
    lock = os.open(STATE, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    state = State.read()
    if state is not None:
        _fail(f"one is up already, with nodes {', '.join(state.nodes)}: scripts/cluster down")
    with (STATE / "log").open("wb") as log:
        holder = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.by_hand", "hold", str(nodes), prefix, store, str(int(accounted))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    assert holder.stdout is not None
    if holder.stdout.readline() != b"ready\n":
        holder.wait()
        shown = (STATE / "log").read_text(errors="replace") if STATE.exists() else "another one is in the way"
        _fail(f"did not start:\n{shown}")
    state = State.read()
    assert state is not None
    print(f"nodes {', '.join(state.nodes)}; everything is below {state.root}")
    print(f"scripts/cluster shell {prefix}1 --user alice")


def shell(node: str, user: str | None, command: Sequence[str]) -> NoReturn:
    state = State.read()
    if state is None:
        _fail("none is up: scripts/cluster up")
    if node not in state.nodes:
        _fail(f"no node {node}; there are {', '.join(state.nodes)}")
    namespaces = f"/proc/{state.nodes[node].holder}/ns"
    argv = ["nsenter", f"--mount={namespaces}/mnt", f"--net={namespaces}/net", f"--uts={namespaces}/uts"]
    home, name = "/root", "root"
    if user is not None:
        try:
            account = User.named(ACCOUNTS.get(user, user))
        except KeyError:
            _fail(f"no user {user}; there are {', '.join(ACCOUNTS)}")
        home, name = str(account.home), account.name
        groups = ",".join(map(str, account.groups))
        argv += ["setpriv", f"--reuid={account.uid}", f"--regid={account.gid}", f"--groups={groups}", "--inh-caps=-all"]
    argv += ["env", f"--chdir={home}", *(command or ["bash", "--norc"])]
    environment = {
        "PATH": PATH,
        "HOME": home,
        "USER": name,
        "LOGNAME": name,
        "SHELL": "/bin/bash",
        "LANG": "C.UTF-8",
        "TERM": os.environ.get("TERM", "dumb"),
        "PS1": f"{user or 'root'}@{node}:\\w\\$ ",
        MARK: state.nodes[node].mark,
        **state.environment,
    }
    os.execvpe(argv[0], argv, environment)


def down() -> None:
    state = State.read()
    if state is None:
        _fail("none is up")
    if state.is_held():
        os.kill(state.pid, signal.SIGTERM)
        wait_until(lambda: not state.is_held(), seconds=120, what="the end of the cluster")
    else:
        _sweep(state)
    shutil.rmtree(STATE, ignore_errors=True)


def _sweep(state: State) -> None:
    """End what the holder, killed, could not; mounts go with the last process that sees them."""

    def nothing_runs() -> bool:
        running = [
            process
            for process in processes()
            if not process.is_zombie and any(node.has(process) for node in state.nodes.values())
        ]
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        return not running

    wait_until(nothing_runs, seconds=30, what="the end of the nodes' processes")
    for node in state.nodes:
        wait_until(partial(remove_cgroups, node), what=f"removal of the cgroups of {node}")
    with users(*ACCOUNTS.values()):
        pass
    shutil.rmtree(state.root)


def main(argv: Sequence[str]) -> None:
    if argv[:1] == ["hold"]:
        _hold(int(argv[1]), argv[2], argv[3], bool(int(argv[4])))
    parser = argparse.ArgumentParser(prog="scripts/cluster", description="A Slurm cluster on this machine.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    of_up = verbs.add_parser("up", help="start one")
    of_up.add_argument("--nodes", type=int, default=2)
    of_up.add_argument("--prefix", default="n", help="of the nodes' names, as n in n1; clusters at once differ in it")
    of_up.add_argument("--store", choices=["directory", "gluster"], default="directory")
    of_up.add_argument("--accounting", action="store_true", help="with slurmdbd and its database, for sacct")
    of_shell = verbs.add_parser("shell", help="a shell on a node, or the command after --")
    of_shell.add_argument("node")
    of_shell.add_argument("--user", help="alice, bob or an account of this machine; default: root")
    verbs.add_parser("down", help="end it; nothing is left")
    words = list(argv)
    command = words[words.index("--") + 1 :] if "--" in words else []
    options = parser.parse_args(words[: words.index("--")] if "--" in words else words)
    if options.verb == "up":
        up(options.nodes, options.prefix, options.store, options.accounting)
    elif options.verb == "shell":
        shell(options.node, options.user, command)
    else:
        down()


if __name__ == "__main__":
    main(sys.argv[1:])
