"""Lock files: pull writes digests down, run takes those and no others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.node import Node
from tests.support.oci import busybox, file, tar, write_oci_archive
from tests.support.registry import Registry
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]


def _edition(text: bytes) -> bytes:
    return tar(file("etc/edition", text))


def test_a_launch_takes_what_was_locked(shop: Node, alice: User, bob: User, registry: Registry, desk: Path) -> None:
    name = f"{registry.address}/app:1"
    registry.push_image("app", "1", busybox(layers=[_edition(b"first")]))
    lock = desk / "images.lock"
    lock.write_text("# for the paper\n")
    os.chown(lock, alice.uid, alice.gid)
    assert shop.hpcctr("pull", "--lock", str(lock), name, user=alice).stdout.decode().strip() == name
    assert lock.read_text().startswith(f"# for the paper\n{name} sha256:")
    assert lock.stat().st_uid == alice.uid
    registry.push_image("app", "1", busybox(layers=[_edition(b"second")]))
    shop.hpcctr("pull", name, user=bob)
    assert shop.run(name, "cat", "/etc/edition", user=alice).stdout == b"second"
    locked = ["--locked", str(lock)]
    for flags in (locked, [*locked, "--pull", "never"], [*locked, "--pull=always"]):
        done = shop.run(name, "sh", "-c", "cat /etc/edition; echo -n $HPCCTR_IMAGE", user=alice, flags=flags)
        assert done.stdout.decode() == f"first{name}"
    # Rules see the name, which had this meaning.
    explained = shop.run(name, "true", user=alice, flags=[*locked, "--explain"]).stdout.decode()
    assert name in explained and lock.read_text().split()[-2] in explained
    # The store loses it: the digest is brought again.
    digest = lock.read_text().split()[-2]
    shop.hpcctr("rm", digest)
    refused = shop.run(name, "true", user=alice, flags=[*locked, "--pull", "never"], check=125)
    assert b"error[image-not-in-store]" in refused.stderr and digest.encode() in refused.stderr
    assert shop.run(name, "cat", "/etc/edition", user=alice, flags=locked).stdout == b"first"
    # Root, without the engine, as well.
    assert shop.run(name, "cat", "/etc/edition", flags=locked).stdout == b"first"
    # Locked anew, the line changes and the comment stays.
    shop.hpcctr("pull", "--lock", str(lock), name, user=alice)
    assert lock.read_text().count("\n") == 2
    assert shop.run(name, "cat", "/etc/edition", user=alice, flags=locked).stdout == b"second"


def test_what_the_lock_does_not_name_does_not_run(shop: Node, alice: User, registry: Registry, desk: Path) -> None:
    name = f"{registry.address}/app:1"
    registry.push_image("app", "1", busybox())
    shop.hpcctr("pull", name)
    lock = desk / "images.lock"
    refused = shop.run(name, "true", user=alice, flags=["--locked", str(lock)], check=125)
    assert b"error[lock-file]" in refused.stderr
    lock.write_text("")
    os.chown(lock, alice.uid, alice.gid)
    refused = shop.run(name, "true", user=alice, flags=["--locked", str(lock)], check=125)
    assert b"error[not-locked]" in refused.stderr
    assert f"hint: hpcctr pull --lock {lock} {name}".encode() in refused.stderr


def test_own_and_shared_images_are_locked_too(shop: Node, alice: User, bob: User, desk: Path, place: Path) -> None:
    def bring(edition: bytes) -> None:
        archive = write_oci_archive(desk / "app.tar", busybox(layers=[_edition(edition)]))
        os.chown(archive, alice.uid, alice.gid)
        shop.hpcctr("pull", f"oci-archive:{archive}", user=alice)

    def lock_of(user: User, image: str) -> str:
        directory = place / user.name
        directory.mkdir(mode=0o755, exist_ok=True)
        os.chown(directory, user.uid, user.gid)
        shop.hpcctr("pull", "--lock", f"{directory}/lock", image, user=user) if user is bob else shop.hpcctr(
            "pull", "--lock", f"{directory}/lock", f"oci-archive:{desk}/app.tar", user=user
        )
        return f"{directory}/lock"

    shared = f"@{alice.name}/localhost/app:latest"
    bring(b"first")
    shop.hpcctr("share", "localhost/app", "--user", bob.name, user=alice)
    locks = {
        user.name: (user, image, lock_of(user, image)) for user, image in ((alice, "localhost/app"), (bob, shared))
    }
    bring(b"second")
    for user, image, lock in locks.values():
        assert shop.run(image, "cat", "/etc/edition", user=user).stdout == b"second"
        assert shop.run(image, "cat", "/etc/edition", user=user, flags=["--locked", lock]).stdout == b"first"


def test_a_lock_file_that_cannot_be_written_stops_the_pull(shop: Node, alice: User, registry: Registry) -> None:
    registry.push_image("app", "1", busybox())
    done = shop.hpcctr("pull", "--lock", "/etc/images.lock", f"{registry.address}/app:1", user=alice, check=125)
    assert b"error[lock-file]" in done.stderr
    assert not list(shop.site.store.glob("images/*"))
