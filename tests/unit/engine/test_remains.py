"""Nothing but what carries a container's random id is touched; the rest is in tests/e2e/test_interrupted.py."""

from __future__ import annotations

import secrets
import subprocess
from pathlib import Path

import pytest

from hpcctr.engine.remains import clear_remains

pytestmark = pytest.mark.root


def _id() -> str:
    return f"{secrets.token_hex(16)}-{secrets.token_hex(4)}"


def _shim(container_id: str, *prefix: str) -> subprocess.Popen[bytes]:
    """A process whose command line is a shim's, and which waits for the end of its input."""
    argv = ["bash", "-c", 'exec -a /usr/bin/containerd-shim-test bash -c "echo; read line" -- "$@"', "sh"]
    process = subprocess.Popen(
        [*prefix, *argv, "-namespace", "hpcctr", "-id", container_id], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_what_does_not_exist_is_fine() -> None:
    clear_remains(_id(), runtime="runc")
    clear_remains(_id(), runtime="no-such-runtime")


def test_cgroups_of_an_anchor_go_with_what_is_in_them() -> None:
    container_id = _id()
    hierarchies = [
        line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - cgroup" in line
    ]
    made = [Path(f"{directory}/hpcctr-{container_id}") for directory in hierarchies]
    other = [Path(f"{directory}/hpcctr-{_id()}") for directory in hierarchies]
    created = []
    for directory in (*made, *other):
        try:
            directory.mkdir()
        except OSError:
            continue
        created.append(directory)
    assert created
    with subprocess.Popen(["sleep", "60"]) as process:
        writable = next(directory for directory in created if directory in made and "cpuset" not in str(directory))
        (writable / "cgroup.procs").write_text(str(process.pid))
        clear_remains(container_id, runtime="runc")
        assert process.wait(10) == -9
    assert not [directory for directory in made if directory.exists()]
    for directory in other:
        if directory in created:
            directory.rmdir()


def test_a_shim_is_roots_and_of_this_container() -> None:
    container_id = _id()
    mine, other = _shim(container_id), _shim(_id())
    users = _shim(container_id, "setpriv", "--reuid=61237", "--regid=61237", "--clear-groups")
    clear_remains(container_id, runtime="runc")
    assert mine.wait(10) == -9
    mine.communicate()
    for process in (other, users):
        assert process.poll() is None
        process.communicate()
