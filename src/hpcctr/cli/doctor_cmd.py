"""``hpcctr doctor``: what this node lacks for hpcctr, and how to get it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from hpcctr.cli import doctor_host, launcher
from hpcctr.cli.finding import Finding
from hpcctr.cli.table import Format
from hpcctr.enter.install import enter_problem, front_problem
from hpcctr.errors import HpcctrError
from hpcctr.image.shelves import as_owner, owner_of
from hpcctr.image.store import Store
from hpcctr.image.uses import is_node_name
from hpcctr.policy.load import load
from hpcctr.site import Site
from hpcctr.wire import ENGINE_SOCKET

#: runc builds a container on a hostile root filesystem: the first release of each series without a known way out of
#: that (its CHANGELOG), of which CVE-2025-52881 and CVE-2026-41579 are the latest. Later series have none.
_RUNC_MENDED = {(1, 3): 6, (1, 4): 3}
#: mount_setattr(2) is the youngest call without which nothing works.
_KERNEL_FLOOR = (5, 14)


def doctor(
    format: Annotated[Format, typer.Option("--format", help="How to print.")] = Format.TABLE,  # noqa: A002
) -> None:
    """Say what this node lacks for hpcctr and how to get it. Ends with 1 when something is missing."""
    findings = [finding for check in CHECKS for finding in check(Site.of_this_process())]
    if format is Format.JSON:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            typer.echo(f"{'ok     ' if finding.is_good else 'MISSING'} {finding.thing:14} {finding.what}")
            if finding.remedy:
                typer.echo(f"{'':22} -> {finding.remedy}")
    raise SystemExit(0 if all(finding.is_good for finding in findings) else 1)


def _kernel(_: Site) -> Iterator[Finding]:
    release = platform.release()
    major, minor = (int("".join(filter(str.isdigit, part)) or 0) for part in release.split(".")[:2])
    good = (major, minor) >= _KERNEL_FLOOR
    yield Finding(thing="kernel", is_good=good, what=release, remedy="" if good else "Linux 5.14 or newer is needed")
    filesystems = {line.split()[-1] for line in Path("/proc/filesystems").read_text().splitlines()}
    for name in ("overlay", "squashfs"):
        good = name in filesystems or os.getuid() != 0
        what = "in the kernel" if name in filesystems else "not loaded now; the engine loads it with its first mount"
        yield Finding(
            thing=name, is_good=True if os.getuid() != 0 else good, what=what, remedy="" if good else f"modprobe {name}"
        )
    loop = Path("/dev/loop-control").exists()
    yield Finding(thing="loop devices", is_good=loop, what="/dev/loop-control", remedy="" if loop else "modprobe loop")


def _enter(site: Site) -> Iterator[Finding]:
    problem = enter_problem(Path(site.enter))
    if problem:
        reason, remedy = problem
        missing = not Path(site.enter).parent.is_dir()
        yield Finding(
            thing="enter",
            is_good=False,
            what=f"{site.enter}: {reason}",
            remedy="hpcctr engine install" if missing else remedy,
        )
    else:
        yield Finding(thing="enter", is_good=True, what=f"{site.enter}: root's, with its capabilities")


def _launcher(site: Site) -> Iterator[Finding]:
    """How the command starts: without front it cannot know which signals its caller ignored."""
    script = Path(sys.argv[0]).absolute()
    if script.name != "hpcctr":
        script = Path(sys.executable).with_name("hpcctr")
    if found := front_problem(Path(site.front)):
        what, remedy = f"{site.front}: {found[0]}", found[1]
    elif wrong := launcher.problem(script, front=site.front):
        what, remedy = f"{script}: {wrong}", "hpcctr engine install"
    else:
        yield Finding(thing="launcher", is_good=True, what=f"{script}: starts through {site.front}")
        return
    yield Finding(thing="launcher", is_good=False, what=what, remedy=remedy)


def _engine(_: Site) -> Iterator[Finding]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(ENGINE_SOCKET)
            yield Finding(thing="engine", is_good=True, what=f"listens on {ENGINE_SOCKET}")
        except OSError as error:
            yield Finding(
                thing="engine",
                is_good=False,
                what=f"{ENGINE_SOCKET}: {error.strerror}",
                remedy="systemctl start hpcctr-engine.socket, or as root: hpcctr engine serve",
            )


def _containerd(site: Site) -> Iterator[Finding]:
    path = site.containerd.socket
    try:
        there = stat.S_ISSOCK(os.stat(path).st_mode)  # noqa: PTH116
        what = path if there else f"{path}: not a socket"
    except OSError as error:
        there, what = False, f"{path}: {error.strerror}"
    remedy = (
        ""
        if there
        else "apt install containerd (or your system's package), systemctl start containerd; or [containerd] socket"
    )
    if there and os.access(path, os.W_OK):
        from hpcctr.containerd import Containerd

        try:
            what = f"{what}, version {Containerd(path).version()}"
        except HpcctrError as error:
            there, what, remedy = False, error.message, error.hint
    yield Finding(thing="containerd", is_good=there, what=what, remedy=remedy)
    runtime = _program(site.runtime, f"apt install {site.runtime}", needed_for="building containers")
    yield _with_known_escapes(runtime) if runtime.is_good and site.runtime == "runc" else runtime


def _with_known_escapes(runc: Finding) -> Finding:
    """The same, and whether it is too old. A distribution mends what it ships under the number it has: of a packaged
    runc the number says nothing, and the distribution's own updates say all.
    """
    version = re.search(r"\brunc version ([0-9]+)\.([0-9]+)\.([0-9]+)", runc.what)
    if version is None:
        return runc
    major, minor, patch = map(int, version.groups())
    if (major, minor) > max(_RUNC_MENDED) or patch >= _RUNC_MENDED.get((major, minor), patch + 1):
        return runc
    package = _package_of(runc.what.partition(",")[0])
    if package:
        return replace(runc, what=f"{runc.what}, of the package {package}: keep that updated")
    mended = " or ".join(f"{series[0]}.{series[1]}.{least}" for series, least in _RUNC_MENDED.items())
    return replace(
        runc,
        is_good=False,
        what=f"{runc.what}: of no package, and older than the mends of CVE-2025-52881 and CVE-2026-41579",
        remedy=f"install your system's package of runc, or {mended} or later",
    )


def _package_of(path: str) -> str:
    """The package a file came with, as dpkg or rpm knows it; empty when neither does."""
    for words in (["dpkg-query", "--search"], ["rpm", "--query", "--file"]):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            said = subprocess.run(
                [*words, os.path.realpath(path)], capture_output=True, text=True, timeout=10, check=False
            )
            if said.returncode == 0 and said.stdout:
                return said.stdout.split()[0].partition(":")[0]
    return ""


def _converter(_: Site) -> Iterator[Finding]:
    name = next((name for name in ("tar2sqfs", "mksquashfs") if shutil.which(name)), "tar2sqfs")
    yield _program(name, "apt install squashfs-tools-ng", needed_for="hpcctr pull")


def _program(name: str, remedy: str, *, needed_for: str) -> Finding:
    path = shutil.which(name, path=os.defpath + ":/usr/sbin:/sbin:/usr/local/bin")
    if path is None:
        return Finding(thing=name, is_good=False, what=f"not installed; needed for {needed_for}", remedy=remedy)
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(thing=name, is_good=False, what=f"{path}: {error}", remedy=remedy)
    lines = (said.stdout or said.stderr).splitlines()
    return Finding(thing=name, is_good=True, what=f"{path}, {lines[0].strip() if lines else 'version unknown'}")


def _store(site: Site) -> Iterator[Finding]:
    try:
        count = len(Store.open(site.store).images())
        yield Finding(thing="store", is_good=True, what=f"{site.store}: {count} names")
        uid, _ = owner_of(site.store)
        who = "root: the store is root's (docs/store.md)" if uid == 0 else f"everybody, as the store's owner, uid {uid}"
        yield Finding(thing="pulling", is_good=True, what=f"{who}; users {site.pull}")
    except HpcctrError as error:
        yield Finding(thing="store", is_good=False, what=error.message, remedy=error.hint)


def _uses(site: Site) -> Iterator[Finding]:
    """Whether this node can tell the store what it runs; without that nothing but a mark is missing."""
    if os.getuid() != 0 or not Path(site.store, "tmp").is_dir():
        return
    node = platform.node()
    problem, remedy = (
        "",
        "mount the store read-write here, for its owner; or hpcctr gc --older-than, more than a job's days",
    )
    if not is_node_name(node):
        problem, remedy = f"node name {node!r} has characters that marks cannot have", "hostnamectl set-hostname"
    else:
        path = Path(site.store, "tmp", f"doctor-{node}-{os.getpid()}")
        try:
            with as_owner(site.store):
                path.touch(mode=0o600, exist_ok=False)
                path.unlink()
        except OSError as error:
            problem = f"{path.parent}: {(error.strerror or str(error)).lower()}"
    what = f"gc knows what runs here, as {node}"
    yield Finding(
        thing="marking uses",
        is_good=not problem,
        what=f"gc does not know what runs here: {problem}" if problem else what,
        remedy=remedy if problem else "",
    )


def _policy(site: Site) -> Iterator[Finding]:
    if os.getuid() != 0:
        return
    try:
        yield Finding(
            thing="policy", is_good=True, what=f"{site.policy_directory}: {len(load(site.policy_directory))} rules"
        )
    except HpcctrError as error:
        yield Finding(thing="policy", is_good=False, what=error.message, remedy=error.hint)


def _caller(_: Site) -> Iterator[Finding]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    if status.get("NoNewPrivs", "0").strip() != "0":
        yield Finding(
            thing="this shell",
            is_good=False,
            what="has no_new_privs set, so enter would get no capability",
            remedy="leave the sandbox that set it (a container, systemd NoNewPrivileges=)",
        )


CHECKS: tuple[Callable[[Site], Iterator[Finding]], ...] = (
    _kernel, _enter, _launcher, _engine, _containerd, _converter, _store, _uses, _policy, _caller,
    doctor_host.devices, doctor_host.fabric, doctor_host.profiles, doctor_host.mpi, doctor_host.scheduler,
)  # fmt: skip
