"""`hpcctr cleanup`: what a scheduler's epilog calls. A node whose linger is longer than any test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import fuse
from tests.support.engine import SOCKET
from tests.support.host import Host
from tests.support.job_cgroup import VERSIONS, JobCgroup, Version, has, job_cgroup
from tests.support.leftovers import Leftovers
from tests.support.node import Node, equipped, node
from tests.support.polling import wait_until
from tests.support.scratch import scratch
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]

#: Seconds that the command may take when something hangs, as its help says.
DEADLINE = 120
WAITING = ("sh", "-c", "echo; read line; sleep 600 & sleep 600 & echo; exec sleep 600")


@dataclass(frozen=True, kw_only=True)
class Program:
    """A running program in a container with two children of its own; all three in a job's cgroup where there is one."""

    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.process.pid

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def was_killed(self) -> bool:
        self.process.communicate(timeout=20)
        return self.process.returncode == -signal.SIGKILL

    def end(self) -> None:
        """Kill it and its children."""
        subprocess.run(["pkill", "-KILL", "--parent", str(self.pid)], check=False)
        self.process.kill()
        self.process.communicate()


def started(node: Node, image: str, user: User, *, cgroup: JobCgroup | None = None) -> Program:
    process = node.popen(
        "run", image, "--", *WAITING, user=user, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None and process.stdin is not None
    process.stdout.readline()
    if cgroup is not None:
        cgroup.take(process.pid)
    process.stdin.write(b"go\n")
    process.stdin.flush()
    process.stdout.readline()
    return Program(process=process)


def cleanup(node: Node, *arguments: str, check: int = 0) -> tuple[str, str]:
    """`hpcctr cleanup ARGUMENTS` as root: what it printed on stdout and stderr."""
    done = node.hpcctr("cleanup", *arguments, check=check, timeout=DEADLINE)
    return done.stdout.decode(), done.stderr.decode()


def report(node: Node, *arguments: str, check: int = 0) -> dict[str, Any]:
    """The same, as JSON."""
    answer: dict[str, Any] = json.loads(cleanup(node, *arguments, "--format", "json", check=check)[0])
    return answer


@pytest.fixture(scope="module")
def lingering() -> Iterator[Node]:
    with scratch("cleanup") as root, node(root, linger_seconds=3600) as made:
        yield made


@pytest.fixture(scope="module")
def image(lingering: Node, busybox_image: str) -> str:
    lingering.pull(busybox_image)
    return busybox_image


@pytest.fixture(autouse=True)
def leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    if "lingering" not in request.fixturenames:
        yield
        return
    made: Node = request.getfixturevalue("lingering")
    before = Leftovers.of(made.host, made.containerd)
    yield
    cleanup(made)

    def new() -> list[str]:
        # A test may have started the engine anew; and other tests may have a Slurm running.
        things = before.again().new_since(before)
        return [thing for thing in things if "engine serve" not in thing and "/slurm" not in thing]

    wait_until(lambda: not new(), seconds=15, what=lambda: f"the end of {new()}")


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> Version:
    chosen: Version = request.param
    if not has(chosen):
        pytest.skip(f"this machine shows no cgroup hierarchy of {chosen}")
    return chosen


def test_what_a_job_left_in_containers_is_killed_and_its_container_goes_at_once(
    lingering: Node, image: str, alice: User, version: Version
) -> None:
    with job_cgroup(alice, 4711, version=version) as cgroup:
        program = started(lingering, image, alice, cgroup=cgroup)
        done = report(lingering, "--job", "4711")
        assert {entry["name"] for entry in done["killed"]} == {"sleep"} and len(done["killed"]) == 3
        assert program.pid in {entry["pid"] for entry in done["killed"]}
        assert len(done["removed"]) == 1 and done["survivors"] == done["unfinished"] == done["notes"] == []
        assert program.was_killed()
        assert lingering.containerd.containers() == ()


def test_a_job_is_found_on_a_node_where_version_2_hides_version_1(place: Path, alice: User, busybox_image: str) -> None:
    with node(place, cgroup2_only=True, linger_seconds=3600) as made, job_cgroup(alice, 4719, version="v2") as cgroup:
        made.pull(busybox_image)
        program = started(made, busybox_image, alice, cgroup=cgroup)
        assert len(report(made, "--job", "4719")["killed"]) == 3
        assert program.was_killed() and made.containerd.containers() == ()


def test_done_once_more_it_does_and_prints_nothing(lingering: Node, image: str, alice: User) -> None:
    with job_cgroup(alice, 4712) as cgroup:
        program = started(lingering, image, alice, cgroup=cgroup)
        assert "killed pid" in cleanup(lingering, "--job", "4712")[0]
        assert program.was_killed()
        assert cleanup(lingering, "--job", "4712") == ("", "")
        assert cleanup(lingering) == ("", "")


def test_programs_of_other_jobs_and_users_go_on_in_their_containers(
    lingering: Node, image: str, alice: User, bob: User
) -> None:
    with job_cgroup(alice, 12) as cgroup, job_cgroup(alice, 120) as longer, job_cgroup(bob, 13) as bobs:
        victim = started(lingering, image, alice, cgroup=cgroup)
        others = [
            started(lingering, image, alice, cgroup=longer),
            started(lingering, image, bob, cgroup=bobs),
            started(lingering, image, alice),
        ]
        # Of the job as well, but in no container: the second in a mount namespace of its own, copied from the node's.
        natives = [
            lingering.host.popen(words, user=alice) for words in (["sleep", "600"], ["unshare", "-Urm", "sleep", "600"])
        ]
        for native in natives:
            cgroup.take(native.pid)
        containers = lingering.containerd.containers()
        done = report(lingering, "--job", "12")
        assert len(done["killed"]) == 3 and done["removed"] == []
        assert victim.was_killed()
        assert all(other.is_alive() for other in others)
        assert [native.poll() for native in natives] == [None, None]
        assert lingering.containerd.containers() == containers
        for other in others:
            other.end()
        for native in natives:
            native.kill()


def test_a_stopped_program_of_the_job_is_killed(lingering: Node, image: str, alice: User) -> None:
    with job_cgroup(alice, 4713) as cgroup:
        program = started(lingering, image, alice, cgroup=cgroup)
        os.kill(program.pid, signal.SIGSTOP)
        assert len(report(lingering, "--job", "4713")["killed"]) == 3
        assert program.was_killed()


def test_programs_that_only_live_to_start_the_next_are_killed(lingering: Node, image: str, alice: User) -> None:
    script = "echo; read line; hop() { sleep 0.01; hop & }; for chain in 1 2 3 4 5; do hop & done"
    process = lingering.popen(
        "run", image, "--", "sh", "-c", script, user=alice, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    with job_cgroup(alice, 4714) as cgroup:
        cgroup.take(process.pid)
        process.stdout.close()
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.close()
        process.wait(10)
        assert len(report(lingering, "--job", "4714")["killed"]) >= 5
        assert (cgroup.directory / "cgroup.procs").read_text() == ""


def test_without_a_job_every_container_nobody_uses_goes(lingering: Node, image: str, alice: User, bob: User) -> None:
    lingering.run(image, "true", user=alice)
    lingering.run(image, "true", user=bob)
    program = started(lingering, image, alice)
    assert len(lingering.containerd.containers()) == 2
    output, _ = cleanup(lingering)
    assert output.startswith("removed container ") and output.count("\n") == 1
    assert len(lingering.containerd.containers()) == 1
    program.end()
    cleanup(lingering)
    assert lingering.containerd.containers() == ()


def test_what_a_program_left_in_the_background_keeps_its_container(lingering: Node, image: str, alice: User) -> None:
    lingering.run(image, "sh", "-c", "sleep 600 > /dev/null 2>&1 &", user=alice)
    (sleeping,) = [process for process in lingering.host.processes() if process.command == "sleep 600"]
    assert cleanup(lingering) == ("", "")
    assert len(lingering.containerd.containers()) == 1
    os.kill(sleeping.pid, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{sleeping.pid}/exe").exists(), what="its end")
    assert "removed container" in cleanup(lingering)[0]


def test_launches_at_the_same_time_do_not_notice(lingering: Node, image: str, alice: User) -> None:
    running = [lingering.popen("run", image, "--", "sleep", "0.2", user=alice) for _ in range(12)]
    while any(process.poll() is None for process in running):
        cleanup(lingering)
    assert {process.returncode for process in running} == {0}


def test_an_ordinary_user_is_refused_and_nothing_happens(lingering: Node, image: str, alice: User) -> None:
    lingering.run(image, "true", user=alice)
    done = lingering.hpcctr("cleanup", user=alice, check=126)
    assert done.stderr.startswith(b"hpcctr: error[caller-refused]: cleanup is for root\nhint: ")
    assert len(lingering.containerd.containers()) == 1


@pytest.mark.parametrize("word", ["0", "-1", "12.batch", "12_3", "job_12", "", "99999999999", "１２"])
def test_what_is_no_jobs_number_is_refused(lingering: Node, word: str) -> None:
    assert "error[usage]" in cleanup(lingering, f"--job={word}", check=125)[1]


def test_without_an_engine_it_does_what_the_next_one_would(lingering: Node, image: str, alice: User, bob: User) -> None:
    with job_cgroup(alice, 4715) as cgroup:
        victim = started(lingering, image, alice, cgroup=cgroup)
        other = started(lingering, image, bob)
        lingering.engine.stop(kill=True)
        done = report(lingering, "--job", "4715")
        assert len(done["killed"]) == 3 and len(done["removed"]) == 1
        assert len(done["notes"]) == 1 and done["notes"][0].endswith("; cleaned up in its place")
        assert victim.was_killed() and other.is_alive()
        assert len(lingering.containerd.containers()) == 1
        lingering.host.path(SOCKET).unlink()
        lingering.engine.restart()
        containers = lingering.containerd.containers()
        lingering.run(image, "true", user=bob)
        assert lingering.containerd.containers() == containers
        other.end()


def test_without_engine_and_containerd_the_job_is_ended_all_the_same(
    place: Path, alice: User, busybox_image: str
) -> None:
    with node(place, linger_seconds=3600) as made, job_cgroup(alice, 4716) as cgroup:
        made.pull(busybox_image)
        program = started(made, busybox_image, alice, cgroup=cgroup)
        made.engine.stop(kill=True)
        made.containerd.process.kill()
        made.containerd.process.wait()
        done = report(made, "--job", "4716")
        assert program.was_killed() and len(done["killed"]) == 3
        assert "no engine answers" in done["notes"][0] and "containerd" in done["notes"][0]
        made.containerd.restart(kill=True)


@pytest.fixture
def silent_store(place: Path, busybox_image: str) -> Iterator[tuple[Node, fuse.FileServer, str]]:
    """A node whose store is on a file server that can fall silent."""
    disk, store = place / "disk", place / "store"
    with Host.start(place) as host, equipped(host, store=store, linger_seconds=3600) as made:
        made.pull(busybox_image)
        store.rename(disk)
        store.mkdir()
        with fuse.served(host, disk, store) as server:
            yield made, server, busybox_image


def test_a_program_that_waits_for_a_silent_file_server_is_named_and_nothing_hangs(
    silent_store: tuple[Node, fuse.FileServer, str], alice: User
) -> None:
    made, server, image = silent_store
    with job_cgroup(alice, 4717) as cgroup:
        stuck = started(made, image, alice, cgroup=cgroup)
        begun = time.monotonic()
        process = made.popen(
            "run", image, "--", "sh", "-c", "echo; read line; exec cat /bin/busybox", user=alice,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        cgroup.take(process.pid)
        server.fall_silent()
        # What is in memory needs no server: the image's own pages go first.
        Path("/proc/sys/vm/drop_caches").write_text("3")
        process.stdin.write(b"go\n")
        process.stdin.flush()
        wait_until(lambda: _state(process.pid) == "D", what=lambda: f"D, not {_state(process.pid)}")
        done = made.hpcctr("cleanup", "--job", "4717", check=125, timeout=DEADLINE)
        assert (
            f"error[job-survives]: of job 4717 still alive after SIGKILL: pid {process.pid} (".encode() in done.stderr
        )
        assert time.monotonic() - begun < DEADLINE
        server.answer()
        process.communicate()
        stuck.process.communicate()
        assert cleanup(made, "--job", "4717")[1] == ""
        wait_until(lambda: made.containerd.containers() == (), what="the end of the container")


def test_a_container_on_a_silent_file_server_does_not_keep_cleanup(
    silent_store: tuple[Node, fuse.FileServer, str], alice: User, bob: User
) -> None:
    made, server, image = silent_store
    made.run(image, "true", user=alice)
    made.run(image, "true", user=bob)
    server.fall_silent()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    begun = time.monotonic()
    done = report(made, "--job", "4718")
    assert time.monotonic() - begun < DEADLINE
    assert len(done["removed"]) + len(done["unfinished"]) == 2 and done["survivors"] == []
    server.answer()
    wait_until(lambda: made.containerd.containers() == (), seconds=60, what="the end of the containers")
    assert made.run(image, "echo", "again", user=alice).stdout == b"again\n"


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
