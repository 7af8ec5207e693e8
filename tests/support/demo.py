"""The demonstration: a bare machine becomes a node, and an ordinary user's MPI program runs in a container.

Started by scripts/demo. Every number and name it prints was read from the run itself.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support import images
from tests.support.engine import HPCCTR
from tests.support.leftovers import Leftovers, require_nothing_new
from tests.support.mpi import LAUNCHERS, Family, contained, native, reports, require_one_job
from tests.support.node import Node, node
from tests.support.polling import wait_until
from tests.support.scratch import scratch
from tests.support.users import User, users

_RANKS = 2
_OTHER: images.Suite = "bookworm" if "trixie" in Path("/etc/os-release").read_text() else "trixie"
"""The Debian this machine does not run: what a program sees tells where it is."""
_PROBE = (
    'echo "probe uid=$(id -u) groups=$(id -G | tr " " ,) pid=$$ parent=$(cat /proc/$PPID/comm) '
    'cgroup=$(md5sum </proc/$$/cgroup | cut -c1-8) system=$(. /etc/os-release; echo "$PRETTY_NAME")"; exec "$@"'
)
"""A shell line that says who it is and then becomes the program: its pid is the program's."""

_PROBE_LINE = re.compile(r"probe uid=(\S*) groups=(\S*) pid=(\d+) parent=(\S*) cgroup=(\S*) system=(.*)")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One rank as it saw itself, and the pid its launcher started it with."""

    where: str
    launcher: str
    uid: int
    groups: str
    pid: int
    started_pid: int
    parent: str
    cgroup: str
    system: str
    library: str


def _say(text: str = "") -> None:
    print(text, flush=True)


def _step(title: str) -> None:
    _say(f"\n== {title}")


def _table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for number, row in enumerate(rows):
        _say("   " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if number == 0:
            _say("   " + "  ".join("-" * width for width in widths))


def _timed(action: Callable[[], object]) -> float:
    start = time.monotonic()
    action()
    return time.monotonic() - start


def _job(on: Node, user: User, family: Family, where: str, command: Sequence[str]) -> list[Task]:
    noted = ["sh", "-c", 'echo "started $$"; exec "$@"', "sh"]
    argv = LAUNCHERS[family](_RANKS, *noted, *command)
    output = on.host.run(argv, user=user, env=on.environment(), timeout=120).stdout
    text = output.decode()
    started = sorted(int(pid) for pid in re.findall(r"started (\d+)", text))
    found = reports(output)
    require_one_job(found, _RANKS)
    library = {report.pid: report.library for report in found}
    probed = sorted((_PROBE_LINE.fullmatch(line) for line in text.splitlines() if line.startswith("probe ")), key=str)
    tasks = []
    for match in probed:
        assert match is not None, text
        uid, groups, pid, parent, cgroup, system = match.groups()
        tasks.append(
            Task(
                where=where,
                launcher="mpirun" if family == "openmpi" else "mpiexec",
                uid=int(uid),
                groups=groups,
                pid=int(pid),
                started_pid=int(pid) if int(pid) in started else 0,
                parent=parent,
                cgroup=cgroup,
                system=system,
                library=library[int(pid)],
            )
        )
    return tasks


def _show_tasks(tasks: Sequence[Task]) -> None:
    header = (
        "where",
        "launcher",
        "system it sees",
        "MPI library",
        "uid",
        "groups",
        "pid",
        "launcher's child",
        "cgroups",
    )
    rows = [header]
    native_cgroups = {task.cgroup for task in tasks if task.where == "bare host"}
    for task in tasks:
        same = "yes, same pid" if task.started_pid == task.pid else "NO"
        rows.append(
            (
                task.where,
                task.launcher,
                task.system,
                task.library,
                str(task.uid),
                task.groups,
                str(task.pid),
                f"{same} (of {task.parent})",
                f"{'the same' if task.cgroup in native_cgroups else 'OTHERS'} ({task.cgroup})",
            )
        )
    _table(rows)


def _require_own_processes(tasks: Sequence[Task], user: User) -> None:
    """What the table shows must also be true."""
    assert {task.uid for task in tasks} == {user.uid}
    assert len({task.groups for task in tasks}) == 1
    assert all(task.started_pid == task.pid for task in tasks)
    for launcher in ("mpirun", "mpiexec"):
        assert len({task.cgroup for task in tasks if task.launcher == launcher}) == 1
        assert len({task.parent for task in tasks if task.launcher == launcher}) == 1


def _median_ms(action: Callable[[], object], times: int = 11) -> float:
    return statistics.median(_timed(action) for _ in range(times)) * 1000


def _show_times(on: Node, user: User, image: str) -> None:
    def launch(*command: str) -> Callable[[], object]:
        return lambda: on.host.run(command, user=user, env=on.environment())

    in_container = [str(HPCCTR), "run", image, "--", "/bin/true"]
    wait_until(lambda: not on.containerd.containers(), what="the removal of the last container")
    fresh = _timed(launch(*in_container)) * 1000
    warm = _median_ms(launch(*in_container))
    bare = _median_ms(launch("/bin/true"))
    _table(
        [
            ("from the login shell to the end of /bin/true", "ms"),
            ("on the bare host (median of 11)", f"{bare:.0f}"),
            ("in a container the node already has (median of 11)", f"{warm:.0f}"),
            ("in a container the node must build first (once)", f"{fresh:.0f}"),
        ]
    )


def _digest(on: Node, image: str) -> str:
    printed = on.hpcctr("inspect", image).stdout.decode()
    found = re.search(r"sha256:[0-9a-f]{64}", printed)
    assert found is not None, printed
    return found[0]


def _demonstrate(on: Node, user: User) -> None:
    image = images.debian_mpi(_OTHER)
    archive = Path(image.removeprefix("oci-archive:").removesuffix(":latest"))
    _step("The administrator pulls an image into the site's store: downloaded once, converted once, unpacked never")
    took = _timed(lambda: on.pull(image))
    _say(f"   $ hpcctr pull {image}")
    _say(f"   {archive.stat().st_size / 1e6:.0f} MB archive, {took:.1f} s, image {_digest(on, image)}")
    _say("   The image says USER root; that will not matter.")

    _step(f"The user {user.name} (uid {user.uid}) runs an MPI program, natively and in the container")
    probe = ("sh", "-c", _PROBE, "sh")
    tasks: list[Task] = []
    families: tuple[Family, ...] = ("openmpi", "mpich")
    for family in families:
        launcher = "mpirun" if family == "openmpi" else "mpiexec"
        _say(f"   $ {launcher} -n {_RANKS} ./report")
        _say(f"   $ {launcher} -n {_RANKS} hpcctr run IMAGE -- ./report")
        tasks += _job(on, user, family, "bare host", [*probe, native(family, "report")])
        tasks += _job(
            on, user, family, "container", [str(HPCCTR), "run", image, "--", *probe, contained(family, "report")]
        )
    _say()
    _show_tasks(tasks)
    _require_own_processes(tasks, user)
    _say()
    _say(
        "   In the container the program has its own system and MPI library, and is otherwise the launcher's own child:"
    )
    _say("   same user, same groups, same cgroups, the very pid that was started. Nothing of hpcctr stands between.")

    _step("What a launch costs")
    _show_times(on, user, image)


def main() -> int:
    """Run the demonstration; the exit status."""
    _step("A bare machine")
    release = re.search(r'PRETTY_NAME="(.*)"', Path("/etc/os-release").read_text())
    for argv in (["uname", "-sr"], ["containerd", "--version"], ["runc", "--version"], ["mpirun.openmpi", "--version"]):
        _say(f"   {subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()[0]}")
    _say(f"   {release[1] if release else 'unknown system'}")
    took = _timed(lambda: (images.debian_mpi("bookworm"), images.native_programs()))
    _say(
        f"   a real image (Debian 12, Open MPI, MPICH, two layers) and its native twin, made here or kept: {took:.1f} s"
    )

    with scratch("demo") as root, users("hpcctr-demo") as (user,):
        outside = Leftovers.of()
        _step("It becomes a node: containerd and the engine of hpcctr start, in a mount namespace of their own")
        with node(root) as on:
            # The engine makes its directories when it first needs them.
            _say(f"   containerd answers on {on.containerd.socket}")
            _say("   hpcctr engine serve listens on /run/hpcctr/engine.sock")
            before = Leftovers.of(on.host, on.containerd)
            _demonstrate(on, user)
            _step("The programs have ended; what is left of the containers?")
            took = _timed(lambda: require_nothing_new(before))
            _say(f"   nothing, {took:.1f} s later: no container, task, mount, loop device, cgroup, process or file")
        require_nothing_new(outside)
    _say("   engine and containerd stopped, user removed: the machine is as before")
    return 0


if __name__ == "__main__":
    sys.exit(main())
