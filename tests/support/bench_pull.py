"""What it costs to bring an image: hpcctr next to what ends with the same kind of file, a squashfs of zstd.

One real image of this machine's own files is served by a real registry on loopback; each way begins with nothing and
takes turns with the others. Everything runs as root: that is where the peers work.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.engine import HPCCTR
from tests.support.mountinfo import read_mountinfo
from tests.support.registry import Registry
from tests.support.scratch import scratch

TREES = (("/usr/include", "/usr/share/doc"), ("/usr/lib/gcc", "/usr/lib/python3", "/usr/lib/x86_64-linux-gnu"))
"""The image's layers: files every Debian has, whichever versions."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one pull with all it starts: seconds, seconds of processors, MiB of the largest process, MiB written."""

    wall: float
    processors: float
    memory: float
    written: float


@dataclass(kw_only=True)
class Way:
    """One way to bring the image: command lines, each started when the one before has succeeded."""

    name: str
    commands: Callable[[Path], Sequence[Sequence[str]]]
    costs: list[Cost] = field(default_factory=list)
    why_not: str = ""


_MEASURE = """
import json, os, resource, subprocess, sys, time
start = time.monotonic()
for command in json.loads(sys.argv[1]):
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
wall, used = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, used.ru_oublock / 2048]))
"""


def _measure(way: Way, directory: Path) -> None:
    directory.mkdir()
    argv = ["/usr/bin/python3", "-c", _MEASURE, json.dumps([list(map(str, one)) for one in way.commands(directory)])]
    # Charliecloud wants the distribution's Python, to know who it is, and no bundle of certificates: with one it does
    # verify what it was told not to.
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_CA_BUNDLE")}
    environment |= {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "USER": "root"}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, cwd=directory)
    if done.returncode == 0:
        wall, processors, memory, written = json.loads(done.stdout.splitlines()[-1])
        way.costs.append(Cost(wall=wall, processors=processors, memory=memory, written=written))
    else:
        lines = [line for line in done.stderr.splitlines() if not line.startswith((" ", "Traceback", "subprocess."))]
        way.why_not = lines[-1][:150] if lines else f"status {done.returncode}"
    # Podman leaves its store mounted, also after a failure.
    place = ["podman", "--root", str(directory / "podman"), "--runroot", str(directory / "run")]
    subprocess.run([*place, "image", "unmount", "--all"], capture_output=True, check=False)
    for mount in reversed(read_mountinfo()):
        if Path(mount.target).is_relative_to(directory):
            subprocess.run(["umount", mount.target], check=True)
    shutil.rmtree(directory)


def _registry(root: Path) -> Registry:
    """Over TLS: Charliecloud speaks nothing else."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=hpcctr"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(root / "key"), "-out", str(root / "ca")]
    subprocess.run(command, check=True, capture_output=True)
    return Registry.start(root / "registry", certificate=root / "ca", key=root / "key")


def _image(directory: Path, registry: Registry) -> tuple[str, int, int]:
    """(its name, bytes of its files, files), pushed."""
    layout = directory / "layout"
    subprocess.run(["umoci", "init", "--layout", layout], check=True)
    subprocess.run(["umoci", "new", "--image", f"{layout}:1"], check=True)
    size = count = 0
    for trees in TREES:
        layer = directory / "layer.tar"
        there = [tree.lstrip("/") for tree in trees if Path(tree).is_dir()]
        subprocess.run(["tar", "--create", "--file", layer, "--directory=/", "--one-file-system", *there], check=True)
        listing = subprocess.run(["tar", "--list", "--file", layer], capture_output=True, check=True).stdout
        count += listing.count(b"\n")
        size += layer.stat().st_size
        subprocess.run(["umoci", "raw", "add-layer", "--image", f"{layout}:1", layer], check=True)
        layer.unlink()
    name = f"{registry.address}/bench/machine:1"
    copy = ["skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"]
    subprocess.run([*copy, f"oci:{layout}:1", f"docker://{name}"], check=True)
    shutil.rmtree(layout)
    return name, size, count


def _ways(name: str, root: Path) -> list[Way]:
    squash = ["-noappend", "-quiet", "-no-progress", "-comp", "zstd", "-Xcompression-level", "3", "-b", "131072"]

    def hpcctr(directory: Path) -> list[list[str]]:
        site = directory / "site.toml"
        site.write_text(f'store = "{directory}/store"\n[registry."{name.partition("/")[0]}"]\nca-file = "{root}/ca"\n')
        return [["env", f"HPCCTR_SITE={site}", str(HPCCTR), "pull", name]]

    def umoci(directory: Path) -> list[list[str]]:
        return [
            ["skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false", f"docker://{name}",
             f"oci:{directory}/layout:1"],
            ["umoci", "unpack", "--image", f"{directory}/layout:1", f"{directory}/bundle"],
            ["mksquashfs", f"{directory}/bundle/rootfs", f"{directory}/image.sqfs", *squash],
        ]  # fmt: skip

    def podman(directory: Path) -> list[list[str]]:
        place = ["podman", "--root", f"{directory}/podman", "--runroot", f"{directory}/run"]
        script = (
            f'm=$({" ".join(place)} image mount {name}) && mksquashfs "$m" {directory}/image.sqfs {" ".join(squash)}'
        )
        return [[*place, "pull", "--quiet", "--tls-verify=false", name], ["sh", "-c", script]]

    def charliecloud(directory: Path) -> list[list[str]]:
        place = ["env", f"CH_IMAGE_STORAGE={directory}/ch"]
        return [
            [*place, "ch-image", "--tls-no-verify", "pull", name],
            [*place, "ch-convert", "-i", "ch-image", "-o", "squash", name, f"{directory}/image.sqfs"],
        ]

    return [
        Way(name="hpcctr pull", commands=hpcctr),
        Way(name="skopeo, umoci unpack, mksquashfs", commands=umoci),
        Way(name="podman pull, mksquashfs", commands=podman),
        Way(name="ch-image pull, ch-convert", commands=charliecloud),
    ]


def pull(rounds: int) -> str:
    """Markdown: wall, processors, memory and bytes written of each way."""
    rounds = min(rounds, 3)
    with scratch("bench-pull") as root, _registry(root) as registry:
        start = time.monotonic()
        name, size, count = _image(root, registry)
        ways = _ways(name, root)
        for number in range(rounds):
            for way in ways:
                if not way.why_not:
                    _measure(way, root / f"run{number}")
        made = time.monotonic() - start
    fastest = min((statistics.median(c.wall for c in way.costs) for way in ways[1:] if way.costs), default=0.0)
    lines = [
        f"An image of {size / 1e9:.1f} GB and {count:,} files of this machine, {rounds} rounds ({made:.0f} s in all).",
        "",
        "| | wall, s | of the fastest peer | processors, s | largest process, MiB | written, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for way in ways:
        if way.why_not:
            lines.append(f"| {way.name} | not measured: {way.why_not} | | | | |")
            continue
        wall, processors, memory, written = (
            statistics.median(getattr(cost, what) for cost in way.costs)
            for what in ("wall", "processors", "memory", "written")
        )
        ratio = f"{wall / fastest:.2f}" if fastest else "?"
        lines.append(f"| {way.name} | {wall:.1f} | {ratio} | {processors:.1f} | {memory:.0f} | {written:.0f} |")
    return "\n".join(lines)
