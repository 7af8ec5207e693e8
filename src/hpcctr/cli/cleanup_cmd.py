"""``hpcctr cleanup``: for the prolog and epilog of a scheduler; root's.

Whatever may wait for a silent file server is done in a child: a process in such a wait cannot be ended, and this one
must end in time.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import typer

from hpcctr.cli.table import Format, printable
from hpcctr.engine import control, job
from hpcctr.engine.job import Program
from hpcctr.errors import CallerRefused, EngineUnreachable, HpcctrError, ProgramsSurvive, UsageWrong
from hpcctr.site import Site

#: Seconds killed programs may take to end, and all of looking for them and killing them.
_END_SECONDS = 10.0
_JOB_SECONDS = 25.0
#: Seconds to clean up in the place of an engine that does not run.
_SWEEP_SECONDS = 60.0
_JOB_MAX = 2**32 - 1


@dataclass(kw_only=True)
class Report:
    """What was done."""

    killed: list[Program] = field(default_factory=list)
    survivors: list[Program] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    #: What could not be done, and why; none of it keeps a node from its next job.
    notes: list[str] = field(default_factory=list)


def cleanup(
    job_id: Annotated[
        str | None, typer.Option("--job", metavar="ID", help="End what Slurm's job ID still runs in containers, first.")
    ] = None,
    format: Annotated[Format, typer.Option("--format", help="How to print.")] = Format.TABLE,  # noqa: A002
) -> None:
    """Remove the node containers nobody uses, now: for a prolog or epilog, as root.

    With --job, what is left of that job in containers is killed before; the job of a process is told by its cgroup.
    Programs of other jobs are not touched, and a container that has one stays. May be repeated; with nothing to do it
    prints nothing and ends with 0. It ends within two minutes whatever hangs, and with 125 only when something of the
    job is still alive.
    """
    if os.getuid() != 0:
        raise CallerRefused(
            "cleanup is for root",
            hint="your programs end with kill; containers go by themselves after the last of them",
        )
    number = None if job_id is None else _job_number(job_id)
    report = Report()
    unknown = number is not None and not _end_job(number, report)
    _remove_idle(report)
    _print(report, format)
    if unknown:
        raise ProgramsSurvive(f"job {number} could not be looked through in {_JOB_SECONDS:.0f} s", hint="try again")
    if report.survivors:
        raise ProgramsSurvive(
            f"of job {number} still alive after SIGKILL: {', '.join(map(_named, report.survivors))}",
            hint="in state D a program waits for a filesystem or device: dmesg | tail, cat /proc/PID/stack",
        )


def _job_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= _JOB_MAX):
        raise UsageWrong(f"--job {text}: not a number of a job of Slurm's", hint="hpcctr cleanup --job $SLURM_JOB_ID")
    return int(text)


def _end_job(number: int, report: Report) -> bool:
    """Kill what the job runs; False when that could not be done."""

    def work() -> list[list[dict[str, Any]]]:
        return [[asdict(program) for program in programs] for programs in job.end(number, seconds=_END_SECONDS)]

    done = _in_child(work, _JOB_SECONDS)
    if done is None:
        return False
    report.killed, report.survivors = ([Program(**program) for program in programs] for programs in done)
    return True


def _remove_idle(report: Report) -> None:
    """Have the engine remove what nobody uses, or do it in its place."""
    try:
        answer = control.remove_idle()
    except EngineUnreachable as error:
        _sweep(report, str(error))
    except HpcctrError as error:
        report.notes.append(str(error))
    else:
        report.removed, report.unfinished = list(answer.removed), list(answer.unfinished)


def _sweep(report: Report, reason: str) -> None:
    site = Site.of_this_process()
    done = _in_child(lambda: _swept(site), _SWEEP_SECONDS)
    if done is None:
        report.notes.append(f"{reason}; cleaning up in its place was not done within {_SWEEP_SECONDS:.0f} s")
    elif "error" in done:
        report.notes.append(f"{reason}; {done['error']}")
    else:
        report.notes.append(f"{reason}; cleaned up in its place")
        report.removed = done["removed"]


def _swept(site: Site) -> dict[str, Any]:
    """What a gateway engine does when it starts and then ends: containers with members stay."""
    from hpcctr.containerd import Containerd
    from hpcctr.engine.node import LABEL_OWNER
    from hpcctr.engine.nodes import NodeContainers
    from hpcctr.engine.serve import make_run_directory

    # The OCI runtime is found there, as the engine finds it: an epilog may have none at all.
    os.environ["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin"  # noqa: TID251
    try:
        make_run_directory()
        containerd = Containerd(site.containerd.socket)
        before = containerd.list_containers(label=LABEL_OWNER)
        nodes = NodeContainers(site=site, containerd=containerd, state=control.STATE_DIRECTORY, owner="gateway")
        nodes.adopt()
        nodes.close(remove=False)
        after = {entry.container_id for entry in containerd.list_containers(label=LABEL_OWNER)}
    except HpcctrError as error:
        return {"error": str(error)}
    return {"removed": [entry.container_id for entry in before if entry.container_id not in after]}


def _in_child(work: Callable[[], Any], seconds: float) -> Any:  # noqa: ANN401 - whatever JSON can say
    """The result of ``work`` done in a child; None when it failed, or was not done in time.

    The child has none of this process's output: who reads that waits until the last has closed it.
    """
    ours, its = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            nothing = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(nothing, descriptor)
            os.setsid()
            with os.fdopen(its, "w", encoding="utf-8", errors="replace") as pipe:
                json.dump(work(), pipe)
        finally:
            os._exit(0)
    os.close(its)
    with os.fdopen(ours, "rb", buffering=0) as pipe:
        text = _read(pipe.fileno(), time.monotonic() + seconds)
    if text is None:
        os.kill(child, signal.SIGKILL)
        return None
    # Without waiting: a thread that hangs would keep the child.
    os.waitpid(child, os.WNOHANG)
    with contextlib.suppress(ValueError):
        return json.loads(text)
    return None


def _read(descriptor: int, late: float) -> bytes | None:
    """All there is to read; None when it has not ended by ``late``."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    parts = []
    while (rest := late - time.monotonic()) > 0:
        if poll.poll(rest * 1000):
            parts.append(os.read(descriptor, 65536))
            if not parts[-1]:
                return b"".join(parts)
    return None


def _print(report: Report, format: Format) -> None:  # noqa: A002
    if format is Format.JSON:
        typer.echo(json.dumps(asdict(report), indent=2))
        return
    for program in report.killed:
        typer.echo(f"killed {_named(program)}")
    for container_id in report.removed:
        typer.echo(f"removed container {container_id}")
    for container_id in report.unfinished:
        typer.echo(f"container {container_id} is not removed yet; the engine goes on")
    for note in report.notes:
        typer.echo(f"hpcctr: cleanup: {note}", err=True)


def _named(program: Program) -> str:
    return f"pid {program.pid} ({printable(program.name)}, uid {program.uid}, state {program.state})"
