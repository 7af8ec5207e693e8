"""Ordinary users bring images: what a registry offers for everyone, and their own for nobody else."""

from __future__ import annotations

import base64
import gzip
import json
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import OWNER
from tests.support.engine import HPCCTR
from tests.support.node import Node
from tests.support.oci import busybox, file, tar, write_docker_archive, write_layout, write_oci_archive
from tests.support.registry import Registry
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]


@pytest.fixture
def locked(place: Path) -> Iterator[Registry]:
    """A registry that wants credentials."""
    with Registry.start(place / "locked", user="alice", password="secret") as started:
        yield started


@pytest.fixture
def shop(own_node: Node) -> Node:
    """A node whose store belongs to the service account."""
    os.chown(own_node.site.store, OWNER, OWNER)
    return own_node


def _owners(node: Node) -> set[tuple[int, int]]:
    return {(path.lstat().st_uid, path.lstat().st_gid) for path in node.site.store.rglob("*")}


def _names(node: Node, user: User | None, *flags: str) -> dict[str, str]:
    """Name to whose, as `hpcctr images` prints them."""
    rows = json.loads(node.hpcctr("images", "--format", "json", *flags, user=user).stdout)
    return {row["name"]: row["whose"] for row in rows}


def _give(user: User, path: Path) -> Path:
    subprocess.run(["chown", "-R", f"{user.uid}:{user.gid}", path], check=True)
    return path


# the site's images


def test_run_brings_an_image_the_store_lacks(shop: Node, alice: User, bob: User, registry: Registry) -> None:
    name = f"{registry.address}/app:1"
    registry.push_image("app", "1", busybox())
    done = shop.run(name, "sh", "-c", "echo $HPCCTR_IMAGE; id -u", user=alice)
    assert done.stdout.decode().split() == [name, str(alice.uid)]
    assert b"pulled" in done.stderr
    for user in (alice, bob):
        assert shop.run(name, "true", user=user).stderr == b""
        assert _names(shop, user) == {name: "site"}
    assert _owners(shop) == {(OWNER, OWNER)}


def test_the_command_of_a_launch_that_pulled_is_still_the_process_that_was_started(
    shop: Node, alice: User, registry: Registry
) -> None:
    registry.push_image("app", "1", busybox())
    process = shop.popen("run", f"{registry.address}/app:1", "--", "sh", "-c", "echo $$", user=alice, stdout=-1)
    assert int(process.communicate(timeout=60)[0]) == process.pid


@pytest.mark.parametrize("how", ["never", "missing", "always"])
def test_when_to_pull_is_what_was_said(shop: Node, alice: User, registry: Registry, how: str) -> None:
    name = f"{registry.address}/app:1"
    registry.push_image("app", "1", busybox(layers=[tar(file("etc/edition", b"first"))]))
    if how == "never":
        refused = shop.run(name, "true", user=alice, flags=["--pull", how], check=125)
        assert b"error[image-not-in-store]" in refused.stderr
        return
    shop.run(name, "true", user=alice)
    registry.push_image("app", "1", busybox(layers=[tar(file("etc/edition", b"second"))]))
    done = shop.run(name, "cat", "/etc/edition", user=alice, flags=["--pull", how])
    assert done.stdout == (b"second" if how == "always" else b"first")


def test_what_a_registry_refuses_a_launch_says(shop: Node, alice: User, registry: Registry) -> None:
    done = shop.run(f"{registry.address}/none:1", "true", user=alice, check=125)
    assert b"error[registry]" in done.stderr and b"has no" in done.stderr


def test_launches_of_one_user_on_one_node_bring_an_image_once(shop: Node, alice: User, registry: Registry) -> None:
    registry.push_image("app", "1", busybox())
    launches = [
        shop.popen("run", f"{registry.address}/app:1", "--", "echo", "x", user=alice, stdout=-1, stderr=-1)
        for _ in range(12)
    ]
    ended = [launch.communicate(timeout=90) for launch in launches]
    assert [output for output, _ in ended] == [b"x\n"] * 12, ended
    assert sum(b"pulled" in errors for _, errors in ended) == 1, ended
    assert shop.engine.log().count("task=pull") >= 1


