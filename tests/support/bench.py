"""Measurements: what a launch and a pull cost next to other launchers, and what MPI costs next to the bare host.

Started by scripts/bench. Everything compared is measured in the same run, in turns, so that the machine's other work
meets all alike; medians are printed, and what could not be measured is left out with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tests.cluster import bench as cluster_bench
from tests.support import bench_pull, images
from tests.support.engine import HPCCTR
from tests.support.host import Host
from tests.support.mpi import LAUNCHERS, Family, PingPong, contained, native
from tests.support.node import Node, node
from tests.support.polling import wait_until
from tests.support.scratch import scratch
from tests.support.users import User, users

DOCUMENT = Path(__file__).parents[2] / "docs/performance.md"
PEERS = ("podman", "uidmap", "charliecloud-runtime", "charliecloud-builders", "python3-lark", "python3-requests")
"""Debian packages only the comparison needs."""

_STARTER = """
import os, sys, time
at_once, first, argv = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
quiet = [(os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0), (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)]
start = time.monotonic_ns()
started = []
for number in range(first, first + at_once):
    words = [word.replace("{n}", str(number)) for word in argv]
    started.append(os.posix_spawnp(words[0], words, os.environ, file_actions=quiet))
failed = sum(os.waitpid(pid, 0)[1] != 0 for pid in started)
print(time.monotonic_ns() - start)
sys.exit(failed != 0)
"""
"""Starts a command N times at once and prints the nanoseconds until the last has ended, its own start not counted."""


class CannotMeasure(Exception):
    """A peer does not work here; the text says why."""


@dataclass(kw_only=True)
class Launcher:
    """One way to start `true` in the busybox image. `{n}` in the command is a number never used before."""

    name: str
    host: Host
    user: User | None
    command: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    before: Callable[[], object] | None = None
    at_once: bool = True
    samples: dict[int, list[float]] = field(default_factory=dict)
    used: int = 0

    def measure(self, at_once: int) -> None:
        """One sample in milliseconds, until the last of `at_once` has ended. Raise CannotMeasure when one failed."""
        if self.before is not None:
            self.before()
        starter = ["/usr/bin/python3", "-IS", "-c", _STARTER, str(at_once), str(self.used), *self.command]
        self.used += at_once
        done = self.host.run(starter, user=self.user, env=self.env, check=False, timeout=120)
        if done.returncode != 0:
            message = done.stderr.decode(errors="replace").strip().splitlines()
            raise CannotMeasure(message[-1] if message else f"status {done.returncode}")
        self.samples.setdefault(at_once, []).append(int(done.stdout) / 1e6)

    @property
    def who(self) -> str:
        return "root" if self.user is None else "user"


def _in_turns(launchers: Sequence[Launcher], at_once: int, rounds: int) -> dict[str, str]:
    """Measure all launchers alternately; what failed, and why."""
    failed: dict[str, str] = {}
    for number in range(rounds + 1):
        for launcher in launchers:
            if launcher.name in failed or (at_once > 1 and not launcher.at_once):
                continue
            try:
                launcher.measure(at_once)
            except (CannotMeasure, AssertionError) as error:
                failed[launcher.name] = str(error).splitlines()[0]
                launcher.samples.pop(at_once, None)
                continue
            if number == 0:
                # The first round fills caches; it is nobody's number.
                launcher.samples[at_once].clear()
    return failed


def _peers_of_root(on: Node, root: Path, image: str) -> Iterator[Launcher]:
    bundle = root / "bundle"
    subprocess.run(["umoci", "unpack", "--image", image.removeprefix("oci:"), bundle], check=True, capture_output=True)
    bundle.chmod(0o755)
    config = json.loads((bundle / "config.json").read_text())
    config["process"]["terminal"] = False
    config["process"]["args"] = ["/bin/true"]
    (bundle / "config.json").write_text(json.dumps(config))
    archive = root / "busybox.tar"
    target = f"docker-archive:{archive}:docker.io/bench/busybox:latest"
    subprocess.run(["skopeo", "--insecure-policy", "copy", "--quiet", image, target], check=True, capture_output=True)
    archive.chmod(0o644)
    # Not the engine's own namespace: it would take these for containers of its own.
    ctr = ["ctr", "--address", str(on.containerd.socket), "--namespace", "bench"]
    on.host.run([*ctr, "images", "import", str(archive)])
    yield Launcher(name="runc run", host=on.host, user=None, command=["runc", "run", "--bundle", str(bundle), "b{n}"])
    run = [*ctr, "run", "--rm", "docker.io/bench/busybox:latest", "b{n}", "/bin/true"]
    yield Launcher(name="ctr run", host=on.host, user=None, command=run)


def _peers_of_users(modern: Host, on: Node, root: Path, user: User) -> Iterator[Launcher]:
    runtime_directory = f"/run/user/{user.uid}"
    modern.run(["install", "-d", "-o", str(user.uid), "-m", "700", runtime_directory])
    env = {"XDG_RUNTIME_DIR": runtime_directory}
    modern.run(["podman", "load", "--input", str(root / "busybox.tar")], user=user, env=env, check=False)
    run = ["podman", "run", "--rm", "--network=host", "docker.io/bench/busybox:latest", "/bin/true"]
    yield Launcher(name="podman run", host=modern, user=user, command=run, env=env)
    squashfs = root / "busybox.sqfs"
    subprocess.run(["mksquashfs", root / "bundle/rootfs", squashfs, "-quiet"], check=True, capture_output=True)
    for name, image in (("ch-run, directory", root / "bundle/rootfs"), ("ch-run, squashfs", squashfs)):
        yield Launcher(name=name, host=on.host, user=user, command=["ch-run", str(image), "--", "/bin/true"])


def _launch_table(launchers: Sequence[Launcher], counts: Sequence[int], failed: Mapping[tuple[str, int], str]) -> str:
    measured = {
        count: {each.name: statistics.median(each.samples[count]) for each in launchers if each.samples.get(count)}
        for count in counts
    }
    head = ["", "as", *(f"{count} at once, ms | of hpcctr" for count in counts)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * (2 + 2 * len(counts))]
    for launcher in launchers:
        cells = []
        for count in counts:
            own = measured[count].get(launcher.name)
            reference = measured[count].get("hpcctr, warm")
            cells += ["–", "–"] if own is None else [f"{own:.0f}", f"{own / reference:.1f}" if reference else "–"]
        lines.append(f"| {launcher.name} | {launcher.who} | " + " | ".join(cells) + " |")
    notes = [f"Not measured: {name} {count} at once: {why}." for (name, count), why in failed.items()]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def launch(rounds: int) -> str:
    """Markdown: starting `true` in a container of the busybox image, one and many at once."""
    image = images.busybox()
    counts = (1, 8, 32)
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(scratch("bench"))
        (user,) = stack.enter_context(users("hpcctr-bench"))
        for name in ("warm", "fresh", "modern"):
            (root / name).mkdir(mode=0o755)
        on = stack.enter_context(node(root / "warm", linger_seconds=600))
        fresh = stack.enter_context(node(root / "fresh", linger_seconds=0))
        # Debian's crun, which podman prefers, refuses machines that show both versions of cgroups.
        modern = stack.enter_context(Host.start(root / "modern", cgroup2_only=True))
        for each in (on, fresh):
            each.pull(image)
        command = [str(HPCCTR), "run", image, "--", "/bin/true"]

        def empty() -> None:
            wait_until(lambda: not fresh.containerd.containers(), what="the removal of the last container")

        launchers = [
            Launcher(name="bare host", host=on.host, user=user, command=["/bin/true"]),
            Launcher(name="hpcctr, warm", host=on.host, user=user, command=command, env=on.environment()),
            Launcher(
                name="hpcctr, node container built anew",
                host=fresh.host,
                user=user,
                command=command,
                env=fresh.environment(),
                before=empty,
            ),
            *_peers_of_root(on, root, image),
            *_peers_of_users(modern, on, root, user),
        ]
        failed: dict[tuple[str, int], str] = {}
        for count in counts:
            for name, why in _in_turns(launchers, count, rounds if count < 32 else max(3, rounds // 3)).items():
                failed[name, count] = why
        modern.run(["podman", "system", "reset", "--force"], user=user, check=False)
        return _launch_table(launchers, counts, failed)


def mpi(rounds: int) -> str:
    """Markdown: MPI_Init and messages between two ranks of a node, inside and natively."""
    image = images.debian_mpi("bookworm")
    families: tuple[Family, ...] = ("openmpi", "mpich")
    samples: dict[tuple[Family, str], list[PingPong]] = {}
    with scratch("bench") as root, users("hpcctr-bench") as (user,), node(root, linger_seconds=600) as on:
        on.pull(image)
        for _ in range(rounds):
            for family in families:
                for where, command in (
                    ("native", [native(family, "pingpong")]),
                    ("hpcctr", [str(HPCCTR), "run", image, "--", contained(family, "pingpong")]),
                ):
                    job = LAUNCHERS[family](2, *command)
                    output = on.host.run(job, user=user, env=on.environment(), timeout=120).stdout
                    samples.setdefault((family, where), []).append(PingPong.parse(output))
    lines = ["| | MPI_Init, ms | latency 8 B, µs | bandwidth 4 MiB, MB/s |", "|---|---|---|---|"]
    for family in families:
        for where in ("native", "hpcctr"):
            cells = [f"| {family}, {where}"]
            for name, digits in (("init_ms", 1), ("latency_us", 3), ("bandwidth_mb_s", 0)):
                own = statistics.median(getattr(each, name) for each in samples[family, where])
                reference = statistics.median(getattr(each, name) for each in samples[family, "native"])
                ratio = "" if where == "native" else f" ({own / reference:.2f} of native)"
                cells.append(f"{own:.{digits}f}{ratio}")
            lines.append(" | ".join(cells) + " |")
    return "\n".join(lines)


def _machine() -> str:
    release = re.search(r'PRETTY_NAME="(.*)"', Path("/etc/os-release").read_text())
    versions = []
    for argv in (["containerd", "--version"], ["runc", "--version"]):
        printed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        found = re.search(r"\d+\.\d+\.\d+", printed)
        versions.append(f"{argv[0]} {found[0] if found else '?'}")
    system = release[1] if release else "unknown system"
    today = datetime.now(UTC).date().isoformat()
    return f"{today}, {system}, Linux {os.uname().release}, {os.cpu_count()} processors, {', '.join(versions)}"


def _write(section: str, text: str) -> None:
    """Replace what stands between the section's marks in docs/performance.md, or add it at the end."""
    begin, end = f"<!-- {section}: begin, written by scripts/bench -->", f"<!-- {section}: end -->"
    document = DOCUMENT.read_text() if DOCUMENT.exists() else "# Performance\n"
    if begin not in document:
        document += f"\n{begin}\n{end}\n"
    before, _, rest = document.partition(begin)
    after = rest.partition(end)[2]
    DOCUMENT.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def main(argv: Sequence[str]) -> int:
    """Measure what is named and print it; the exit status."""
    sections: dict[str, Callable[[int], str]] = {
        "launch": launch,
        "mpi": mpi,
        "pull": bench_pull.pull,
        "slurm": cluster_bench.slurm,
    }
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measure hpcctr and its peers on this machine.")
    parser.add_argument("section", nargs="*", choices=[*sections, []], default=[], help="default: all")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each (default: 15)")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {DOCUMENT.name}")
    options = parser.parse_args(argv)
    for section in options.section or list(sections):
        text = f"Measured {_machine()}; medians of {options.rounds} in turns.\n\n{sections[section](options.rounds)}"
        print(f"\n## {section}\n\n{text}", flush=True)
        if options.write:
            _write(section, text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
