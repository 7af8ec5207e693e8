"""The soak: many users launch all the time, half of what they start is killed at random points, and the engine and
containerd are stopped and killed in between. Started by scripts/soak; a short one is tests/e2e/test_soak.py.

What must hold of it all is :meth:`Outcome.faults`. The engine is systemd's, by the shipped unit. With the same seed the
same launches begin in the same order and the same things are done to them; where in a launch they come upon it is
the machine's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcctr.errors import HpcctrError, of_slug
from tests.support import images, soak_user
from tests.support.engine import HPCCTR, SOCKET
from tests.support.host import Host
from tests.support.leftovers import Leftovers
from tests.support.node import Node, equipped
from tests.support.oci import busybox, file, tar, write_oci_archive
from tests.support.polling import wait_until
from tests.support.registry import Registry
from tests.support.scratch import scratch
from tests.support.systemd import Systemd
from tests.support.users import User

UNITS = Path(__file__).parents[2] / "etc/systemd"
SERVICE = "hpcctr-engine.service"
FIRST_UID = 61300
OWNER = 61299
#: What is launched, and how often next to the others.
KINDS = {"run": 50, "target": 14, "while": 16, "exec": 10, "pull": 3, "import": 3, "images": 4}
#: What is done meanwhile; every one as often as --rounds says.
DISTURBANCES = ("engine-stop", "engine-kill", "containerd-stop", "containerd-kill", "reload", "policy", "cleanup", "gc")
#: Daemons that are started again, and so are new.
_RESTARTED = ("engine serve", "containerd --config", "ctr --address")
_ERROR = re.compile(r"hpcctr: error\[([a-z-]+)\]: .+\n(hint: .+\n)?")
_POLICIES = (
    '[[rule]]\nname = "all"\naction = "allow"\n',
    '[[rule]]\nname = "not-that"\naction = "deny"\nimages = ["*/other:*"]\n[[rule]]\nname = "all"\naction = "allow"\n',
    "[[rule]]\nname = \n",
)
#: What a caller may be told because of a disturbance: never anything else.
EXPECTED = {
    # protocol: enter has asked, and nobody is there to answer any more.
    "engine-kill": {"no-engine", "store", "protocol"},
    "containerd-stop": {"no-containerd", "containerd", "deadline"},
    "containerd-kill": {"no-containerd", "containerd", "deadline", "container-not-found"},
    "policy": {"policy-denied", "policy-unusable"},
    # exec finds nobody, or somebody at their end.
    "": {"not-your-program", "engine-busy"},
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked for."""

    launches: int = 2000
    users: int = 8
    at_once: int = 512
    seconds: float = 3600.0
    seed: int = 1
    rounds: int = 2
    killed: float = 0.5
    disturbances: tuple[str, ...] = DISTURBANCES
    kinds: tuple[str, ...] = tuple(KINDS)
    #: Seconds any launch may take.
    deadline: float = 120.0


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The engine at one moment, after so many launches."""

    launches: int
    pid: int
    kib: int
    descriptors: int
    threads: int

    @classmethod
    def of(cls, pid: int, launches: int) -> Sample:
        place = Path(f"/proc/{pid}")
        # Its own memory alone: what it shares with other Pythons (Pss) changes with their number.
        own = re.search(r"^Anonymous:\s+(\d+) kB$", (place / "smaps_rollup").read_text(), re.MULTILINE)
        assert own is not None
        return cls(
            launches=launches,
            pid=pid,
            kib=int(own[1]),
            descriptors=len(os.listdir(place / "fd")),
            threads=len(os.listdir(place / "task")),
        )


@dataclass(kw_only=True)
class Outcome:
    """What came of it."""

    plan: Plan
    ended: list[dict[str, Any]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    #: The engine at rest before and after.
    before: Sample | None = None
    after: Sample | None = None
    left: tuple[str, ...] = ()
    log_faults: tuple[str, ...] = ()
    seconds: float = 0.0

    def errors(self) -> Counter[str]:
        """Slugs that callers were told, and how often."""
        found = (_ERROR.fullmatch(one["err"]) for one in self.ended if one["status"] in (125, 126, 127))
        return Counter(match[1] for match in found if match is not None)

    def slope(self) -> float | None:
        """KiB of the engine's memory for each 1,000 launches: least squares over the last engine's samples, the
        first third of its launches left out. None with fewer than 8."""
        if not self.samples:
            return None
        own = [sample for sample in self.samples if sample.pid == self.samples[-1].pid]
        begin = own[0].launches + (own[-1].launches - own[0].launches) / 3
        points = [(sample.launches, sample.kib) for sample in own if sample.launches >= begin]
        if len(points) < 8:
            return None
        middle = sum(x for x, _ in points) / len(points)
        height = sum(y for _, y in points) / len(points)
        spread = sum((x - middle) ** 2 for x, _ in points)
        return 1000 * sum((x - middle) * (y - height) for x, y in points) / spread if spread else None

    def faults(self) -> list[str]:
        """Everything that is not as it must be."""
        allowed = set().union(*(EXPECTED.get(name, set()) for name in ("", *self.plan.disturbances)))
        found = [fault for one in self.ended if (fault := fault_of(one, allowed))]
        found += [f"left behind: {thing}" for thing in self.left]
        found += [f"in the engine's log: {line}" for line in self.log_faults]
        if self.before is not None and self.after is not None:
            for name in ("descriptors", "threads"):
                was, became = getattr(self.before, name), getattr(self.after, name)
                if became > was:
                    found.append(f"the engine at rest has {became} {name}, and had {was}")
        return found

    def summary(self) -> dict[str, Any]:
        """The figures."""
        by_time = sorted(self.ended, key=lambda one: float(one["seconds"]))
        times = [one["seconds"] for one in by_time if not one["killed"]]
        return {
            "launches": len(self.ended),
            "kinds": dict(Counter(one["kind"] for one in self.ended)),
            "killed": sum(one["killed"] for one in self.ended),
            "errors": dict(self.errors()),
            "seconds": round(self.seconds, 1),
            "slowest": [f"{one['seconds']:.1f} s: {' '.join(one['argv'][1:])}" for one in by_time[:-4:-1]],
            "median": round(times[len(times) // 2], 2) if times else None,
            "done": dict(self.done),
            "engine_before": None if self.before is None else self.before.__dict__,
            "engine_after": None if self.after is None else self.after.__dict__,
            "kib_per_1000_launches": None if (slope := self.slope()) is None else round(slope, 1),
            "seed": self.plan.seed,
            "faults": self.faults(),
        }


def fault_of(one: dict[str, Any], allowed: set[str]) -> str | None:
    """What is wrong with the end of a launch; None when nothing is."""
    what = (
        f"{' '.join(one['argv'])} after {one['seconds']:.1f} s: status {one['status']}, {one['out']!r}, {one['err']!r}"
    )
    if one["stuck"]:
        return f"stuck: {what}"
    if "Traceback" in one["err"]:
        return f"traceback: {what}"
    if one["killed"] and one["status"] == -9:
        return None
    if one["status"] == 0:
        is_errand = one["kind"] in ("pull", "import", "images")
        is_right = is_errand or (one["out"], one["err"]) == (f"{one['word']}\n", "")
        return None if is_right else f"wrong output: {what}"
    match = _ERROR.fullmatch(one["err"])
    if one["status"] not in (125, 126) or one["out"] or match is None or of_slug(match[1]) is HpcctrError:
        return f"no named error: {what}"
    return None if match[1] in allowed else f"an error without a cause: {what}"


@dataclass(kw_only=True)
class Ground:
    """A node, its systemd, and what launches need."""

    node: Node
    systemd: Systemd
    users: list[User]
    images: list[str]
    registry: list[str]
    log_file: Path

    def engine(self) -> int:
        return self.systemd.main_pid(SERVICE)

    def sample(self, launches: int) -> Sample | None:
        """None while there is no engine."""
        with contextlib.suppress(OSError, AssertionError):
            return Sample.of(self.engine(), launches)
        return None

    def rest(self) -> Sample:
        """The engine with no session and no container, once it has stopped changing."""
        self.node.run(self.images[0], "true", user=self.users[0])
        last: list[Sample] = []

        def is_still() -> bool:
            time.sleep(0.3)
            last.append(Sample.of(self.engine(), 0))
            numbers = [(sample.descriptors, sample.threads) for sample in last[-4:]]
            return len(numbers) == 4 and len(set(numbers)) == 1 and self.node.containerd.containers() == ()

        wait_until(is_still, seconds=60, what=lambda: f"rest: {last[-1]}")
        return last[-1]

    def disturb(self, name: str, dice: random.Random) -> None:
        """Do one of :data:`DISTURBANCES`."""
        node = self.node
        if name == "engine-stop":
            self.systemd.ctl("restart", SERVICE, timeout=200)
        elif name == "engine-kill":
            self.systemd.ctl("kill", "--kill-who=main", "--signal=KILL", SERVICE, check=False)
        elif name in ("containerd-stop", "containerd-kill"):
            node.containerd.restart(kill=name == "containerd-kill")
        elif name == "reload":
            self.systemd.ctl("reload", SERVICE, check=False)
        elif name == "policy":
            for text in (dice.choice(_POLICIES), _POLICIES[0]):
                new = node.site.policy_directory / "new"
                new.write_text(text)
                new.rename(node.site.policy_directory / "10-soak.toml")
                time.sleep(dice.random() / 2)
        elif name == "cleanup":
            node.hpcctr("cleanup", check=False, timeout=120)
        elif name == "gc":
            node.hpcctr("gc", check=False, timeout=120)


@contextlib.contextmanager
def ground(users: int) -> Iterator[Ground]:
    """Make it."""
    with (
        scratch("soak") as root,
        Host.start(root) as host,
        Systemd.start(host) as systemd,
        equipped(host, linger_seconds=1) as node,
        Registry.start(root / "registry") as registry,
    ):
        made = []
        for number in range(users):
            uid = FIRST_UID + number
            home = root / f"home{number}"
            home.mkdir(mode=0o700)
            made.append(User(name=f"soak{number}", uid=uid, gid=uid, groups=(uid,), home=home))
            own = write_oci_archive(home / "own.tar", busybox(layers=[tar(file("etc/own", b"%d" % number))]))
            for path in (home, own):
                os.chown(path, uid, uid)
        names = [images.busybox()]
        for name in ("one", "other"):
            registry.push_image(name, "1", busybox(layers=[tar(file(f"etc/{name}", b"x"))]))
            names.append(f"{registry.address}/{name}:1")
        node.pull(*names)
        offered = []
        for number in range(4):
            registry.push_image(f"new{number}", "1", busybox(layers=[tar(file("etc/new", b"%d" % number))]))
            offered.append(f"{registry.address}/new{number}:1")
        for directory, _, files in os.walk(node.site.store):
            for name in ("", *files):
                os.chown(Path(directory) / name, OWNER, OWNER)
        node.site.policy_directory.mkdir(mode=0o755)
        (node.site.policy_directory / "10-soak.toml").write_text(_POLICIES[0])
        node.engine.stop()
        host.path(SOCKET).unlink()
        log = root / "unit.log"
        for unit in UNITS.iterdir():
            text = unit.read_text().replace(
                "/opt/hpcctr/bin/hpcctr engine serve", f"{HPCCTR} engine serve --site {node.site.file}"
            )
            systemd.write(unit.name, text)
        systemd.write(f"{SERVICE}.d/10-log.conf", f"[Service]\nStandardError=append:{log}\n")
        systemd.ctl("start", "hpcctr-engine.socket")
        yield Ground(node=node, systemd=systemd, users=made, images=names, registry=offered, log_file=log)


def soak(plan: Plan, on: Ground, *, tell: Any = None) -> Outcome:
    """Do it all; ``tell`` gets a line of text now and then."""
    outcome = Outcome(plan=plan)
    outcome.before = on.rest()
    before = Leftovers.of(on.node.host, on.node.containerd)
    begun = time.monotonic()
    is_over = threading.Event()
    drivers = [_driver(plan, on, number) for number in range(plan.users)]
    readers = [threading.Thread(target=_read, args=(driver, outcome)) for driver in drivers]
    disturber = threading.Thread(target=_disturb, args=(plan, on, outcome, is_over))
    for thread in (*readers, disturber):
        thread.start()
    step = max(1, plan.launches // 100)
    while any(reader.is_alive() for reader in readers):
        if time.monotonic() - begun > plan.seconds:
            for driver in drivers:
                assert driver.stdin is not None
                driver.stdin.close()
        count = len(outcome.ended)
        if not outcome.samples or count >= outcome.samples[-1].launches + step:
            sample = on.sample(count)
            if sample is not None:
                outcome.samples.append(sample)
                if tell is not None:
                    tell(f"{time.monotonic() - begun:.0f} s: {sample}, {dict(outcome.done)}")
        time.sleep(0.1)
    is_over.set()
    for thread in (*readers, disturber):
        thread.join()
    for driver in drivers:
        driver.wait(30)
    outcome.seconds = time.monotonic() - begun
    outcome.after = on.rest()
    outcome.left = _left(before)
    lines = on.log_file.read_text(errors="replace").splitlines()
    outcome.log_faults = tuple(
        line for line in lines if "Traceback" in line or re.match(r"\S*(Error|Exception)\b", line)
    )
    return outcome


def _driver(plan: Plan, on: Ground, number: int) -> subprocess.Popen[bytes]:
    user = on.users[number]
    # Slots and launches as even as they go.
    share = [plan.launches // plan.users + (number < plan.launches % plan.users)]
    share.append(plan.at_once // plan.users + (number < plan.at_once % plan.users))
    order = {
        "hpcctr": str(HPCCTR),
        "user": number,
        "seed": f"{plan.seed}/{number}",
        "launches": share[0],
        "at_once": share[1],
        "kinds": {kind: KINDS[kind] for kind in plan.kinds},
        "images": on.images,
        "registry": on.registry,
        "archive": f"oci-archive:{user.home}/own.tar",
        "killed": plan.killed,
        # About what a launch takes when so many are under way, so that kills come at all of its points.
        "longest": 0.1 + plan.at_once * 0.02,
        "deadline": plan.deadline,
    }
    code = Path(soak_user.__file__).read_text()
    driver = on.node.host.popen(
        ["/usr/bin/python3", "-IS", "-c", code],
        user=user,
        env=on.node.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert driver.stdin is not None
    driver.stdin.write(json.dumps(order).encode() + b"\n")
    driver.stdin.flush()
    return driver


def _read(driver: subprocess.Popen[bytes], outcome: Outcome) -> None:
    assert driver.stdout is not None
    for line in driver.stdout:
        outcome.ended.append(json.loads(line))


def _disturb(plan: Plan, on: Ground, outcome: Outcome, is_over: threading.Event) -> None:
    """Everything in an order and at counts of launches that the seed says, the last well before the end."""
    dice = random.Random(f"{plan.seed}/disturbances")
    names = [name for name in plan.disturbances for _ in range(plan.rounds)]
    dice.shuffle(names)
    points = sorted(dice.uniform(0.02, 0.8) * plan.launches for _ in names)
    for name, point in zip(names, points, strict=True):
        # What takes long puts off what comes after it, at worst until nothing is launched any more.
        while len(outcome.ended) < point and not is_over.wait(0.02):
            pass
        on.disturb(name, dice)
        outcome.done[name] += 1


def _left(before: Leftovers) -> tuple[str, ...]:
    """What does not go away by itself: what an engine could not remove at once it tries again after half a minute."""
    found: tuple[str, ...] = ()

    def nothing() -> bool:
        nonlocal found
        new = before.again().new_since(before)
        found = tuple(thing for thing in new if not any(word in thing for word in _RESTARTED))
        return not found

    with contextlib.suppress(AssertionError):
        wait_until(nothing, seconds=75)
    return found


def main(words: Sequence[str]) -> int:
    """The command line of scripts/soak: 0 when everything held."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--launches", type=int, default=Plan.launches)
    parser.add_argument("--users", type=int, default=Plan.users)
    parser.add_argument("--at-once", type=int, default=Plan.at_once)
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="no new launch after that")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--rounds", type=int, default=Plan.rounds, help="how often each disturbance comes; 0: none")
    parser.add_argument("--killed", type=float, default=Plan.killed, help="which part of the launches is killed")
    parser.add_argument("--disturb", choices=DISTURBANCES, action="append", help="only these")
    parser.add_argument("--only", choices=list(KINDS), action="append", help="only these launches")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--verbose", action="store_true")
    chosen = parser.parse_args(words)
    plan = Plan(
        launches=chosen.launches,
        users=chosen.users,
        at_once=chosen.at_once,
        seconds=chosen.seconds,
        seed=chosen.seed,
        rounds=chosen.rounds,
        killed=chosen.killed,
        disturbances=tuple(chosen.disturb or DISTURBANCES) if chosen.rounds else (),
        kinds=tuple(chosen.only or KINDS),
    )
    with ground(plan.users) as on:
        outcome = soak(plan, on, tell=(lambda text: print(text, file=sys.stderr)) if chosen.verbose else None)
        if chosen.verbose and outcome.faults():
            print(on.log_file.read_text()[-20000:], file=sys.stderr)
    summary = outcome.summary()
    if chosen.format == "json":
        print(json.dumps(summary, indent=1))
    else:
        for name, value in summary.items():
            if name != "faults":
                print(f"{name}: {value}")
        for fault in summary["faults"]:
            print(f"FAULT {fault}")
    return 1 if summary["faults"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
