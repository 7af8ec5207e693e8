"""The probe of tests/e2e/test_fidelity.py through other launchers as well, in one run. Started by scripts/fidelity.

Each launcher starts the same static probe from the same two callers; the attributes it leaves as they are natively are
counted, the others are listed. What could not be run is not in the table: it is named on standard error, and the exit
status is 1.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import fidelity, images
from tests.support.engine import HPCCTR
from tests.support.fidelity import NoReport, Place, Report
from tests.support.host import CommandFailed, Host
from tests.support.node import Node, node
from tests.support.odd_caller import CALLERS
from tests.support.scratch import scratch
from tests.support.users import User, users

CALLED_BY = ("plain", "many")
_MQUEUE = Path("/dev/mqueue")
_IMAGE = "docker.io/fidelity/busybox:latest"


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """One way to start the probe in the busybox image."""

    name: str
    made: Place
    user: User | None
    words: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)


def _launchers(on: Node, modern: Host, places: Mapping[str, Place], root: Path, user: User) -> Iterator[Launcher]:
    image = images.busybox()
    made = places["shared"]
    run = [str(HPCCTR), "run", image, "--"]
    yield Launcher(name="hpcctr run", made=made, user=user, words=run, env=on.environment())
    yield Launcher(name="hpcctr run", made=made, user=None, words=run, env=on.environment())
    rootfs, archive = _prepare(root, image)
    # Not the engine's own namespace: it would take these for containers of its own.
    ctr = ["ctr", "--address", str(on.containerd.socket), "--namespace", "fidelity"]
    on.host.run([*ctr, "images", "import", str(archive)])
    place = str(made.directory)
    words = [*ctr, "run", "--rm", "--net-host", "--mount", f"type=bind,src={place},dst={place},options=rbind:rw"]
    words += ["--cwd", place, "--env", f"PROBE_REPORT={made.report}", _IMAGE, f"fidelity{os.getpid()}"]
    yield Launcher(name="ctr run --net-host", made=made, user=None, words=words)
    with contextlib.suppress(FileExistsError):
        (rootfs / place.lstrip("/")).mkdir(parents=True)
    words = ["ch-run", f"--bind={place}:{place}", f"--cd={place}", str(rootfs), "--"]
    yield Launcher(name="ch-run", made=made, user=user, words=words)
    # Debian's crun, which podman prefers, refuses machines that show both versions of cgroups.
    runtime = f"/run/user/{user.uid}"
    modern.run(["install", "-d", "-o", str(user.uid), "-m", "700", runtime])
    env = {"XDG_RUNTIME_DIR": runtime}
    # podman's --ipc=host wants what systemd mounts on every machine.
    modern.run(["mount", "-t", "mqueue", "mqueue", "/dev/mqueue"])
    modern.run(["podman", "load", "--input", str(archive)], user=user, env=env, check=False)
    place = str(places["modern"].directory)
    shared = ["--network", "host", "--pid", "host", "--ipc", "host"]
    words = ["podman", "run", "--rm", *shared, "--volume", f"{place}:{place}", "--workdir", place]
    words += ["--env", "PROBE_REPORT", "--env", "PROBE_CALLER", "--env", "PROBE_FORBIDDEN", _IMAGE]
    name = f"podman run {' '.join(shared)}"
    yield Launcher(name=name, made=places["modern"], user=user, words=words, env=env)


def _prepare(root: Path, image: str) -> tuple[Path, Path]:
    """The image as a directory, and as an archive for docker's kind of tools."""
    bundle, archive = root / "bundle", root / "busybox.tar"
    subprocess.run(["umoci", "unpack", "--image", image.removeprefix("oci:"), bundle], check=True, capture_output=True)
    bundle.chmod(0o755)
    target = f"docker-archive:{archive}:{_IMAGE}"
    subprocess.run(["skopeo", "--insecure-policy", "copy", "--quiet", image, target], check=True, capture_output=True)
    archive.chmod(0o644)
    return bundle / "rootfs", archive


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What became of the attributes of one caller."""

    attributes: int
    others: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.attributes - len(self.others)} of {self.attributes}"

    def listed(self) -> str:
        """The others; those of descriptors by their numbers."""
        descriptors = [attribute.split(".")[1] for attribute in self.others if attribute.startswith("descriptor.")]
        words = [attribute for attribute in self.others if not attribute.startswith("descriptor.")]
        if descriptors:
            words.insert(0, f"{len(descriptors)} of the descriptors {', '.join(dict.fromkeys(descriptors))}")
        return "; ".join(words)


def _compare(launcher: Launcher, name: str, forbidden: Path) -> Comparison:
    """Raises NoReport when the probe did not run."""
    made, caller = launcher.made, CALLERS[name]
    held = made.held
    if not caller.holds_descriptors:
        made.held = {}
    try:
        with fidelity.stdio(caller, made) as streams:

            def report(words: Sequence[str]) -> Report:
                return fidelity.report_of(
                    made, name, words, user=launcher.user, streams=streams, env=launcher.env, forbidden=forbidden
                )

            native, inside = report([]), report(launcher.words)
    finally:
        made.held = held
    attributes = fidelity.compared(native)
    others = tuple(attribute for attribute in attributes if native[attribute] != inside.get(attribute))
    return Comparison(attributes=len(attributes), others=others)


def _row(launcher: Launcher) -> str:
    return f"{launcher.name} ({'root' if launcher.user is None else 'user'})"


def main() -> int:
    """Compare all launchers and print Markdown."""
    failed: dict[str, str] = {}
    found: dict[str, dict[str, Comparison]] = {}
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(scratch("fidelity-peers"))
        (user,) = stack.enter_context(users("hpcctr-fidelity"))
        forbidden = stack.enter_context(tempfile.NamedTemporaryFile(prefix="hpcctr-fidelity-", dir="/tmp"))
        for name in ("node", "modern", "shared", "shared-modern"):
            (root / name).mkdir(mode=0o755)
        on = stack.enter_context(node(root / "node", linger_seconds=60))
        on.pull(images.busybox())
        if not _MQUEUE.exists():
            _MQUEUE.mkdir()
            stack.callback(_MQUEUE.rmdir)
        modern = stack.enter_context(Host.start(root / "modern", cgroup2_only=True))
        stack.callback(modern.run, ["podman", "system", "reset", "--force"], user=user, check=False)
        places = {
            "shared": stack.enter_context(fidelity.place(root / "shared", on.host)),
            "modern": stack.enter_context(fidelity.place(root / "shared-modern", modern)),
        }
        for made in places.values():
            fidelity.hold(made)
        for launcher in _launchers(on, modern, places, root, user):
            try:
                found[_row(launcher)] = {name: _compare(launcher, name, Path(forbidden.name)) for name in CALLED_BY}
            except (NoReport, CommandFailed, AssertionError) as error:
                failed[_row(launcher)] = str(error).strip()
    print("| Launcher | " + " | ".join(CALLERS[name].what for name in CALLED_BY) + " |")
    print("|---" * (1 + len(CALLED_BY)) + "|")
    for row, comparisons in found.items():
        print(f"| {row} | " + " | ".join(str(comparisons[name]) for name in CALLED_BY) + " |")
    for row, comparisons in found.items():
        print(f"\n{row}, not equal:")
        for name in CALLED_BY:
            print(f"- {CALLERS[name].what}: {comparisons[name].listed()}")
    for row, why in failed.items():
        print(f"fidelity: not compared: {row}: {why}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
