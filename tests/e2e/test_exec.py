"""``hpcctr exec``: another program where a running one is."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import Profile
from tests.support.leftovers import Leftovers, require_nothing_new
from tests.support.polling import wait_until

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.usefixtures("module_leaves_nothing")]


def _pid(process: subprocess.Popen[bytes], said: str) -> int:
    """The program's own pid, which it has printed: root's hpcctr is its parent."""
    assert process.poll() is None
    return int(said)


def _exec(profile: Profile, pid: int, *command: str, flags: tuple[str, ...] = (), **options: object) -> str:
    done = profile.node.hpcctr("exec", *flags, str(pid), "--", *command, user=profile.user, **options)  # type: ignore[arg-type]
    return done.stdout.decode(errors="surrogateescape")


def _refusal(profile: Profile, *arguments: str, status: int = 126) -> str:
    done = profile.node.hpcctr("exec", *arguments, user=profile.user, check=status)
    assert done.stdout == b""
    return done.stderr.decode()


WAITING = ("sh", "-c", "echo $$; exec cat")


def test_the_command_sees_the_same_files_and_the_same_mounts(profile: Profile, place: Path) -> None:
    (place / "data").mkdir()
    (place / "data/mine").write_text("x")
    process, said = profile.start(*WAITING, flags=["-v", f"{place}/data:/data:ro"])
    pid = _pid(process, said)

    def table(text: str) -> list[list[str]]:
        # Without the numbers of mounts and peer groups.
        return sorted([line.split()[2:6] + line.split(" - ")[1].split() for line in text.splitlines()])

    assert _exec(profile, pid, "cat", "/data/mine") == "x"
    assert table(_exec(profile, pid, "cat", "/proc/self/mountinfo")) == table(
        Path(f"/proc/{pid}/mountinfo").read_text()
    )
    assert "Read-only" in profile.node.hpcctr(
        "exec", str(pid), "--", "touch", "/data/new", user=profile.user, check=1
    ).stderr.decode(errors="replace")
    process.communicate()


def test_the_command_is_the_callers_own_process(gateway: Profile) -> None:
    process, said = gateway.start(*WAITING)
    joined = gateway.node.popen(
        "exec", said, "--", *WAITING, user=gateway.user, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert joined.stdout is not None
    assert int(joined.stdout.readline()) == joined.pid
    assert os.readlink(f"/proc/{joined.pid}/exe") == "/bin/busybox"
    probe = "id; grep -E '^(Cap|NoNew|Sig|Groups)' /proc/self/status; cat /proc/self/cgroup /proc/self/limits; umask"
    assert _exec(gateway, int(said), "sh", "-c", probe) == gateway.output("sh", "-c", probe)
    joined.communicate()
    process.communicate()


def test_the_command_joins_a_child_of_the_program_as_well(profile: Profile) -> None:
    process, said = profile.start("sh", "-c", "sleep 60 & echo $!; cat; kill %1")
    assert "sleep" in _exec(profile, int(said), "cat", f"/proc/{said}/cmdline")
    process.communicate()


def test_it_starts_where_the_program_stands(profile: Profile) -> None:
    process, said = profile.start("sh", "-c", "cd /srv && echo $$ && exec cat")
    pid = _pid(process, said)
    assert _exec(profile, pid, "pwd") == "/srv\n"
    assert _exec(profile, pid, "pwd", flags=("-w", "/etc")) == "/etc\n"
    assert "error[cwd]" in _refusal(profile, "-w", "/nowhere", said, "pwd", status=125)
    assert "error[usage]" in _refusal(profile, "-w", "etc", said, "pwd", status=125)
    process.communicate()


def test_it_starts_at_the_root_where_the_programs_directory_has_gone(gateway: Profile) -> None:
    script = "mkdir here && cd here && rmdir ../here && echo $$ && exec cat"
    process, said = gateway.start("sh", "-c", script)
    assert _exec(gateway, int(said), "pwd") == "/\n"
    process.communicate()


def test_the_environment_is_the_callers_by_the_rules_of_run(profile: Profile) -> None:
    process, said = profile.start("sh", "-c", "export THEIRS=1; echo $$; exec cat")
    pid = _pid(process, said)
    extra = {"MINE": "1", "LD_LIBRARY_PATH": "/host"}

    def environment(text: str) -> set[str]:
        return {line for line in text.splitlines() if not line.startswith(("SHLVL=", "PWD=", "OLDPWD="))}

    inside = environment(_exec(profile, pid, "env", env=extra))
    assert inside == environment(profile.output("env", env=extra))
    assert "MINE=1" in inside and "THEIRS=1" not in inside
    clean = environment(_exec(profile, pid, "env", flags=("--clean-env", "-e", "A=b"), env=extra))
    assert clean == environment(profile.output("env", flags=["--clean-env", "-e", "A=b"], env=extra))
    process.communicate()


def test_a_directory_variable_counts_when_its_directory_is_in_the_programs_view(gateway: Profile, place: Path) -> None:
    (place / "tmp").mkdir(mode=0o755)
    process, said = gateway.start(*WAITING)
    assert "TMPDIR" not in _exec(gateway, int(said), "env", env={"TMPDIR": f"{place}/tmp"})
    process.communicate()
    process, said = gateway.start(*WAITING, flags=["-v", f"{place}/tmp"])
    assert f"TMPDIR={place}/tmp\n" in _exec(gateway, int(said), "env", env={"TMPDIR": f"{place}/tmp"})
    process.communicate()


def test_the_exit_status_and_signals_are_the_commands(profile: Profile) -> None:
    process, said = profile.start(*WAITING)
    profile.node.hpcctr("exec", said, "--", "sh", "-c", "exit 42", user=profile.user, check=42)
    profile.node.hpcctr("exec", said, "--", "sh", "-c", "kill -9 $$", user=profile.user, check=-signal.SIGKILL)
    assert "error[command-not-found]" in _refusal(profile, said, "no-such", status=127)
    process.communicate()


def test_options_end_at_the_pid_and_words_are_bytes(profile: Profile) -> None:
    process, said = profile.start(*WAITING)
    assert profile.node.hpcctr("exec", said, "echo", "-e", "a", "--", user=profile.user).stdout == b"a --\n"
    assert _exec(profile, int(said), "echo", "\udcff", "") == "\udcff \n"
    process.communicate()


def test_what_cannot_be_a_target_is_named(profile: Profile) -> None:
    assert "error[usage]: exec x: not a process id" in _refusal(profile, "x", "--", "true", status=125)
    assert "error[no-command]" in _refusal(profile, "1", status=125)
    text = _refusal(profile, "4194304", "--", "true")
    assert "error[not-your-program]: pid 4194304 is not a living process of yours\nhint: hpcctr ps\n" in text
    native = profile.node.host.popen(["cat"], user=profile.user, stdin=subprocess.PIPE)
    wait_until(lambda: os.readlink(f"/proc/{native.pid}/exe").endswith("cat"))
    assert "it is in no container" in _refusal(profile, str(native.pid), "--", "true")
    native.communicate()


def test_what_joined_keeps_the_container_and_outlives_the_program(own_node_with_busybox: Profile) -> None:
    profile = own_node_with_busybox
    node = profile.node
    before = Leftovers.of(node.host, node.containerd)
    process, said = profile.start(*WAITING)
    joined = node.popen(
        "exec", said, "--", "sh", "-c", "echo; cat; ls /srv", user=profile.user,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert joined.stdout is not None
    joined.stdout.readline()
    containers = node.containerd.containers()
    process.communicate()
    # Longer than the linger of one second: whoever looks for the container then finds it in use.
    quiet = node.host.popen(["sleep", "2.5"])
    quiet.wait()
    assert node.containerd.containers() == containers
    assert _exec(profile, joined.pid, "echo", "here") == "here\n"
    joined.communicate(b"")
    assert joined.returncode == 0
    require_nothing_new(before)


def test_a_background_process_keeps_the_container_and_can_be_joined(own_node_with_busybox: Profile) -> None:
    profile = own_node_with_busybox
    node = profile.node
    before = Leftovers.of(node.host, node.containerd)
    said = profile.output("sh", "-c", "setsid sleep 60 >/dev/null 2>&1 & echo $!")
    containers = node.containerd.containers()
    node.host.popen(["sleep", "2.5"]).wait()
    assert node.containerd.containers() == containers
    assert "sleep" in _exec(profile, int(said), "cat", f"/proc/{int(said)}/cmdline")
    node.host.run(["kill", said.strip()], user=profile.user)
    require_nothing_new(before)


def test_a_restarted_engine_lets_programs_of_before_be_joined(own_node_with_busybox: Profile) -> None:
    profile = own_node_with_busybox
    process, said = profile.start(*WAITING)
    profile.node.engine.restart(kill=True)
    assert _exec(profile, int(said), "cat", "/etc/os-release") == "NAME=busybox\n"
    process.communicate()


def test_policy_decides_again_and_about_the_name_the_program_was_started_by(own_node_with_busybox: Profile) -> None:
    node = own_node_with_busybox.node
    node.hpcctr("pull", "--name", "local/tools:1", own_node_with_busybox.image)
    profile = Profile(name="tools", node=node, user=own_node_with_busybox.user, image="local/tools:1")
    rules = node.site.policy_directory
    rules.mkdir(mode=0o755)
    (rules / "10.toml").write_text('[[rule]]\nname = "tools"\naction = "allow"\nimages = ["*local/tools:*"]\n')
    process, said = profile.start(*WAITING)
    assert _exec(profile, int(said), "echo", "allowed") == "allowed\n"
    (rules / "05.toml").write_text('[[rule]]\nname = "closed"\naction = "deny"\n')
    assert 'denied by 05.toml, rule "closed"' in _refusal(profile, said, "--", "true")
    process.communicate()


def test_every_decision_is_in_the_log(own_node_with_busybox: Profile) -> None:
    profile = own_node_with_busybox
    process, said = profile.start(*WAITING)
    (container,) = profile.node.containerd.containers()
    _exec(profile, int(said), "true")
    lines = [line for line in profile.node.engine.log().splitlines() if f" container={container[:32]} " in line]
    assert [line.split()[1] for line in lines] == ["granted", "joined"]
    process.communicate()
