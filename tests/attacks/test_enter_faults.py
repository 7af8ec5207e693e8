"""enter with every system call failing, or claiming a success it did not have, one after the other: either the launch
ends with an error of ours, or the command has everything that is promised.

The calls are those a launch makes, as a tracer of root's sees them; which ones they are is written down nowhere.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import enter
from tests.support.enter import ALICE, ROOT, World
from tests.support.inject import HUNG, Injector, Run, compiled
from tests.support.scratch import scratch

pytestmark = pytest.mark.root

ERRORS = (
    *(errno.EPERM, errno.ENOENT, errno.EINTR, errno.EIO, errno.E2BIG, errno.EBADF, errno.EAGAIN, errno.ENOMEM),
    *(errno.EACCES, errno.ENOTDIR, errno.EINVAL, errno.EMFILE, errno.ENOSPC, errno.ENOSYS, errno.ECONNRESET),
)

RAISED_FOR = {"open_tree", "mount_setattr", "setns", "unshare", "move_mount"}
"""The only calls a capability is effective for."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One kind of launch: its plan, and what the engine answers with."""

    argv: list[str | bytes]
    container: int
    refusal: int = 0


@dataclass(frozen=True, kw_only=True)
class Exemption:
    """What may differ after all, and why no harm comes of it."""

    call: str
    complaint: str
    why: str


UNNOTICED = [
    Exemption(
        call="fcntl",
        complaint="silent",
        why="2 is taken for closed, as the kernel says it is, so nothing is written there; the status tells",
    ),
    Exemption(call="write", complaint="silent", why="the error cannot be written; the status tells"),
]
"""Calls that fail."""

BELIEVED = [
    Exemption(
        call="chdir",
        complaint="directory",
        why="the command starts in the root of its view, where it may go anyway; asking where one is would ask a file "
        "server at every launch, about a lie only root can arrange",
    ),
    Exemption(call="write", complaint="silent", why="the error was written as far as the kernel says"),
]
"""Calls that claim success."""


@pytest.fixture(scope="module")
def tools() -> Iterator[Path]:
    with scratch("inject") as directory:
        for name in ("inject", "inside"):
            compiled(name, directory)
        yield directory


@pytest.fixture(scope="module")
def restricted_container(enter_world: World, tools: Path) -> Iterator[int]:
    """The view of a running program, as `hpcctr exec` is given it: complete, restricted, with a /proc."""
    prepare = (
        f"mkdir -p {enter_world.place}/rootfs/tools; mount --bind {tools} tools; mount -t proc proc proc; "
        "mount -o remount,bind,ro,nosuid,nodev ."
    )
    container = enter_world.build_container(prepare=prepare, mark_read_only=False)
    yield container
    os.close(container)


@pytest.fixture(params=["mounts", "no mounts", "missing command", "refusal"])
def scenario(request: pytest.FixtureRequest, world: World, tools: Path, restricted_container: int) -> Scenario:
    mounts = [(f"{tools}/.", "/mnt/one", "ro"), ("/dev/.", "/dev", "rw")]
    plan = world.plan(
        ["inside", "word"],
        mounts=mounts,
        cwd="/mnt/one",
        candidates=["/nowhere/inside", "/mnt/one/inside"],
        personality=0x0040000,
        pdeathsig=10,
    )
    if request.param == "mounts":
        return Scenario(argv=plan, container=world.container)
    if request.param == "refusal":
        return Scenario(argv=plan, container=world.container, refusal=126)
    if request.param == "missing command":
        argv = world.plan(["nowhere"], mounts=mounts, candidates=["/nowhere/a", "/bin/b"])
        return Scenario(argv=argv, container=world.container)
    numbers = plan[:5]
    return Scenario(
        argv=[*numbers, "0", "/tools", "1", "/tools/inside", "inside", "word"], container=restricted_container
    )


@pytest.fixture
def injector(scenario: Scenario, world: World, tools: Path) -> Iterator[Injector]:
    with Injector.start(
        world, tools, scenario.argv, account=ALICE, container=scenario.container, refusal=scenario.refusal
    ) as made:
        yield made


def complaint(clean: Run, run: Run) -> str:
    """What is wrong with this ending; empty for nothing. For a command that has other things than it should: the first
    words of the lines that differ."""
    if run.status == HUNG:
        return "hung"
    if run.status < 0:
        return f"signal {-run.status}"
    if run.ran:
        return ", ".join(sorted({line.split(" ")[0] for line in _facts(clean) ^ _facts(run)}))
    if run.status not in (125, 126, 127):
        return f"status {run.status}"
    if run.out:
        return "output"
    if not run.err:
        return "silent"
    is_an_error = run.err.startswith("hpcctr: error[") and run.err.count("\n") == 2 and "\nhint: " in run.err
    return "" if is_an_error else "no error of ours"


def _facts(run: Run) -> set[str]:
    return {f"where {run.where}", f"status {run.status}", *run.outside.splitlines(), *run.out.splitlines()}


