"""Users share images of their own with users and groups; administrators make one everybody's."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import OWNER
from tests.support.engine import HPCCTR
from tests.support.node import Node
from tests.support.oci import busybox, file, tar, write_oci_archive
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]

NAME = "localhost/app:1"


def _bring(shop: Node, alice: User, desk: Path, edition: bytes, name: str = NAME) -> str:
    """Let alice have an image with that in /etc/edition; its digest."""
    archive = write_oci_archive(desk / "app.tar", busybox(layers=[tar(file("etc/edition", edition))]))
    os.chown(archive, alice.uid, alice.gid)
    shop.hpcctr("pull", "--name", name, f"oci-archive:{archive}", user=alice)
    return str(json.loads(shop.hpcctr("inspect", name, "--format", "json", user=alice).stdout)["digest"])


def _edition(shop: Node, image: str, user: User, **options: Any) -> bytes:
    return shop.run(image, "cat", "/etc/edition", user=user, **options).stdout


def _refusal(shop: Node, image: str, user: User, *flags: str) -> str:
    return shop.run(image, "true", user=user, flags=flags, check=125).stderr.decode()


def _listed(shop: Node, user: User) -> dict[str, str]:
    rows = json.loads(shop.hpcctr("images", "--format", "json", user=user).stdout)
    return {row["name"]: row["whose"] for row in rows}


def _shared_with(shop: Node, user: User, image: str) -> set[tuple[str, str]]:
    rows = json.loads(shop.hpcctr("share", image, "--format", "json", user=user).stdout)
    return {(row["kind"], row["who"]) for row in rows}


@pytest.mark.parametrize("owner", ["name", "number"])
def test_a_user_shares_an_image_and_takes_it_back(shop: Node, alice: User, bob: User, desk: Path, owner: str) -> None:
    digest = _bring(shop, alice, desk, b"alice's")
    other = _bring(shop, alice, desk, b"not shared", "localhost/other:1")
    shared = f"@{alice.name if owner == 'name' else alice.uid}/{NAME}"
    assert "error[image-not-in-store]" in _refusal(shop, shared, bob)
    done = shop.hpcctr("share", NAME, "--user", bob.name, user=alice)
    assert f"@{alice.name}/{NAME}".encode() in done.stderr
    assert _shared_with(shop, alice, NAME) == {("user", bob.name)}
    prefix = shared.partition("/")[0]
    for image in (shared, f"{prefix}/{digest}", f"{prefix}/{digest[:25]}", f"{shared}@{digest}"):
        assert _edition(shop, image, bob) == b"alice's"
    assert "error[image-not-in-store]" in _refusal(shop, f"{prefix}/{other}", bob)
    # The owner has it by that name as well, and bob by no other.
    assert _edition(shop, shared, alice) == b"alice's"
    for image in (NAME, digest):
        assert "error[image-not-in-store]" in _refusal(shop, image, bob, "--pull", "never")
    explained = shop.run(shared, "true", user=bob, flags=["--explain"]).stdout.decode()
    assert shared in explained and digest in explained
    facts = json.loads(shop.hpcctr("inspect", shared, "--format", "json", user=bob).stdout)
    assert (facts["name"], facts["digest"]) == (shared, digest)
    assert _listed(shop, bob) == {f"@{alice.name}/{NAME}": alice.name}
    assert _listed(shop, alice) == {NAME: "you", "localhost/other:1": "you"}
    assert f"shared={shared!r}" in shop.engine.log() and f"image='private/{NAME}'" in shop.engine.log()
    with shop.popen(
        "run", shared, "--", "sh", "-c", "echo; cat; cat /etc/edition", user=bob, stdin=-1, stdout=subprocess.PIPE
    ) as running:
        assert running.stdout is not None
        running.stdout.readline()
        shop.hpcctr("share", NAME, "--user", str(bob.uid), "--remove", user=alice)
        assert "error[image-not-in-store]" in _refusal(shop, shared, bob)
        assert running.communicate(timeout=30)[0] == b"alice's"
    assert _shared_with(shop, alice, NAME) == set() and _listed(shop, bob) == {}
    assert {path.lstat().st_uid for path in shop.site.store.rglob("*")} == {OWNER}


def test_a_group_is_the_callers_by_the_kernels_word(shop: Node, alice: User, bob: User, desk: Path) -> None:
    _bring(shop, alice, desk, b"alice's")
    shared = f"@{alice.name}/{NAME}"
    group = next(gid for gid in bob.groups if gid != bob.gid)
    shop.hpcctr("share", NAME, "--group", str(group), user=alice)

    def run(*groups: str) -> subprocess.CompletedProcess[bytes]:
        argv = ["setpriv", f"--reuid={bob.uid}", *groups, str(HPCCTR), "run", shared, "--", "cat", "/etc/edition"]
        env = shop.environment({"HOME": str(bob.home)})
        return shop.host.run(argv, env=env, cwd="/tmp", check=False)

    assert run(f"--regid={bob.gid}", f"--groups={group}").stdout == b"alice's"
    assert run(f"--regid={group}", "--clear-groups").stdout == b"alice's"
    done = run(f"--regid={bob.gid}", "--clear-groups")
    assert done.returncode == 125 and b"error[image-not-in-store]" in done.stderr
    assert _listed(shop, bob) == {f"@{alice.name}/{NAME}": alice.name}


def test_what_is_not_shared_is_as_what_is_not_there(shop: Node, alice: User, bob: User, desk: Path) -> None:
    digest = _bring(shop, alice, desk, b"alice's")
    shop.hpcctr("share", NAME, "--user", str(alice.uid), user=alice)  # with somebody else than bob
    texts = set()
    for image in (
        f"@{alice.name}/{NAME}",
        f"@{alice.name}/localhost/none:1",
        f"@{alice.name}/{digest}",
        f"@{alice.name}/sha256:{'0' * 64}",
        f"@{alice.name}/{NAME}@{digest}",
        f"@{bob.uid + 500}/{NAME}",
        "@no-such-user/app:1",
    ):
        by_keeper = image.endswith(("/app:1", "/none:1"))
        for words in (["run", image, "--", "true"], *([["run", "--explain", image], ["inspect", image]] * by_keeper)):
            done = shop.hpcctr(*words, user=bob, check=125)
            own = image.partition("/")[2]
            texts.add(done.stderr.replace(image.encode(), b"IMAGE").replace(own.encode(), b"NAME"))
    assert len(texts) == 1, texts


def test_only_its_owner_changes_shares_and_removes(shop: Node, alice: User, bob: User, desk: Path) -> None:
    _bring(shop, alice, desk, b"alice's")
    shop.hpcctr("share", NAME, "--user", bob.name, user=alice)
    shared = f"@{alice.name}/{NAME}"
    for words in (
        ["rm", shared],
        ["share", shared, "--group", "0"],
        ["share", shared],
        ["inspect", "--verify", shared],
    ):
        done = shop.hpcctr(*words, user=bob, check=126)
        assert b"error[not-your-image]" in done.stderr, done.stderr
    for user in (alice, bob):
        done = shop.hpcctr("promote", shared, user=user, check=126)
        assert b"error[caller-refused]" in done.stderr and b"root and the store's owner" in done.stderr, done.stderr
    for words in (["pull", shared], ["pull", "--private", shared]):
        assert b"error[usage]" in shop.hpcctr(*words, user=bob, check=125).stderr
    assert b"error[image-not-in-store]" in shop.hpcctr("share", NAME, "--user", "0", user=bob, check=125).stderr
    assert _edition(shop, shared, bob) == b"alice's"
    assert _edition(shop, shared, bob, flags=["--pull", "always"]) == b"alice's"
    # Its owner removes it by either name, and with it the share: one that comes again is shared with nobody.
    shop.hpcctr("rm", shared, user=alice)
    _bring(shop, alice, desk, b"another")
    assert "error[image-not-in-store]" in _refusal(shop, shared, bob)


def test_an_administrator_sees_and_removes_what_is_shared(shop: Node, alice: User, bob: User, desk: Path) -> None:
    _bring(shop, alice, desk, b"alice's")
    shop.hpcctr("share", NAME, "--user", bob.name, user=alice)
    shared = f"@{alice.name}/{NAME}"
    assert json.loads(shop.hpcctr("inspect", shared, "--format", "json").stdout)["name"] == shared
    shop.hpcctr("rm", shared)
    assert "error[image-not-in-store]" in _refusal(shop, shared, bob)
    assert not list((shop.site.store / f"users/{alice.uid}/shares").iterdir())


def test_gc_takes_shares_of_removed_images(shop: Node, alice: User, bob: User, desk: Path) -> None:
    digest = _bring(shop, alice, desk, b"alice's")
    for image in (NAME, digest):
        shop.hpcctr("share", image, "--user", bob.name, user=alice)
    shop.hpcctr("pull", f"oci-archive:{write_oci_archive(desk / 'site.tar', busybox())}")
    mine = shop.site.store / f"users/{alice.uid}"
    subprocess.run(["rm", "-r", *mine.glob("names/*"), *mine.glob("images/*")], check=True)
    what = [f"users/{alice.uid}/{image} uid-{bob.uid}" for image in (digest, NAME)]
    for flags in (["--dry-run"], []):
        rows = json.loads(shop.hpcctr("gc", "--format", "json", *flags).stdout)
        assert [row["what"] for row in rows if row["kind"] == "share"] == what
    assert not list((mine / "shares").iterdir())
    assert json.loads(shop.hpcctr("gc", "--format", "json").stdout) == []


def test_a_store_of_roots_has_nothing_to_share(own_node: Node, alice: User, bob: User) -> None:
    done = own_node.hpcctr("share", NAME, "--user", bob.name, user=alice, check=126)
    assert b"belongs to root" in done.stderr
    assert b"error[not-your-image]" in own_node.hpcctr("share", NAME, "--user", bob.name, check=126).stderr


def test_who_there_is_not_is_named(shop: Node, alice: User) -> None:
    for words in (["--user", "no-such-user"], ["--group", "no-such-group"], ["--remove"], ["--user", "9" * 12]):
        done = shop.hpcctr("share", NAME, *words, user=alice, check=125)
        assert b"error[usage]" in done.stderr or b"error[image-not-in-store]" in done.stderr, done.stderr


# promotion


@pytest.mark.parametrize("who", ["root", "the store's owner"])
def test_an_administrator_makes_a_users_image_everybodys(
    shop: Node, alice: User, bob: User, desk: Path, who: str
) -> None:
    digest = _bring(shop, alice, desk, b"alice's")
    become = [] if who == "root" else ["setpriv", f"--reuid={OWNER}", f"--regid={OWNER}", "--clear-groups"]
    argv = [*become, str(HPCCTR), "promote", f"@{alice.name}/{NAME}", "--as", "site/app:1"]
    name = shop.host.run(argv, env=shop.environment(), cwd="/").stdout.decode().strip()
    assert name == "site/app:1"
    assert _edition(shop, name, bob) == b"alice's"
    assert shop.run(name, "sh", "-c", "echo $HPCCTR_IMAGE", user=bob).stdout == b"docker.io/site/app:1\n"
    word = digest.replace(":", "-")
    files = [shop.site.store / part / "images" / word / "root.squashfs" for part in (f"users/{alice.uid}", ".")]
    assert os.path.samefile(*files), "linked, not written again"
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o644}
    shop.hpcctr("rm", NAME, user=alice)
    assert _edition(shop, name, bob) == b"alice's"
    assert {path.lstat().st_uid for path in shop.site.store.rglob("*")} == {OWNER}


def test_a_name_that_means_something_else_is_not_taken(shop: Node, alice: User, desk: Path) -> None:
    shared = f"@{alice.name}/{NAME}"
    _bring(shop, alice, desk, b"first")
    archive = write_oci_archive(desk / "site.tar", busybox(layers=[tar(file("etc/edition", b"the site's"))]))
    shop.hpcctr("pull", "--name", "site/app:1", f"oci-archive:{archive}")
    taken = shop.hpcctr("promote", shared, "--as", "site/app:1", check=126)
    assert b"error[name-taken]" in taken.stderr and b"--replace" in taken.stderr
    shop.hpcctr("promote", shared, "--as", "site/app:1", "--replace")
    # What has been promoted under a name is renewed there without a question.
    digest = _bring(shop, alice, desk, b"second")
    shop.hpcctr("promote", shared, "--as", "site/app:1")
    record = json.loads(next(shop.site.store.glob("names/docker.io/site/app/1.*.json")).read_text())
    assert len(record["history"]) == 3 and record["history"][0]["digest"] == digest
    assert record["history"][0]["source"] == f"@{alice.uid}/{NAME}"


def test_promotions_that_make_no_sense_are_refused_by_name(shop: Node, alice: User, desk: Path) -> None:
    digest = _bring(shop, alice, desk, b"alice's", "python:3.12")
    owner = f"@{alice.name}"
    for words, slug in (
        (["site/app:1"], "image-name"),
        ([f"{owner}/python:3.12"], "usage"),  # her word for it must not become everybody's python
        ([f"{owner}/{digest}"], "usage"),
        ([f"{owner}/python:3.12", "--as", f"x@{digest}"], "usage"),
        ([f"{owner}/none:1"], "image-not-in-store"),
        (["@no-such-user/app:1"], "image-not-in-store"),
    ):
        done = shop.hpcctr("promote", *words, check=125)
        assert f"error[{slug}]".encode() in done.stderr, done.stderr
    word = digest.replace(":", "-")
    with (shop.site.store / f"users/{alice.uid}/images/{word}/root.squashfs").open("r+b") as image:
        image.seek(100)
        image.write(b"x")
    done = shop.hpcctr("promote", f"{owner}/{digest}", "--as", "site/app:1", check=125)
    assert b"error[image-broken]" in done.stderr
    assert not (shop.site.store / "images" / word).exists()
