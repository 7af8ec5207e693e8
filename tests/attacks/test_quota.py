"""Attacks on a user's byte quota: many imports at once, images larger than their archives or removed while they run."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.node import Node, node
from tests.support.oci import Image, busybox, file, tar, write_oci_archive
from tests.support.registry import Registry
from tests.support.scratch import scratch
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]

OWNER = 61905
LIMIT = 6_000_000
#: What a shared filesystem's clients may not know of each other yet, and records and directories.
SLACK = 400_000


@pytest.fixture
def small() -> Iterator[Node]:
    """A node where a user's own images may take 6 MB."""
    with scratch("quota") as place, node(place, more=f"[limits]\nbytes-per-uid = {LIMIT}\n") as started:
        os.chown(started.site.store, OWNER, OWNER)
        yield started


def _archive(place: Path, name: str, size: int, user: User) -> Path:
    path = write_oci_archive(place / f"{name}.tar", Image(layers=(tar(file("x", os.urandom(size))),)))
    os.chown(path, user.uid, user.gid)
    return path


def _taken(on: Node, user: User) -> int:
    mine = on.site.store / f"users/{user.uid}"
    return sum(path.lstat().st_size for path in mine.rglob("*") if path.is_file())


def _ended(processes: list[subprocess.Popen[bytes]]) -> list[tuple[int, bytes]]:
    said = [process.communicate(timeout=120)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def test_imports_at_once_keep_to_the_limit_together(small: Node, alice: User, bob: User) -> None:
    place = small.host.root
    archives = [_archive(place, f"a{number}", 2_500_000, alice) for number in range(6)]
    imports = [small.popen("pull", f"oci-archive:{path}", user=alice, stderr=-1, stdout=-1) for path in archives]
    ended = _ended(imports)
    refused = [text for status, text in ended if status]
    assert len(refused) >= 4, ended
    assert all(b"error[store]" in text and b"bytes-per-uid" in text for text in refused), refused
    assert _taken(small, alice) <= LIMIT + SLACK
    # One after the other, what has room comes; and another user has a room of their own.
    for path in archives:
        small.hpcctr("pull", f"oci-archive:{path}", user=alice, check=False)
    rows = json.loads(small.hpcctr("images", "--mine", "--format", "json", user=alice).stdout)
    assert len(rows) == 2
    assert _taken(small, alice) <= LIMIT + SLACK
    small.hpcctr("pull", f"oci-archive:{_archive(place, 'bob', 2_500_000, bob)}", user=bob)


def test_an_image_that_is_larger_than_its_archive_keeps_to_the_limit(small: Node, alice: User) -> None:
    """Bytes that repeat further apart than a block of a squashfs is long, and within the window of a zstd layer."""
    block = os.urandom(200_000)
    layer = tar(*(file(f"x{number}", block[number:] + block[:number]) for number in range(60)))
    path = write_oci_archive(small.host.root / "long.tar", Image(layers=(layer,), compression="zstd"))
    assert path.stat().st_size < LIMIT // 2 < LIMIT < len(gzip.compress(layer, 1))
    os.chown(path, alice.uid, alice.gid)
    done = small.hpcctr("pull", f"oci-archive:{path}", user=alice, check=125)
    assert b"error[conversion]" in done.stderr or b"error[store]" in done.stderr, done.stderr
    assert _taken(small, alice) <= SLACK


def test_credentialed_pulls_keep_to_the_limit(small: Node, alice: User) -> None:
    with Registry.start(small.host.root / "registry") as registry:
        names = []
        for number in range(4):
            layer = tar(file("x", os.urandom(2_500_000)))
            registry.push_image(f"app{number}", "1", busybox(layers=[layer]))
            names.append(f"{registry.address}/app{number}:1")
        pulls = [small.popen("pull", "--private", name, user=alice, stderr=-1, stdout=-1) for name in names]
        ended = _ended(pulls)
    assert sum(status == 0 for status, _ in ended) <= 2, ended
    assert _taken(small, alice) <= LIMIT + SLACK


def test_what_is_removed_while_it_runs_counts_until_it_has_gone(small: Node, alice: User) -> None:
    path = write_oci_archive(small.host.root / "run.tar", busybox(layers=[tar(file("x", os.urandom(2_600_000)))]))
    os.chown(path, alice.uid, alice.gid)
    small.hpcctr("pull", f"oci-archive:{path}", user=alice)
    words = ("run", "localhost/run:latest", "--", "sh", "-c", "echo; cat")
    program = small.popen(*words, user=alice, stdin=-1, stdout=-1)
    assert program.stdout is not None and program.stdout.readline()
    said = small.hpcctr("rm", "localhost/run:latest", user=alice).stderr
    assert b"its file stays" in said
    other = _archive(small.host.root, "other", 2_600_000, alice)
    done = small.hpcctr("pull", f"oci-archive:{other}", user=alice, check=125)
    assert b"bytes-per-uid" in done.stderr
    program.communicate(timeout=30)