def test_root_works_on_the_store_as_its_owner(shop: Node, alice: User, registry: Registry, place: Path) -> None:
    name = f"{registry.address}/app:1"
    registry.push_image("app", "1", busybox())
    shop.hpcctr("pull", name)
    shop.hpcctr("pull", f"oci-archive:{write_oci_archive(place / 'tool.tar', busybox())}")
    assert _owners(shop) == {(OWNER, OWNER)}
    assert _names(shop, alice) == {name: "site", "localhost/tool:latest": "site"}
    shop.hpcctr("rm", name)
    assert _names(shop, None) == {"localhost/tool:latest": "site"}
    assert _owners(shop) == {(OWNER, OWNER)}


def test_a_store_of_roots_takes_nothing_from_users(own_node: Node, alice: User, registry: Registry, desk: Path) -> None:
    registry.push_image("app", "1", busybox())
    name = f"{registry.address}/app:1"
    archive = _give(alice, write_oci_archive(desk / "app.tar", busybox()))
    for word in (name, f"oci-archive:{archive}"):
        text = own_node.hpcctr("pull", word, user=alice, check=126).stderr.decode()
        assert "error[pull-refused]" in text and "belongs to root" in text and "chown -R hpcctr:" in text
        text = own_node.run(word, "true", user=alice, check=125).stderr.decode()
        assert "error[image-not-in-store]" in text and "belongs to root" in text
    assert not list(own_node.site.store.iterdir())


def test_what_may_not_run_is_not_pulled_either(shop: Node, alice: User, registry: Registry, desk: Path) -> None:
    registry.push_image("app", "1", busybox())
    shop.site.policy_directory.mkdir(mode=0o755)
    (shop.site.policy_directory / "1.toml").write_text(
        '[[rule]]\nname = "not-this"\naction = "deny"\nimages = ["127.0.0.1:*/app:*"]\n'
        '[[rule]]\nname = "no-imports"\naction = "deny"\nimages = ["private/*"]\n'
    )
    done = shop.hpcctr("pull", f"{registry.address}/app:1", user=alice, check=126)
    assert b'denied by 1.toml, rule "not-this"' in done.stderr
    archive = _give(alice, write_oci_archive(desk / "app.tar", busybox()))
    done = shop.hpcctr("pull", f"oci-archive:{archive}", user=alice, check=126)
    assert b'denied by 1.toml, rule "no-imports"' in done.stderr
    assert list(shop.site.store.iterdir()) == []


@pytest.mark.parametrize("where", ["nowhere", "outside-jobs"])
def test_a_site_says_where_users_pull(own_node: Node, alice: User, registry: Registry, where: str) -> None:
    registry.push_image("app", "1", busybox())
    name = f"{registry.address}/app:1"
    os.chown(own_node.site.store, OWNER, OWNER)
    own_node.site.file.write_text(f'pull = "{where}"\n{own_node.site.file.read_text()}')
    own_node.engine.restart()
    job = Path("/sys/fs/cgroup/pids/hpcctr-test-site/job_7")
    job.mkdir(parents=True)
    try:
        argv = ["sh", "-c", f"echo $$ >{job}/cgroup.procs; exec setpriv --reuid={alice.uid} --regid={alice.gid} "]
        argv[-1] += f"--clear-groups {HPCCTR} pull {name}"
        done = own_node.host.run(argv, env=own_node.environment(), check=126)
        assert b"error[pull-refused]" in done.stderr, done.stderr
        outside = own_node.hpcctr("pull", name, user=alice, check=126 if where == "nowhere" else 0)
        assert (b"administrators" in outside.stderr) == (where == "nowhere")
    finally:
        job.rmdir()
        job.parent.rmdir()


# a user's own images


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive", "oci", "gzip"])
def test_a_file_becomes_an_image_of_its_users_own(shop: Node, alice: User, bob: User, desk: Path, kind: str) -> None:
    image = busybox(layers=[tar(file("etc/edition", b"alice's"))])
    if kind == "oci":
        reference = f"oci:{write_layout(desk / 'mine', image, ref='v1')}:v1"
    elif kind == "docker-archive":
        reference = f"docker-archive:{write_docker_archive(desk / 'mine.tar', image)}"
    else:
        archive = write_oci_archive(desk / "mine.tar", image)
        if kind == "gzip":
            archive.write_bytes(gzip.compress(archive.read_bytes(), 1))
        reference = f"oci-archive:{archive}"
    _give(alice, desk)
    name = shop.hpcctr("pull", reference, user=alice).stdout.decode().strip()
    for word in (name, reference):
        assert shop.run(word, "cat", "/etc/edition", user=alice).stdout == b"alice's"
    digest = json.loads(shop.hpcctr("inspect", name, "--format", "json", user=alice).stdout)["digest"]
    assert _names(shop, alice) == {name: "you"} == _names(shop, alice, "--mine")
    assert _names(shop, bob) == {}
    for word in (name, digest, digest[:25]):
        refused = shop.run(word, "true", user=bob, flags=["--pull", "never"], check=125)
        assert b"error[image-not-in-store]" in refused.stderr
    mine = shop.site.store / f"users/{alice.uid}"
    assert (stat.S_IMODE(mine.stat().st_mode), mine.stat().st_uid) == (0o700, OWNER)
    assert _owners(shop) == {(OWNER, OWNER)}