def _require_just(found: dict[tuple[str, str], object], exemptions: list[Exemption], *calls: str) -> None:
    """Each of these calls of the table is still needed there, and nothing else was found."""
    needed = {(one.call, one.complaint) for one in exemptions if one.call in calls}
    assert {call for call, _ in needed} == set(calls)
    unknown = {key: value for key, value in found.items() if key not in needed}
    assert not unknown, unknown
    assert set(found) == needed, "an exemption is not needed any more"


def test_a_failing_system_call_ends_the_launch_or_changes_nothing(injector: Injector) -> None:
    clean = injector.run()
    assert len(clean.calls) > 20
    found: dict[tuple[str, str], object] = {}
    for call in clean.calls:
        for error in ERRORS:
            run = injector.run(call.place, -error)
            if said := complaint(clean, run):
                found[call.name, said] = (errno.errorcode[error], call, run)
    # A launch that succeeds writes nothing, so nothing can be missing.
    _require_just(found, UNNOTICED, *([] if clean.ran else ["fcntl", "write"]))


def test_a_system_call_that_claims_a_success_it_did_not_have_ends_the_launch_or_changes_nothing(
    injector: Injector,
) -> None:
    clean = injector.run()
    found: dict[tuple[str, str], object] = {}
    for call in clean.calls:
        run = injector.run(call.place, 0)
        if said := complaint(clean, run):
            found[call.name, said] = (call, run)
    _require_just(found, BELIEVED, "chdir" if clean.ran else "write")


def test_a_filter_that_answers_for_a_system_call_ends_the_launch_or_changes_nothing(injector: Injector) -> None:
    """All calls of one name, consistently, as a seccomp filter of root's does it."""
    clean = injector.run()
    # Who may not leave goes on trying.
    names = sorted({call.name for call in clean.calls} - {"exit_group"})
    found: dict[tuple[str, str], object] = {}
    for name in names:
        for value in (0, -errno.EPERM, -errno.ENOSYS, -errno.ENOENT, -errno.EINVAL):
            run = injector.run_without(name, value)
            if said := complaint(clean, run):
                found[name, said] = (value, run)
    _require_just(found, [*UNNOTICED, *BELIEVED], "fcntl", "chdir" if clean.ran else "write")


CHECKS = {"getresuid", "getresgid", "fstatfs", "statx", "capget", "getsockopt", "getpeername", "ioctl"}
"""Calls that only look: what they leave unwritten must not pass for what was looked for."""


def test_a_check_that_was_not_made_ends_the_launch(injector: Injector) -> None:
    """Also where the command would have been the same: the next caller's ids may differ."""
    clean = injector.run()
    checks = [call for call in clean.calls if call.name in CHECKS]
    assert {call.name for call in checks} >= {"getresuid", "getresgid", "fstatfs", "statx", "capget", "getsockopt"}
    for call in checks:
        run = injector.run(call.place, 0)
        assert not run.ran and run.status in (125, 126), (call, run)


def test_a_capability_is_effective_at_no_system_call_but_five(injector: Injector) -> None:
    """Looked up in /proc before and after each call; capset, which raises and lowers, is the only other one."""
    clean = injector.run()
    for call in clean.calls:
        if call.name == "capset":
            continue
        most = {"setns": 1 << 21 | 1 << 18}.get(call.name, 1 << 21) if call.name in RAISED_FOR else 0
        assert call.before & ~most == 0 and (call.after or 0) & ~most == 0, call
        assert call.name not in RAISED_FOR or call.before == most, call
    # Raised for one of the five, and lowered at once after it.
    names = [call.name for call in clean.calls]
    for number, call in enumerate(clean.calls):
        if call.name == "capset" and call.after:
            assert names[number + 1] in RAISED_FOR, call
        if call.name in RAISED_FOR:
            assert names[number + 1] in {"capset", "mount_setattr"}, call


def test_a_launch_with_mounts_raises_capabilities_for_all_of_the_five(world: World, tools: Path) -> None:
    """What the test before looks at is there."""
    argv = world.plan(["true"])
    with Injector.start(world, tools, argv, account=ALICE) as injector:
        names = {call.name for call in injector.run().calls if call.before}
    assert names == RAISED_FOR | {"capset"}


@pytest.mark.parametrize("account", [ALICE, ROOT], ids=["user", "root"])
def test_the_command_finds_no_capability_in_any_set_of_any_of_its_tasks(
    world: World, tools: Path, account: enter.Account
) -> None:
    argv = world.plan(["inside"], mounts=[(f"{tools}/.", "/mnt/one", "ro")], candidates=["/mnt/one/inside"])
    with Injector.start(world, tools, argv, account=account) as injector:
        run = injector.run()
    sets = [f"{name}:\t0000000000000000" for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")]
    assert run.outside.splitlines()[:5] == [*sets, "NoNewPrivs:\t1"]
    lines = run.out.splitlines()
    # Of the process and of its one task.
    assert [line for line in lines if line.startswith("status Cap")] == [f"status {line}" for line in [*sets, *sets]]
    assert lines.count("status NoNewPrivs:\t1") == 2
    assert lines.count("capabilities 0 0 0") == 2
    assert "ambient 0" in lines and "no_new_privs 1" in lines
