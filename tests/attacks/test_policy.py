"""Attacks on policy: by what a user can put where rules lie, and by what else an image or a place may be called."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import hpcctr
from hpcctr.image.store import Store
from tests.support.node import Node, node
from tests.support.oci import busybox, file, tar, write_layout, write_oci_archive
from tests.support.scratch import scratch
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]

OWNER = 61906
APP, NIGHTLY, ELSEWHERE = "docker.io/library/app:1", "docker.io/library/app:nightly", "quay.io/org/tool:1"
OPEN = '[[rule]]\nname = "open"\naction = "allow"\n'
NO_NIGHTLIES = '[[rule]]\nname = "no-nightlies"\naction = "deny"\nimages = ["*:nightly"]\n'


@pytest.fixture(scope="module")
def attacked(busybox_image: str) -> Iterator[Node]:
    """A node with three images, of which policy will deny one."""
    with scratch("attacked") as place, node(place) as started:
        started.hpcctr("pull", "--name", APP, busybox_image)
        for name in (NIGHTLY, ELSEWHERE):
            layout = write_layout(
                place / name.rpartition("/")[2].replace(":", "."),
                busybox(layers=[tar(file("etc/name", name.encode()))]),
            )
            started.hpcctr("pull", "--name", name, f"oci:{layout}")
        subprocess.run(["chown", "-R", f"{OWNER}:{OWNER}", started.site.store], check=True)
        started.site.policy_directory.mkdir(mode=0o755)
        yield started


@pytest.fixture
def rules(attacked: Node) -> Iterator[Path]:
    """The policy directory with one file that allows everything; as it was, afterwards."""
    directory = attacked.site.policy_directory
    (directory / "10.toml").write_text(OPEN)
    yield directory
    os.chown(directory, 0, 0)
    directory.chmod(0o755)
    for path in directory.iterdir():
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def _refused(on: Node, user: User, image: str, *flags: str, status: int = 126) -> str:
    done = on.run(image, "true", user=user, flags=flags, check=status, timeout=20)
    assert done.stdout == b""
    return done.stderr.decode()


def _digest(on: Node, name: str) -> str:
    return Store.open(str(on.site.store)).find(name).record.digest


# Where rules lie.


def _users_file(directory: Path, user: User) -> None:
    (directory / "00.toml").write_text(OPEN)
    os.chown(directory / "00.toml", user.uid, user.gid)


def _group_writable(directory: Path, user: User) -> None:
    (directory / "00.toml").write_text(OPEN)
    os.chown(directory / "00.toml", 0, user.gid)
    (directory / "00.toml").chmod(0o664)


def _link(directory: Path, user: User) -> None:
    theirs = user.home / "policy.toml"
    theirs.write_text(OPEN)
    os.chown(theirs, user.uid, user.gid)
    (directory / "00.toml").symlink_to(theirs)


def _link_to_roots(directory: Path, user: User) -> None:
    del user
    (directory / "00.toml").symlink_to("10.toml")


def _fifo(directory: Path, user: User) -> None:
    os.mkfifo(directory / "00.toml", 0o600)
    del user


def _a_directory(directory: Path, user: User) -> None:
    (directory / "00.toml").mkdir()
    del user


def _large(directory: Path, user: User) -> None:
    with (directory / "00.toml").open("wb") as opened:
        opened.truncate(100 << 20)
    del user


def _not_text(directory: Path, user: User) -> None:
    (directory / "00.toml").write_bytes(b"\xff\xfe" + OPEN.encode("utf-16-le"))
    del user


@pytest.mark.parametrize(
    "attack", [_users_file, _group_writable, _link, _link_to_roots, _fifo, _a_directory, _large, _not_text]
)
def test_a_file_that_is_not_plainly_roots_denies_everything_and_stops_nobody(
    attacked: Node, rules: Path, alice: User, attack: Callable[[Path, User], None]
) -> None:
    attacked.run(APP, "true", user=alice)
    attack(rules, alice)
    text = _refused(attacked, alice, APP)
    assert "error[policy-unusable]" in text and "00.toml" in text
    (rules / "00.toml").rmdir() if attack is _a_directory else (rules / "00.toml").unlink()
    attacked.run(APP, "true", user=alice)


def test_a_directory_of_a_users_or_a_groups_denies_everything(attacked: Node, rules: Path, alice: User) -> None:
    os.chown(rules, alice.uid, 0)
    assert "policy.d is not a directory that only root can write" in _refused(attacked, alice, APP)
    os.chown(rules, 0, alice.gid)
    rules.chmod(0o775)
    assert "policy.d is not a directory that only root can write" in _refused(attacked, alice, APP)


def test_rules_below_a_directory_that_a_user_can_rename_are_not_roots(attacked: Node, rules: Path, alice: User) -> None:
    del rules
    above = attacked.site.policy_directory.parent
    os.chown(above, alice.uid, 0)
    try:
        assert f"{above} is not a directory that only root can write" in _refused(attacked, alice, APP)
    finally:
        os.chown(above, 0, 0)


# What else an image is called.


def test_every_way_to_write_a_denied_name_is_denied(attacked: Node, rules: Path, alice: User) -> None:
    (rules / "00.toml").write_text(NO_NIGHTLIES)
    for name in ("app:nightly", "library/app:nightly", NIGHTLY, f"docker://{NIGHTLY}", "index.docker.io/app:nightly"):
        assert f'{NIGHTLY}: denied by 00.toml, rule "no-nightlies"' in _refused(attacked, alice, name)
    # Upper case of a registry is the same registry, and in a name it is no name.
    assert 'rule "no-nightlies"' in _refused(attacked, alice, "DOCKER.io/library/app:nightly")
    assert "has upper-case letters" in _refused(attacked, alice, "docker.io/library/App:nightly", status=125)


def test_a_digest_is_no_way_around_a_denied_name(attacked: Node, rules: Path, alice: User) -> None:
    digest = _digest(attacked, NIGHTLY)
    (rules / "00.toml").write_text(NO_NIGHTLIES)
    for name in (digest, digest[:20], f"app@{digest}", f"app:nightly@{digest}", f"app:1@{digest}", f"x/y@{digest}"):
        assert 'denied by 00.toml, rule "no-nightlies"' in _refused(attacked, alice, name), name
    attacked.run(_digest(attacked, APP), "true", user=alice)


def test_a_digest_is_no_way_around_a_denied_registry(attacked: Node, rules: Path, alice: User) -> None:
    (rules / "00.toml").write_text('[[rule]]\nname = "no-quay"\naction = "deny"\nregistries = ["quay.io"]\n')
    digest = _digest(attacked, ELSEWHERE)
    for name in (ELSEWHERE, digest, f"quay.io/org/tool@{digest}", f"docker.io/org/tool@{digest}"):
        assert 'rule "no-quay"' in _refused(attacked, alice, name), name
    attacked.run(APP, "true", user=alice)


def test_a_digest_alone_is_in_no_list_of_names_that_are_allowed(attacked: Node, rules: Path, alice: User) -> None:
    (rules / "10.toml").write_text(
        '[[rule]]\nname = "library"\naction = "allow"\nimages = ["docker.io/library/*"]\nregistries = ["docker.io"]\n'
    )
    assert "no rule allows it" in _refused(attacked, alice, _digest(attacked, APP))
    assert "no rule allows it" in _refused(attacked, alice, ELSEWHERE)
    attacked.run(APP, "true", user=alice)


def test_an_image_of_ones_own_is_never_of_a_registry(attacked: Node, rules: Path, alice: User, bob: User) -> None:
    archive = write_oci_archive(attacked.host.root / "own.tar", busybox())
    archive.chmod(0o644)
    attacked.hpcctr("pull", "--name", "docker.io/library/mine:1", f"oci-archive:{archive}", user=alice)
    attacked.hpcctr("share", "docker.io/library/mine:1", "--user", bob.name, user=alice)
    (rules / "10.toml").write_text('[[rule]]\nname = "hub"\naction = "allow"\nregistries = ["docker.io"]\n')
    assert "private/docker.io/library/mine:1: no rule allows it" in _refused(attacked, alice, "mine:1")
    assert "private/docker.io/library/mine:1: no rule allows it" in _refused(attacked, bob, f"@{alice.name}/mine:1")
    assert "private/docker.io/library/mine:1" in _refused(attacked, bob, f"@{alice.uid}/mine:1")
    (rules / "10.toml").write_text('[[rule]]\nname = "own"\naction = "deny"\nimages = ["private/*"]\n' + OPEN)
    digest = _digest_of_own(attacked, alice)
    for user, name in (
        (alice, "mine:1"),
        (alice, digest),
        (bob, f"@{alice.name}/mine:1"),
        (bob, f"@{alice.name}/{digest}"),
    ):
        assert 'rule "own"' in _refused(attacked, user, name), name


def _digest_of_own(on: Node, user: User) -> str:
    return Store(path=f"{on.site.store}/users/{user.uid}").find("mine:1").record.digest


def test_a_registry_whose_name_only_begins_like_an_allowed_one_is_another(
    attacked: Node, rules: Path, alice: User
) -> None:
    (rules / "10.toml").write_text(
        '[[rule]]\nname = "hub"\naction = "allow"\nregistries = ["docker.io"]\nimages = ["docker.io*"]\n'
    )
    # Nothing is asked of a registry: that a name may not be pulled is decided first.
    for name in ("docker.io.evil/a:1", "docker.io:5000/a:1", "evil.docker.io/a:1"):
        done = attacked.hpcctr("pull", name, user=alice, check=126)
        assert f"{name}: no rule allows it" in done.stderr.decode()


def test_an_entrypoint_and_a_platform_change_nothing_about_a_denial(attacked: Node, rules: Path, alice: User) -> None:
    (rules / "00.toml").write_text(NO_NIGHTLIES)
    flags = ("--entrypoint", "/bin/sh", "--platform", "linux/amd64", "--pull", "never", "--clean-env")
    assert 'rule "no-nightlies"' in _refused(attacked, alice, NIGHTLY, *flags)


def test_a_container_whose_image_was_denied_since_cannot_be_joined(attacked: Node, rules: Path, alice: User) -> None:
    program = attacked.popen(
        "run", NIGHTLY, "--", "sh", "-c", "echo; exec cat", user=alice, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert program.stdin is not None and program.stdout is not None
    program.stdout.readline()
    try:
        attacked.hpcctr("exec", str(program.pid), "--", "true", user=alice)
        (rules / "00.toml").write_text(NO_NIGHTLIES)
        for claimed in (NIGHTLY, APP, "", _digest(attacked, NIGHTLY)):
            # The name is the client's claim: it is taken from the environment of the program, which is the user's.
            done = _join(attacked, alice, program.pid, claimed)
            assert 'rule "no-nightlies"' in done, claimed
        attacked.run(APP, "true", user=alice)
    finally:
        program.stdin.close()
        assert program.wait(20) == 0


def _join(on: Node, user: User, pid: int, claimed: str) -> str:
    """The engine's answer to a request of nobody's command."""
    code = (
        "import socket, sys\n"
        "engine = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "engine.connect('/run/hpcctr/engine.sock')\n"
        "fields = [b'hpcctr/1 exec', b'pid=' + sys.argv[1].encode()]\n"
        "fields += [b'image=' + sys.argv[2].encode()] if sys.argv[2] else []\n"
        "engine.sendall(b'\\0'.join(fields) + b'\\0')\n"
        "print(engine.recv(65536))\n"
    )
    return on.host.run(["/usr/bin/python3", "-c", code, str(pid), claimed], user=user).stdout.decode()


# What else a place is called.


def test_a_place_beside_an_allowed_one_is_not_below_it(attacked: Node, rules: Path, alice: User) -> None:
    (rules / "10.toml").write_text(OPEN + 'targets = ["/tmp", "/home", "/scratch"]\n')
    source = attacked.host.root
    attacked.run(APP, "true", user=alice, flags=["-v", f"{source}:/scratch/a"], cwd="/tmp")
    for target in ("/scratch2", "/scratch2/a", "/Scratch", "/scratch.", "/scratch "):
        text = _refused(attacked, alice, APP, "-v", f"{source}:{target}", "-w", "/tmp")
        assert f"no rule allows it with mount target {target}" in text
    for target in ("/scratch/../data", "/scratch//data", "/scratch/./data", "//scratch"):
        assert "is not a plain path" in _refused(attacked, alice, APP, "-v", f"{source}:{target}")


def test_a_place_that_is_no_text_is_compared_as_bytes(attacked: Node, rules: Path, alice: User) -> None:
    (rules / "10.toml").write_text(OPEN + 'targets = ["/tmp", "/home", "/scratch/\u00e9"]\n')
    source = attacked.host.root
    attacked.run(APP, "true", user=alice, flags=["-v", f"{source}:/scratch/\u00e9"], cwd="/tmp")
    for target in ("/scratch/e\u0301", "/scratch/\udce9"):  # another normal form, and Latin-1
        assert "no rule allows it" in _refused(attacked, alice, APP, "-v", f"{source}:{target}", "-w", "/tmp")


def test_a_list_of_targets_binds_what_the_engine_builds_and_shows_nothing_a_user_could_not_read(
    attacked: Node, rules: Path, alice: User
) -> None:
    """docs/site.md, What a target is: a client of a user's own mounts what is the user's on what the image has."""
    (rules / "10.toml").write_text(OPEN + "targets = []\n")
    assert "no rule allows it with mount target /home" in _refused(attacked, alice, APP)
    code = (
        "import sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from hpcctr.client import carry, connect, enter, run\n"
        "from hpcctr.request import LaunchRequest\n"
        "sock = connect.connect()\n"
        "granted = connect.ask(sock, LaunchRequest(image=sys.argv[2]).frame())\n"
        "mount = carry.Mount(sys.argv[3].encode(), b'/etc', kind='d', read_only=False, origin='-v')\n"
        "command = [b'/bin/sh', b'-c', b'ls /etc; echo x > /etc/x']\n"
        "argv = enter.plan(run.inheritable(sock), [mount], b'/', command, b'/bin', kernel_trees=carry.KERNEL_TREES)\n"
        "enter.become(granted.one('enter'), argv)\n"
    )
    packages = str(Path(hpcctr.__file__).parents[1])
    argv = ["/usr/bin/python3", "-c", code, packages, APP, "/etc/ssl"]
    done = attacked.host.run(argv, user=alice, check=False)
    assert done.stdout.split() == sorted(name.encode() for name in os.listdir("/etc/ssl"))
    assert b"Permission denied" in done.stderr
    done = attacked.host.run([*argv[:-1], "/root"], user=alice, check=False)
    assert done.stdout == b""
