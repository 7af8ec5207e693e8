"""What runs anywhere is never removed from the store: nodes mark what they use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Profile
from tests.e2e.test_gc import age
from tests.support.host import Host
from tests.support.node import Node, equipped
from tests.support.oci import busybox, write_oci_archive
from tests.support.polling import wait_until
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]

OWNER = 61903
READY = ("sh", "-c", "echo ready; read line; cat /bin/busybox >/dev/null && echo $line")


@pytest.fixture
def shop(own_node: Node, busybox_image: str) -> Node:
    """A node whose store belongs to a service account, with the tiny image as app:1."""
    os.chown(own_node.site.store, OWNER, OWNER)
    own_node.hpcctr("pull", busybox_image, "--name", "app:1")
    return own_node


@pytest.fixture
def neighbour(shop: Node, place: Path) -> Iterator[Node]:
    """Another node with the same store."""
    with (
        Host.start(place / "neighbour", hostname="n8") as host,
        equipped(host, store=shop.site.store) as made,
    ):
        yield made


def _marks(node: Node) -> dict[str, set[str]]:
    """By image directory below the store: whose marks there are."""
    store = node.site.store
    found = [path for path in store.glob("**/uses/*") if "+" in path.name]
    marks: dict[str, set[str]] = {}
    for path in found:
        marks.setdefault(str(path.parents[1].relative_to(store)), set()).add(path.name.rpartition("+")[0])
    return marks


def _image(node: Node) -> Path:
    (directory,) = (node.site.store / "images").iterdir()
    return directory


def _begin(node: Node, name: str, user: User | None) -> subprocess.Popen[bytes]:
    process = node.popen("run", name, "--", *READY, user=user, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    """The program still has its image, and ends."""
    assert process.communicate(b"still here\n", timeout=30)[0] == b"still here\n"


def _gone(node: Node, *flags: str) -> list[str]:
    rows = json.loads(node.hpcctr("gc", "--format", "json", *flags).stdout)
    return [row["kind"] for row in rows]


def _last_used(node: Node) -> str:
    (row,) = json.loads(node.hpcctr("images", "--format", "json").stdout)
    return str(row["last_used"])


def test_a_node_marks_what_it_mounts_until_its_last_program_has_ended(shop: Node, alice: User, bob: User) -> None:
    image = f"images/{_image(shop).name}"
    age(_image(shop))
    assert _last_used(shop).startswith("2017-")
    programs = [_begin(shop, "app:1", user) for user in (alice, bob, None)]
    node = os.uname().nodename
    marks = _marks(shop)[image]
    assert f"{node}+gateway" in marks
    assert sorted(mark.partition("-")[0] for mark in marks) == sorted([f"{node}+direct", f"{node}+gateway"])
    owners = {(path.stat().st_uid, path.stat().st_mode & 0o777) for path in (_image(shop) / "uses").iterdir()}
    assert owners == {(OWNER, 0o600)}
    for user in (alice, bob):
        assert shop.host.run(["ls", f"{_image(shop)}/uses"], user=user, check=False).returncode != 0
    assert not _last_used(shop).startswith("2017-")
    age(_image(shop))
    for program in programs:
        _end(program)
    wait_until(lambda: _marks(shop) == {}, what=lambda: f"the end of {_marks(shop)}")
    assert not _last_used(shop).startswith("2017-")
    assert b"LAST USED" in shop.hpcctr("images", user=alice).stdout


def test_the_mark_of_a_users_own_image_is_only_the_owners_to_see(shop: Node, alice: User, place: Path) -> None:
    archive = write_oci_archive(place / "mine.tar", busybox())
    os.chown(archive, alice.uid, alice.gid)
    shop.hpcctr("pull", f"oci-archive:{archive}", user=alice)
    program = _begin(shop, "localhost/mine:latest", alice)
    (directory,) = _marks(shop)
    assert directory.startswith(f"users/{alice.uid}/images/")
    assert shop.host.run(["ls", f"{shop.site.store}/{directory}"], user=alice, check=False).returncode != 0
    _end(program)
    (row,) = json.loads(shop.hpcctr("images", "--mine", "--format", "json", user=alice).stdout)
    assert row["last_used"].startswith("20")
    assert b" that your own images may take" in shop.hpcctr("images", "--mine", user=alice).stderr


def test_a_launch_whose_image_is_mounted_asks_nothing_more_of_the_store(shop: Node, alice: User) -> None:
    program = _begin(shop, "app:1", alice)
    age(_image(shop))
    before = os.stat(_image(shop) / "uses").st_ctime_ns
    shop.run("app:1", "true", user=alice)
    assert os.stat(_image(shop) / "uses").st_ctime_ns == before
    assert _last_used(shop).startswith("2017-")
    _end(program)


def test_what_another_node_runs_stays_until_it_has_ended(shop: Node, neighbour: Node, alice: User) -> None:
    program = _begin(neighbour, "app:1", alice)
    (digest,) = [path.name.replace("-", ":") for path in (shop.site.store / "images").iterdir()]
    removed = shop.hpcctr("rm", "app:1")
    assert b"programs run in it on n8: its file stays" in removed.stderr and b"0 B freed" in removed.stderr
    assert digest in removed.stdout.decode()
    # For whoever comes now it is gone; who runs it keeps it, on whatever node gc is started.
    for node in (shop, neighbour):
        assert (
            b"image-not-in-store" in node.run("app:1", "true", user=alice, flags=["--pull", "never"], check=125).stderr
        )
    age(shop.site.store / "leaving")
    for node in (shop, neighbour):
        assert _gone(node, "--older-than", "0", "--mark-days", "36500") == []
    _end(program)
    wait_until(lambda: _marks(shop) == {}, what=lambda: f"the end of {_marks(shop)}")
    assert _gone(shop) == ["removed image"]
    assert list((shop.site.store / "leaving").iterdir()) == []


def test_a_dead_nodes_marks_go_by_an_administrators_word_or_with_their_days(shop: Node, busybox_image: str) -> None:
    directory = _image(shop)
    for node in ("n9", "n90"):
        (directory / f"uses/{node}+gateway+{'a' * 32}").touch()
    shop.hpcctr("rm", "app:1")
    (aside,) = (shop.site.store / "leaving").iterdir()
    assert _gone(shop) == []
    assert b"1 marks of n9 would be removed" in shop.hpcctr("gc", "--forget-node", "n9", "--dry-run").stderr
    assert b"1 marks of n9 removed" in shop.hpcctr("gc", "--forget-node", "n9").stderr
    assert [path.name.partition("+")[0] for path in (aside / "uses").iterdir()] == ["n90"]
    for wrong in ("../n90", "n90+gateway", ""):
        refused = shop.hpcctr("gc", "--forget-node", wrong, check=125).stderr
        assert b"not the name of a node" in refused
    assert _gone(shop) == []
    age(aside)
    assert _gone(shop) == ["removed image"]


@pytest.mark.parametrize("kill", [False, True])
def test_an_engine_that_starts_makes_its_nodes_marks_true(shop: Node, alice: User, kill: bool) -> None:
    node, directory = os.uname().nodename, _image(shop)
    program, direct = _begin(shop, "app:1", alice), _begin(shop, "app:1", None)
    before = _marks(shop)
    shop.engine.stop(kill=kill)
    # Of a boot before, of a direct engine that was killed; and what is another node's.
    for name in (f"{node}+gateway", f"{node}+direct-1", "n9+gateway"):
        (directory / f"uses/{name}+{'a' * 32}").touch()
    shop.engine.restart()
    now = {key: {*marks, "n9+gateway"} for key, marks in before.items()}
    wait_until(
        lambda: _marks(shop) == now and len(list((directory / "uses").iterdir())) == 3,
        what=lambda: f"{now}, not {sorted((directory / 'uses').iterdir())}",
    )
    # Without it the running program's mark is made anew.
    shop.engine.stop(kill=kill)
    for path in (directory / "uses").glob(f"{node}+gateway+*"):
        path.unlink()
    shop.engine.restart()
    wait_until(lambda: _marks(shop) == now, what=lambda: f"{now}, not {_marks(shop)}")
    _end(program)
    _end(direct)
    wait_until(lambda: list(_marks(shop).values()) == [{"n9+gateway"}], what=lambda: f"the end of {_marks(shop)}")


def test_a_direct_engine_that_was_killed_leaves_a_mark_until_the_gateway_starts(shop: Node) -> None:
    direct = _begin(shop, "app:1", None)
    assert len(_marks(shop)) == 1
    direct.send_signal(signal.SIGKILL)
    direct.wait()
    shop.engine.restart()
    wait_until(lambda: _marks(shop) == {}, what=lambda: f"the end of {_marks(shop)}")


def test_an_image_that_is_being_removed_is_not_started(shop: Node, alice: User) -> None:
    (_image(shop) / "uses").rmdir()
    for user in (alice, None):
        refused = shop.run("app:1", "true", user=user, flags=["--pull", "never"], check=125).stderr
        assert b"error[image-not-in-store]" in refused and b"is being removed" in refused
    shop.hpcctr("gc")
    assert not (_image(shop) / "uses").exists()
    age(_image(shop))
    shop.hpcctr("gc")
    shop.run("app:1", "true", user=alice)


def test_where_the_store_is_read_only_launches_cost_nothing_but_the_mark(shop: Node, alice: User) -> None:
    assert b"gc knows what runs here" in shop.hpcctr("doctor", check=False).stdout
    store = str(shop.site.store)
    shop.host.run(["mount", "--bind", store, store])
    shop.host.run(["mount", "-o", "remount,bind,ro", store])
    try:
        for user in (alice, None):
            shop.run("app:1", "true", user=user)
        assert _marks(shop) == {}
        assert shop.engine.log().count("uses of images are not marked in the store: Read-only file system") == 1
        assert b"gc does not know what runs here" in shop.hpcctr("doctor", check=False).stdout
    finally:
        wait_until(lambda: not [m for m in shop.host.mounts() if m.kind == "squashfs"], what="unmounted images")
        shop.host.run(["umount", store])


def test_a_full_store_loses_unnamed_images_and_named_ones_when_asked(
    own_node_with_busybox: Profile, place: Path
) -> None:
    node = own_node_with_busybox.node
    archive = write_oci_archive(place / "old.tar", busybox(layers=[]))
    node.pull(f"oci-archive:{archive}")
    assert _gone(node, "--keep-bytes", "0", "--unused") == []
    for directory in (node.site.store / "images").iterdir():
        age(directory)
    program = _begin(node, own_node_with_busybox.image, own_node_with_busybox.user)
    try:
        assert _gone(node, "--keep-bytes", "0") == []
        assert b"--unused" in node.hpcctr("gc", "--keep-bytes", "0").stderr
        names = json.loads(node.hpcctr("images", "--format", "json").stdout)
        expected = ["named image"] if len({row["digest"] for row in names}) == 2 else []
        assert _gone(node, "--keep-bytes", "0", "--unused", "--dry-run") == expected
        assert _gone(node, "--keep-bytes", "0", "--unused") == expected
    finally:
        _end(program)
    for wrong in (["--unused"], ["--keep-bytes", "lots"]):
        assert b"error[usage]" in node.hpcctr("gc", *wrong, check=125).stderr
