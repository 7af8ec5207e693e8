"""The program is the caller's own process: who, where, and everything a fork hands down."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import Profile
from tests.support.engine import HPCCTR
from tests.support.polling import wait_until

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.usefixtures("module_leaves_nothing")]


def test_identity_and_groups_are_the_callers(profile: Profile) -> None:
    script = "id -u; id -g; id -G; grep -E '^(Uid|Gid|Groups)' /proc/self/status"
    assert profile.output("sh", "-c", script) == profile.native("sh", "-c", script)


def test_the_callers_names_are_known_inside(gateway: Profile) -> None:
    assert gateway.user is not None
    assert gateway.output("id", "-un") == f"{gateway.user.name}\n"
    groups = gateway.output("id", "-Gn").split()
    assert {"hpcctr-project", "hpcctr-render", gateway.user.name} <= set(groups)


def test_the_programs_pid_is_the_pid_of_hpcctr(gateway: Profile) -> None:
    process, said = gateway.start("sh", "-c", "echo $$; exec cat")
    assert int(said) == process.pid
    # The very same process, seen from outside: our child, with the image as its root.
    assert os.readlink(f"/proc/{process.pid}/exe") == "/bin/busybox"
    assert int(Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[1]) == os.getpid()
    process.communicate()


def test_no_capability_and_no_new_privs(profile: Profile) -> None:
    status = profile.output("sh", "-c", "grep -E '^(CapInh|CapPrm|CapEff|CapAmb|NoNewPrivs)' /proc/self/status")
    assert [line.split()[1] for line in status.splitlines()] == ["0" * 16] * 4 + ["1"]


def test_the_images_user_is_nobodys_business(profile: Profile) -> None:
    assert profile.output("id", "-u") == f"{profile.uid}\n"


def test_cgroups_are_the_callers(profile: Profile) -> None:
    assert profile.output("cat", "/proc/self/cgroup") == profile.native("cat", "/proc/self/cgroup")


def test_namespaces_but_the_mount_namespace_are_the_callers(profile: Profile) -> None:
    script = "for n in cgroup ipc net pid time user uts; do readlink /proc/self/ns/$n; done"
    assert profile.output("sh", "-c", script) == profile.native("sh", "-c", script)
    assert profile.output("readlink", "/proc/self/ns/mnt") != profile.native("readlink", "/proc/self/ns/mnt")


LIMITED = (
    "ulimit -n 200; ulimit -c 0; ulimit -s 4096; umask 027; "
    'exec nice -n 5 taskset -c 0 setpriv --pdeathsig USR1 setarch --addr-no-randomize "$@"'
)


def test_limits_umask_niceness_affinity_personality_and_death_signal_are_the_callers(gateway: Profile) -> None:
    probe = (
        "cat /proc/self/limits; umask; grep Cpus_allowed_list /proc/self/status; cat /proc/self/personality;"
        "cut -d' ' -f19 /proc/self/stat"
    )
    inside = gateway.node.host.run(
        ["sh", "-c", LIMITED, "sh", str(HPCCTR), "run", gateway.image, "--", "sh", "-c", probe],
        user=gateway.user,
        env=gateway.node.environment(),
    )
    outside = gateway.node.host.run(["sh", "-c", LIMITED, "sh", "sh", "-c", probe], user=gateway.user)
    assert inside.stdout == outside.stdout
    assert b"0040000" in inside.stdout


def test_signals_python_ignores_have_their_default_action(profile: Profile) -> None:
    def signals(status: str) -> list[str]:
        return [line for line in status.splitlines() if line.startswith(("SigIgn", "SigBlk", "SigCgt"))]

    assert signals(profile.output("cat", "/proc/self/status")) == signals(profile.native("cat", "/proc/self/status"))


def test_descriptors_are_handed_down_and_no_other_is_open(gateway: Profile, place: Path) -> None:
    (place / "file").write_text("0123456789")
    with (place / "file").open("rb") as file:
        number = file.fileno()
        os.lseek(number, 4, os.SEEK_SET)
        read = gateway.output("sh", "-c", f"head -c 3 <&{number}", pass_fds=[number])
        assert read == "456"
        inside = gateway.output("ls", "/proc/self/fd", pass_fds=[number])
        outside = gateway.native("ls", "/proc/self/fd", pass_fds=[number])
    assert str(number) in inside.split()
    assert inside == outside


def test_arguments_and_environment_are_bytes(gateway: Profile) -> None:
    words = [b"\xff\xfe", b"", b"a b", b"\n", b"--", b"-v"]
    argv = [
        os.fsencode(HPCCTR),
        b"run",
        os.fsencode(gateway.image),
        b"--",
        b"sh",
        b"-c",
        b'printf "%s|" "$@"; printf %s "$MINE"',
        b"sh",
        *words,
    ]
    user = gateway.user
    assert user is not None
    done = subprocess.run(
        [*map(os.fsencode, gateway.node.host.argv([], user=user)), *argv],
        env={b"PATH": b"/usr/bin:/bin", b"HOME": os.fsencode(user.home), b"MINE": b"\xfd=\x01"},
        stdout=subprocess.PIPE,
        check=True,
    )
    assert done.stdout == b"|".join(words) + b"|" + b"\xfd=\x01"


def test_a_long_command_line_arrives(gateway: Profile) -> None:
    words = [str(number) * 20 for number in range(10000)]
    assert gateway.output("sh", "-c", 'echo $#; echo "$10000"', "sh", *words).startswith("10000\n")


def test_the_exit_status_is_the_programs(profile: Profile) -> None:
    for status in (0, 1, 42, 125, 255):
        profile.run("sh", "-c", f"exit {status}", check=status)


def test_death_by_signal_is_death_by_signal(profile: Profile) -> None:
    for number in (9, 15, 6):
        profile.run("sh", "-c", f"kill -{number} $$", check=-number)


def test_a_signal_to_hpcctr_reaches_the_program(profile: Profile) -> None:
    script = "trap 'echo got; exit 7' TERM; echo ready; while :; do sleep 0.1; done"
    process, _ = profile.start("sh", "-c", script)
    process.terminate()
    assert process.communicate(timeout=20)[0] == b"got\n"
    assert process.returncode == 7


def test_engine_and_containerd_may_go_while_programs_run(own_node_with_busybox: Profile) -> None:
    profile = own_node_with_busybox
    process, _ = profile.start("sh", "-c", "echo ready; cat; ls /bin/sh")
    profile.node.engine.restart(kill=True)
    profile.node.containerd.restart(kill=True)
    output, _ = process.communicate(b"x\n", timeout=20)
    assert output == b"x\n/bin/sh\n"
    assert process.returncode == 0


def test_nothing_of_hpcctr_stays_between_caller_and_program(gateway: Profile) -> None:
    process, _ = gateway.start()
    wait_until(lambda: os.readlink(f"/proc/{process.pid}/exe") == "/bin/busybox")
    assert Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text() == ""
    assert len(list(Path(f"/proc/{process.pid}/task").iterdir())) == 1
    process.communicate()
