"""A program started by hpcctr is the caller's own process, attribute by attribute, from deliberately odd callers.

docs/fidelity.md is written by this file: HPCCTR_WRITE=docs makes the last test write it instead of comparing.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Profile
from tests.support import fidelity
from tests.support.engine import HPCCTR
from tests.support.fidelity import Findings, NoReport, Place
from tests.support.node import Node, node
from tests.support.odd_caller import CALLERS
from tests.support.scratch import scratch
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]

REMEDY = "HPCCTR_WRITE=docs scripts/test tests/e2e/test_fidelity.py"
WRITE = os.environ.get("HPCCTR_WRITE") == "docs"
CASES = [(name, mode) for name, caller in CALLERS.items() for mode in caller.modes]
#: For the host whose making costs more: a caller of each kind.
OF_EACH_KIND = (
    "plain", "many", "limits", "real-time", "ignored", "pending", "held-descriptors", "closed-stdio",
    "controlling-terminal", "seccomp", "no-new-privs", "private-tmp", "hidepid", "cgroups", "namespaces", "long-words",
)  # fmt: skip


@pytest.fixture(scope="module")
def findings() -> Findings:
    return Findings()


@pytest.fixture(scope="module")
def forbidden() -> Iterator[Path]:
    """A file outside of everything the callers' Landlock rules allow."""
    with tempfile.NamedTemporaryFile(prefix="hpcctr-fidelity-", dir="/tmp") as file:
        os.chmod(file.name, 0o644)
        yield Path(file.name)


@pytest.fixture(scope="module")
def shared_place(shared_node: Node) -> Iterator[Place]:
    with scratch("fidelity") as directory, fidelity.place(directory, shared_node.host) as made:
        yield made


@pytest.fixture(scope="module")
def cgroup2_profiles(alice: User, busybox_image: str) -> Iterator[dict[str, Profile]]:
    """A host that shows cgroup version 2 only, with crun."""
    with scratch("cgroup2") as root, node(root, runtime="crun", cgroup2_only=True) as started:
        started.pull(busybox_image)
        users = {"gateway": alice, "direct": None}
        yield {mode: Profile(name=mode, node=started, user=user, image=busybox_image) for mode, user in users.items()}


@pytest.fixture(scope="module")
def cgroup2_place(cgroup2_profiles: dict[str, Profile]) -> Iterator[Place]:
    host = cgroup2_profiles["direct"].node.host
    with scratch("fidelity2") as directory, fidelity.place(directory, host) as made:
        yield made


def _compare(made: Place, profile: Profile, name: str, mode: str, forbidden: Path, findings: Findings) -> None:
    caller = CALLERS[name]
    if caller.landlock > fidelity.landlock_version():
        pytest.skip(f"the kernel's Landlock is older than version {caller.landlock}")
    held_before = dict(made.held)
    if caller.holds_descriptors and not made.held:
        fidelity.hold(made)
    elif not caller.holds_descriptors:
        made.held = {}
    hidden = ["mount", "-t", "proc", "-o", "hidepid=2", "proc", "/proc"]
    if caller.hides_processes:
        made.host.run(hidden)
    try:
        launcher = [str(HPCCTR), "run", profile.image, "--"]
        env = profile.node.environment()
        reports = []
        with fidelity.stdio(caller, made) as streams:
            for words in ([], launcher):
                if words and caller.stdio == "controlling terminal":
                    continue
                reports.append(
                    fidelity.report_of(
                        made, name, words, user=profile.user, streams=streams, env=env, forbidden=forbidden
                    )
                )
        if len(reports) == 1:
            with fidelity.stdio(caller, made) as streams:
                reports.append(
                    fidelity.report_of(
                        made, name, launcher, user=profile.user, streams=streams, env=env, forbidden=forbidden
                    )
                )
    except NoReport as refusal:
        slug = caller.refused.get(mode)
        assert slug is not None, refusal
        found = re.search(r"error\[([a-z-]+)\]", refusal.said)
        assert found is not None and found[1] == slug, refusal
        assert "\nhint: " in refusal.said
        findings.refused[name, mode] = slug
        return
    finally:
        if caller.hides_processes:
            made.host.run(["umount", "--lazy", "/proc"])
        if held_before:
            made.held = held_before
    assert mode not in caller.refused, "the launch was to be refused"
    native, inside = reports
    differed = fidelity.differences(native, inside, caller.new_each_time)
    assert fidelity.unexplained(differed, mode) == {}
    findings.differed |= {(attribute, mode) for attribute in differed}
    findings.equal.add((name, mode))
    if name == "plain":
        findings.attributes = tuple(fidelity.compared(native))


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_every_attribute_is_the_callers_or_has_a_reason(
    shared_place: Place,
    shared_node: Node,
    busybox: str,
    alice: User,
    name: str,
    mode: str,
    forbidden: Path,
    findings: Findings,
) -> None:
    user = {"gateway": alice, "direct": None}[mode]
    profile = Profile(name=mode, node=shared_node, user=user, image=busybox)
    _compare(shared_place, profile, name, mode, forbidden, findings)


@pytest.mark.parametrize(("name", "mode"), [case for case in CASES if case[0] in OF_EACH_KIND])
def test_the_same_with_crun_where_only_cgroup_version_2_is_mounted(
    cgroup2_place: Place,
    cgroup2_profiles: dict[str, Profile],
    name: str,
    mode: str,
    forbidden: Path,
) -> None:
    _compare(cgroup2_place, cgroup2_profiles[mode], name, mode, forbidden, Findings())


def test_the_probe_looks_at_more_than_200_attributes(findings: Findings) -> None:
    if not findings.attributes:
        pytest.skip("the plain caller has not run")
    assert len(findings.attributes) > 200


def test_the_document_is_what_was_found(findings: Findings) -> None:
    if not findings.is_complete():
        pytest.skip("not every caller has run in every mode")
    for reason in fidelity.REASONS:
        for mode in reason.modes:
            assert any(reason.explains(attribute, mode) for attribute, where in findings.differed if where == mode), (
                f"nothing differed for this reason in the mode {mode}: {reason}"
            )
    text = fidelity.document(findings)
    if WRITE:
        fidelity.DOCUMENT.write_text(text)
    assert fidelity.DOCUMENT.read_text() == text, f"write it with: {REMEDY}"
