"""Many processes on many hosts that pull the same image at the same moment, and a log of what each of them did.

As a program it is one host's share: it loads everything once, forks, and every child pulls when the file GO appears.
A worker may be told to kill or stop itself at a point of its work; only the first that gets there does.

    with pulling(hosts, order) as crowd:
        crowd.go()
        crowd.wait()
        crowd.happened("write")        # who converted
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.support.host import Host
from tests.support.polling import wait_until
from tests.support.users import User

PYTHON = sys.executable


@dataclass(frozen=True, kw_only=True)
class Order:
    """What every process does. ``directory`` is for the log and the signs, writable for who pulls."""

    image: str
    store: str
    directory: str
    plain_http: tuple[str, ...] = ()
    processes: int = 8
    #: Stage of the work at which the first worker gets ``signal``, or "claim" before it begins.
    at: str = ""
    signal: int = signal.SIGKILL
    #: Compressed bytes that must be there before that, for the stage download.
    after: int = 0
    #: Beats ten times as fast, and death told ten times as soon.
    quick: bool = True


@dataclass(kw_only=True)
class Crowd:
    """The running processes."""

    order: Order
    shares: list[subprocess.Popen[bytes]]

    def go(self) -> None:
        """Let all begin."""
        Path(self.order.directory, "GO").touch()

    def wait(self, seconds: float = 100) -> None:
        """Until every share has ended well."""
        deadline = time.monotonic() + seconds
        for share in self.shares:
            share.wait(max(deadline - time.monotonic(), 1))

    def events(self) -> list[dict[str, Any]]:
        """All that was logged so far."""
        path = Path(self.order.directory, "log")
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def happened(self, event: str) -> list[dict[str, Any]]:
        return [one for one in self.events() if one["event"] == event]

    def victim(self) -> int:
        """The pid of the worker that was killed or stopped, once it was."""
        path = Path(self.order.directory, "VICTIM")
        wait_until(lambda: path.exists() and path.read_text(), seconds=60, what=lambda: f"a victim; {self.events()}")
        return int(path.read_text())


@contextlib.contextmanager
def pulling(hosts: Sequence[Host], order: Order, *, user: User | None = None) -> Iterator[Crowd]:
    """Start the processes on every host, ready to go."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    crowd = Crowd(order=order, shares=[])
    ready = len(hosts) * order.processes
    try:
        for host in hosts:
            share = host.popen(
                [PYTHON, __file__, json.dumps(asdict(order))],
                user=user,
                cwd="/",
                env={"PYTHONPATH": path, "HOME": "/", "PYTHONDONTWRITEBYTECODE": "1"},
            )
            crowd.shares.append(share)
        wait_until(lambda: len(crowd.happened("ready")) == ready, seconds=120, what=lambda: f"{ready} ready")
        yield crowd
    finally:
        for process in (process for host in hosts for process in host.processes()):
            if process.environment_has("PYTHONDONTWRITEBYTECODE=1"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)


def _share(order: Order) -> int:
    from hpcctr.image import claims
    from hpcctr.image import registry as _registry  # noqa: F401 - loaded once for all children

    if order.quick:
        claims.HEARTBEAT, claims.STALE_AFTER = claims.HEARTBEAT / 10, claims.STALE_AFTER / 10
    children = []
    for _ in range(order.processes):
        pid = os.fork()
        if not pid:
            _child(order)
        children.append(pid)
    return 0 if all([os.waitpid(child, 0)[1] == 0 for child in children]) else 1


def _child(order: Order) -> None:
    from hpcctr.errors import HpcctrError
    from hpcctr.image import claims
    from hpcctr.image.pull import Progress, pull
    from hpcctr.image.reference import ImageRef
    from hpcctr.site import RegistrySettings, Site

    log = os.open(f"{order.directory}/log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    said: set[str] = set()

    def tell(event: str, **more: object) -> None:
        if event not in said:
            said.add(event)
            line = {"host": os.uname().nodename, "pid": os.getpid(), "event": event, "at": time.monotonic(), **more}
            os.write(log, json.dumps(line).encode() + b"\n")

    def strike(point: str, done: int = 0) -> None:
        if point != order.at or done < order.after:
            return
        try:
            victim = os.open(f"{order.directory}/VICTIM", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return
        os.write(victim, str(os.getpid()).encode())
        os.kill(os.getpid(), order.signal)

    def progress(step: Progress) -> None:
        if step.waiting is not None:
            tell("wait", worker=[step.waiting.host, step.waiting.pid])
            if step.waiting.stage:
                tell("seen", stage=step.waiting.stage, total=step.total)
        else:
            tell(step.stage)
            strike(step.stage, step.done)

    take = claims.take

    def taking(*arguments: Any, **more: Any) -> Any:
        claim = take(*arguments, **more)
        if claim is not None:
            tell("claim")
            strike("claim")
        return claim

    claims.take = taking
    site = Site(store=order.store, registry=dict.fromkeys(order.plain_http, RegistrySettings(plain_http=True)))
    tell("ready")
    while not Path(order.directory, "GO").exists():
        time.sleep(0.01)
    try:
        result = pull(ImageRef.parse(order.image), site=site, progress=progress)
    except HpcctrError as error:
        tell("failed", slug=error.slug, message=error.message)
        os._exit(1)
    except SystemExit:
        tell("ended")
        os._exit(0)
    except BaseException as error:  # noqa: BLE001 - the test reads it
        tell("crashed", message=repr(error))
        os._exit(2)
    tell("done", digest=result.image.record.digest, brought_here=result.brought_here)
    os._exit(0)


if __name__ == "__main__":
    words = json.loads(sys.argv[1])
    sys.exit(_share(Order(**{**words, "plain_http": tuple(words["plain_http"])})))
