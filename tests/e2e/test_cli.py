"""The commands around run: what a person types, sees and scripts."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.e2e.conftest import Profile
from tests.support import images
from tests.support.engine import HPCCTR
from tests.support.node import Node
from tests.support.registry import Registry
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]


def _hpcctr(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [HPCCTR, *arguments],
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **environment},
        capture_output=True,
        text=True,
    )


def test_version_and_help_need_nothing() -> None:
    assert _hpcctr("--version").stdout.startswith("hpcctr 0.")
    commands = ("run", "exec", "pull", "images", "inspect", "rm", "ps", "doctor", "engine")
    text = _hpcctr("--help").stdout
    assert all(f"  {command} " in text for command in commands)
    for command in (*commands, "engine serve", "engine check", "engine install"):
        done = _hpcctr(*command.split(), "--help")
        assert done.returncode == 0 and "Usage: hpcctr" in done.stdout, command


def test_a_wrong_command_is_named() -> None:
    done = _hpcctr("rnu")
    assert done.returncode == 2
    assert "rnu" in done.stderr


def test_shells_complete_commands_and_options() -> None:
    done = _hpcctr(_HPCCTR_COMPLETE="complete_bash", COMP_WORDS="hpcctr ins", COMP_CWORD="1")
    assert done.stdout.split() == ["inspect"]
    done = _hpcctr(_HPCCTR_COMPLETE="complete_bash", COMP_WORDS="hpcctr run --cl", COMP_CWORD="2")
    assert done.stdout.split() == ["--clean-env"]


def test_an_image_of_a_registry_is_pulled_listed_inspected_run_and_removed(
    own_node: Node, alice: User, busybox_image: str
) -> None:
    with Registry.start(own_node.host.root / "registry") as served:
        images.push(busybox_image, f"{served.address}/tools/busybox:1.0")
        name = f"{served.address}/tools/busybox:1.0"
        done = own_node.hpcctr("pull", name)
        assert done.stdout.decode().strip() == name
        assert b"downloading" in done.stderr
        assert b"up to date" in own_node.hpcctr("pull", name).stderr
    # The registry is gone: a launch needs nothing but the store.
    assert own_node.run(name, "echo", "hello", user=alice).stdout == b"hello\n"
    (row,) = json.loads(own_node.hpcctr("images", "--format", "json", user=alice).stdout)
    assert (row["name"], row["platform"].split("/")[0]) == (name, "linux")
    assert name in own_node.hpcctr("images", user=alice).stdout.decode()
    facts = json.loads(own_node.hpcctr("inspect", name, "--format", "json", user=alice).stdout)
    assert facts["digest"] == row["digest"]
    assert facts["config"]["cmd"]
    assert row["digest"] in own_node.hpcctr("inspect", row["digest"][:20], user=alice).stdout.decode()
    assert own_node.run(row["digest"], "echo", "again", user=alice).stdout == b"again\n"
    refused = own_node.hpcctr("rm", name, user=alice, check=125).stderr
    assert b"error[image-not-in-store]" in refused and b"none of your own images" in refused
    assert name in own_node.hpcctr("rm", name).stdout.decode()
    assert json.loads(own_node.hpcctr("images", "--format", "json").stdout) == []
    assert not list((own_node.site.store / "images").iterdir())


def test_without_a_command_the_images_own_runs(gateway: Profile) -> None:
    done = gateway.node.hpcctr("run", gateway.image, user=gateway.user, input=b"echo from-stdin\n")
    assert b"from-stdin" in done.stdout
    done = gateway.node.hpcctr("run", "--entrypoint", "/bin/echo", gateway.image, "a", "b", user=gateway.user)
    assert done.stdout == b"a b\n"


def test_doctor_finds_a_working_node_and_says_what_is_wrong_with_another(gateway: Profile) -> None:
    for user in (gateway.user, None):
        done = gateway.node.hpcctr("doctor", user=user, check=False)
        text = done.stdout.decode()
        assert (done.returncode, "MISSING" in text) == (0, False), text
    findings = json.loads(gateway.node.hpcctr("doctor", "--format", "json").stdout)
    assert {"kernel", "enter", "engine", "containerd", "store"} <= {finding["thing"] for finding in findings}
    bare = gateway.node.host.run(
        [str(HPCCTR), "doctor"], user=gateway.user, env={"HPCCTR_SITE": "/dev/null"}, check=False
    ).stdout.decode()
    assert "MISSING store" in bare and "->" in bare


def test_doctor_notices_a_nosuid_filesystem(own_node_with_busybox: Profile) -> None:
    profile = own_node_with_busybox
    node = profile.node
    directory = node.host.root / "nosuid"
    directory.mkdir(mode=0o755)
    node.host.run(["mount", "-t", "tmpfs", "-o", "nosuid,mode=755", "tmpfs", str(directory)])
    text = node.site.file.read_text().replace(str(node.site.enter), f"{directory}/enter")
    node.site.file.write_text(text)
    done = node.hpcctr("engine", "install", "--site", str(node.site.file), check=125)
    assert b"nosuid" in done.stderr
    done = node.hpcctr("doctor", user=profile.user, check=1)
    assert "MISSING enter" in done.stdout.decode() and "nosuid" in done.stdout.decode()


def test_engine_check_reads_site_and_policy(gateway: Profile) -> None:
    done = gateway.node.hpcctr("engine", "check", str(gateway.node.site.file))
    assert b"shared-store" in done.stdout
    done = gateway.node.host.run([str(HPCCTR), "engine", "check", "/etc/passwd"], check=125)
    assert b"error[site-file]" in done.stderr


def test_the_engine_is_roots(gateway: Profile) -> None:
    done = gateway.node.hpcctr("engine", "serve", user=gateway.user, check=126)
    assert b"the engine runs as root" in done.stderr
