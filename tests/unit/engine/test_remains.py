"""Nothing but what carries a container's random id is touched; the rest is in tests/e2e/test_interrupted.py."""

from __future__ import annotations

import secrets
import subprocess
from pathlib import Path

import pytest

from hpcctr.engine.remains import _kill_if, clear_remains

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


def test_a_set_user_id_program_of_a_users_is_no_shim(tmp_path: Path) -> None:
    """Its user gives it the command line; its files in /proc are its effective user's, who is root."""
    program = tmp_path / "python3"
    program.write_bytes(Path("/usr/bin/python3").resolve().read_bytes())
    program.chmod(0o4755)
    for parent in [tmp_path, *tmp_path.parents]:
        if parent.stat().st_uid == 0 and parent != Path("/") and parent != Path("/tmp"):
            parent.chmod(0o755)
    container_id = _id()
    code = "import sys; print(flush=True); sys.stdin.read()"
    argv = ["containerd-shim-test", "-IS", "-c", code, "-namespace", "hpcctr", "-id", container_id]
    with subprocess.Popen(
        argv,
        executable=str(program),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        user=61237,
        group=61237,
        extra_groups=(),
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        assert Path(f"/proc/{process.pid}").stat().st_uid == 0
        clear_remains(container_id, runtime="runc")
        assert process.poll() is None
        process.communicate()
        assert process.returncode == 0


def test_a_number_that_changes_hands_while_it_is_looked_at_kills_nobody() -> None:
    for _ in range(50):
        victim = subprocess.Popen(["sleep", "60"])
        successors: list[subprocess.Popen[bytes]] = []

        def look(
            pid: int,
            victim: subprocess.Popen[bytes] = victim,
            successors: list[subprocess.Popen[bytes]] = successors,
        ) -> bool:
            # The worst moment: all that was read was right, and then it is somebody else.
            victim.kill()
            victim.wait()
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
            successors.append(subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            return True

        _kill_if(victim.pid, look)
        (successor,) = successors
        is_same_number = successor.pid == victim.pid
        is_alive = successor.communicate(b"alive")[0] == b"alive"
        if is_same_number:
            assert is_alive
            return
    pytest.fail("no process could be given the number of another")


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