def test_run_takes_a_file_by_a_relative_path(shop: Node, alice: User, desk: Path) -> None:
    _give(alice, write_oci_archive(desk / "mine.tar", busybox()))
    for _ in range(2):
        done = shop.run("oci-archive:mine.tar", "echo", "here", user=alice, cwd=desk)
        assert done.stdout == b"here\n"


def test_ones_own_name_comes_before_the_sites(
    shop: Node, alice: User, bob: User, registry: Registry, desk: Path
) -> None:
    name = f"{registry.address}/app:1"
    registry.push_image("app", "1", busybox(layers=[tar(file("etc/edition", b"the site's"))]))
    shop.hpcctr("pull", name)
    archive = _give(alice, write_oci_archive(desk / "app.tar", busybox(layers=[tar(file("etc/edition", b"alice's"))])))
    shop.hpcctr("pull", "--name", name, f"oci-archive:{archive}", user=alice)
    assert shop.run(name, "cat", "/etc/edition", user=alice).stdout == b"alice's"
    assert shop.run(name, "cat", "/etc/edition", user=bob).stdout == b"the site's"
    shop.hpcctr("rm", name, user=alice)
    assert shop.run(name, "cat", "/etc/edition", user=alice).stdout == b"the site's"


def test_credentials_bring_an_image_for_their_user_alone(
    shop: Node, alice: User, bob: User, locked: Registry, desk: Path
) -> None:
    name = f"{locked.address}/secret:1"
    locked.push_image("secret", "1", busybox())
    login = base64.b64encode(b"alice:secret").decode()
    (desk / "config.json").write_text(json.dumps({"auths": {locked.address: {"auth": login}}}))
    _give(alice, desk)
    done = shop.run(name, "echo", "in", user=alice, env={"DOCKER_CONFIG": str(desk)})
    assert done.stdout == b"in\n" and b"with your credentials" in done.stderr
    assert _names(shop, alice) == {name: "you"}
    refused = shop.run(name, "true", user=bob, check=125)
    assert b"error[registry-login]" in refused.stderr
    # No file of the store and no line of the engine's knows the password.
    assert subprocess.run(["grep", "-rqF", "-e", login, "-e", "alice:secret", shop.site.store]).returncode == 1
    assert login not in shop.engine.log()


def test_a_user_may_have_so_many_bytes(own_node: Node, alice: User, desk: Path) -> None:
    text = own_node.site.file.read_text()
    own_node.site.file.write_text(f"{text}\n[limits]\nbytes-per-uid = 100000\n")
    os.chown(own_node.site.store, OWNER, OWNER)
    own_node.engine.restart()
    archive = _give(alice, write_oci_archive(desk / "big.tar", busybox()))
    done = own_node.hpcctr("pull", f"oci-archive:{archive}", user=alice, check=125)
    assert b"error[store]" in done.stderr and b"bytes-per-uid" in done.stderr
    assert not [path for path in (own_node.site.store / f"users/{alice.uid}").rglob("*") if path.is_file()]


def test_what_is_no_image_is_refused_and_leaves_nothing(shop: Node, alice: User, desk: Path) -> None:
    for content in (b"", b"no archive", os.urandom(200_000), tar(file("a", b"b"))):
        path = desk / "junk.tar"
        path.write_bytes(content)
        done = shop.hpcctr("pull", f"oci-archive:{_give(alice, path)}", user=alice, check=125)
        assert b"error[not-an-image]" in done.stderr or b"error[image-broken]" in done.stderr, done.stderr
    assert not [path for path in (shop.site.store / f"users/{alice.uid}").rglob("*") if path.is_file()]
