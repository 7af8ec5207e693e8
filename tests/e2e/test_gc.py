"""`hpcctr gc` takes away what nobody can want, says what, and touches nothing that runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import Profile
from tests.support.node import Node
from tests.support.oci import Image, file, tar, write_layout
from tests.support.polling import wait_until
from tests.support.users import User

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a node of its own")

Gone = Callable[..., list[tuple[str, str]]]
LONG_AGO = 1_500_000_000


def age(path: Path) -> None:
    """Let all below a path have been written years ago."""
    for entry in sorted(path.rglob("*"), reverse=True):
        os.utime(entry, (LONG_AGO, LONG_AGO), follow_symlinks=False)
    os.utime(path, (LONG_AGO, LONG_AGO))


def unname(node: Node, name: str, place: Path) -> str:
    """Let a name mean another image, since years ago; the digest it meant."""
    (record,) = node.site.store.glob("names/**/*.json")
    before = json.loads(record.read_text())["history"][0]["digest"]
    other = write_layout(place / "other", Image(layers=(tar(file("other")),)))
    node.hpcctr("pull", f"oci:{other}", "--name", name)
    record.write_text(re.sub(r'"since": "[^"]*"', '"since": "2020-01-01T00:00:00Z"', record.read_text()))
    age(node.site.store / "images" / before.replace(":", "-"))
    return str(before)


@pytest.fixture
def gone(own_node: Node) -> Gone:
    """What gc says, by kind and what."""

    def run(*flags: str) -> list[tuple[str, str]]:
        rows = json.loads(own_node.hpcctr("gc", "--format", "json", *flags).stdout)
        return [(row["kind"], row["what"]) for row in rows]

    return run


def test_what_was_left_goes_and_a_dry_run_only_tells(own_node_with_busybox: Profile, place: Path, gone: Gone) -> None:
    node, store = own_node_with_busybox.node, own_node_with_busybox.node.site.store
    private = store / "users/61000"
    for top in (store, private):
        for name in ("tmp/pull-1-aaaa", "blobs/sha256-b", "claims/sha256-c"):
            (top / name).mkdir(parents=True)
            (top / name / "part").write_text("x")
            age(top / name)
    (store / "tmp/living").mkdir()
    node.hpcctr("pull", own_node_with_busybox.image, "--name", "old:1")
    kept = {json.loads(path.read_text())["name"] for path in store.glob("names/**/*.json")}
    expected = [
        ("unfinished pull", "tmp/pull-1-aaaa"),
        ("blobs", "blobs/sha256-b"),
        ("claim", "claims/sha256-c"),
        ("unfinished pull", "users/61000/tmp/pull-1-aaaa"),
        ("blobs", "users/61000/blobs/sha256-b"),
        ("claim", "users/61000/claims/sha256-c"),
    ]
    assert gone("--dry-run") == expected
    assert gone() == expected
    assert gone() == []
    assert (store / "tmp/living").is_dir()
    assert {json.loads(path.read_text())["name"] for path in store.glob("names/**/*.json")} == kept
    assert b"0 B freed" in node.hpcctr("gc").stderr


def test_an_image_without_a_name_goes_but_never_under_a_running_program(
    own_node: Node, busybox_image: str, alice: User, place: Path, gone: Gone
) -> None:
    own_node.hpcctr("pull", busybox_image, "--name", "app:1")
    process = own_node.popen(
        *("run", "app:1", "--", "sh", "-c", "echo ready; read line; cat /bin/busybox >/dev/null && echo $line"),
        user=alice,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    digest = unname(own_node, "app:1", place)
    assert gone() == []
    assert process.communicate(b"still here\n", timeout=30)[0] == b"still here\n"
    # The engine unmounts the image once nobody has needed it for a while; days count from then.
    directory = own_node.site.store / "images" / digest.replace(":", "-")
    wait_until(lambda: not list((directory / "uses").iterdir()), what="the end of its use")
    assert gone("--older-than", "0") == []
    age(directory)
    assert gone() == [("image", digest)]
    assert not directory.exists()


def test_only_the_stores_owner_puts_it_in_order(own_node_with_busybox: Profile) -> None:
    done = own_node_with_busybox.node.hpcctr("gc", user=own_node_with_busybox.user, check=126)
    assert done.stderr.startswith(b"hpcctr: error[caller-refused]: hpcctr gc is for root and the store's owner")
