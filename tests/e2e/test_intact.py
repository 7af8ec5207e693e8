"""What is mounted is what was published: damage is named before anything starts, and repaired by a pull."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.node import Node, node
from tests.support.oci import busybox, write_oci_archive
from tests.support.polling import wait_until
from tests.support.registry import Registry
from tests.support.scratch import scratch
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]

OWNER = 61906


@pytest.fixture
def strict() -> Iterator[Node]:
    """A node that reads image files before it mounts them, with a store of a service account's."""
    with scratch("strict") as place, node(place) as started:
        text = started.site.file.read_text()
        started.site.file.write_text(f"verify-at-mount = true\n{text}")
        os.chown(started.site.store, OWNER, OWNER)
        started.engine.restart()
        yield started


def _file(on: Node, part: str = "") -> Path:
    (path,) = (on.site.store / part / "images").glob("*/root.squashfs")
    return path


def _damage(path: Path) -> None:
    """One bit in the middle, as a disk would do it: size and times stay."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(status.st_size // 2)
        byte = file.read(1)[0]
        file.seek(status.st_size // 2)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_damaged_image_of_the_sites_is_named_repaired_and_runs(strict: Node, alice: User, registry: Registry) -> None:
    name = f"{registry.address}/app:1"
    registry.push_image("app", "1", busybox())
    strict.run(name, "true", user=alice)
    wait_until(lambda: not [one for one in strict.host.mounts() if one.kind == "squashfs"], what="the unmounted image")
    _damage(_file(strict))
    for user in (alice, None):
        said = strict.run(name, "true", user=user, flags=["--pull", "never"], check=125).stderr.decode()
        assert "error[image-damaged]" in said and "was published" in said, said
        assert f"hint: hpcctr pull --verify {name}" in said
    assert not [one for one in strict.host.mounts() if one.kind == "squashfs"]
    assert not list((strict.site.store / "images").glob("*/uses/*"))
    assert b"error[image-damaged]" in strict.hpcctr("inspect", "--verify", name, user=alice, check=125).stderr
    # A plain pull does not read it; the one of the hint does, for whoever follows it.
    assert b"up to date" in strict.hpcctr("pull", name, user=alice).stderr
    assert b"pulled" in strict.hpcctr("pull", "--verify", name, user=alice).stderr
    strict.run(name, "true", user=alice)
    assert b"up to date" in strict.hpcctr("pull", "--verify", name).stderr


def test_a_damaged_image_of_a_users_own_is_named_repaired_and_runs(strict: Node, alice: User, place: Path) -> None:
    archive = write_oci_archive(place / "mine.tar", busybox())
    os.chown(archive, alice.uid, alice.gid)
    name = "localhost/mine:latest"
    strict.hpcctr("pull", f"oci-archive:{archive}", user=alice)
    strict.hpcctr("inspect", "--verify", name, user=alice)
    _damage(_file(strict, f"users/{alice.uid}"))
    said = strict.hpcctr("inspect", "--verify", name, user=alice, check=125).stderr.decode()
    assert "error[image-damaged]" in said and f"hint: hpcctr pull --verify oci-archive:{archive}" in said, said
    assert b"error[image-damaged]" in strict.run(name, "true", user=alice, check=125).stderr
    assert b"pulled" in strict.hpcctr("pull", "--verify", f"oci-archive:{archive}", user=alice).stderr
    strict.hpcctr("inspect", "--verify", name, user=alice)
    strict.run(name, "true", user=alice)


def test_root_repairs_what_the_stores_owner_has(strict: Node, registry: Registry) -> None:
    name = f"{registry.address}/app:1"
    registry.push_image("app", "1", busybox())
    strict.hpcctr("pull", name)
    _damage(_file(strict))
    assert b"pulled" in strict.hpcctr("pull", "--verify", name).stderr
    strict.hpcctr("inspect", "--verify", name)
    assert _file(strict).stat().st_uid == OWNER


def test_a_program_goes_on_when_its_image_is_repaired_under_it(strict: Node, alice: User, registry: Registry) -> None:
    name = f"{registry.address}/app:1"
    registry.push_image("app", "1", busybox())
    words = ("run", name, "--", "sh", "-c", "echo ready; read line; cat /bin/busybox >/dev/null && echo $line")
    program = strict.popen(*words, user=alice, stdin=-1, stdout=-1)
    assert program.stdout is not None and program.stdout.readline() == b"ready\n"
    # Nothing of it is read anew: the damage is in the file, and not in the page cache of who runs it.
    (directory,) = (strict.site.store / "images").iterdir()
    (directory / "root.squashfs").chmod(0o644)
    with (directory / "root.squashfs").open("ab") as file:
        file.write(b"x")
    assert b"pulled" in strict.hpcctr("pull", "--verify", name, user=alice).stderr
    (aside,) = (strict.site.store / "leaving").iterdir()
    assert list((aside / "uses").iterdir())
    strict.run(name, "true", user=alice)
    assert program.communicate(b"still here\n", timeout=30)[0] == b"still here\n"
