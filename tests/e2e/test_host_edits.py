"""Containers with something of the host's in them: all that is done with containers is done with these as well."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.node import Node, node
from tests.support.polling import wait_until
from tests.support.scratch import scratch
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]


@pytest.fixture(scope="module")
def tree() -> Iterator[Path]:
    """A directory of the site's."""
    with scratch("site-tree") as directory:
        (directory / "sub").mkdir()
        (directory / "sub/file").write_text("of the host\n")
        yield directory


@pytest.fixture(scope="module")
def equipped(tree: Path, busybox_image: str) -> Iterator[Node]:
    """A node with a profile that shows the directory."""
    with scratch("edited") as place, node(place, linger_seconds=3600) as made:
        profiles = made.site.file.parent / "profiles.d"
        profiles.mkdir(mode=0o755)
        (profiles / "tree.toml").write_text(f'directories = ["{tree}"]\n')
        made.pull(busybox_image)
        yield made


FEATURE = ("--feature", "tree")


@pytest.mark.parametrize("who", ["alice", "root"])
def test_a_directory_of_a_profile_is_seen_and_cannot_be_changed(
    equipped: Node, tree: Path, who: str, alice: User, busybox_image: str
) -> None:
    script = f"cat {tree}/sub/file; echo x > {tree}/sub/file"
    user = alice if who == "alice" else None
    done = equipped.run(busybox_image, "sh", "-c", script, user=user, flags=FEATURE, check=False)
    assert done.stdout == b"of the host\n", done.stderr
    assert b"can't create" in done.stderr
    assert equipped.run(busybox_image, "ls", str(tree), user=user, check=False).returncode != 0


def test_exec_ps_and_cleanup_work_as_in_any_other(equipped: Node, tree: Path, alice: User, busybox_image: str) -> None:
    with equipped.held(busybox_image, user=alice, flags=FEATURE) as program:
        seen = equipped.hpcctr("exec", str(program.pid), "--", "cat", f"{tree}/sub/file", user=alice)
        assert seen.stdout == b"of the host\n"
        listed = equipped.hpcctr("ps", user=alice).stdout.decode()
        assert str(program.pid) in listed
        equipped.engine.restart()
        seen = equipped.hpcctr("exec", str(program.pid), "--", "cat", f"{tree}/sub/file", user=alice)
        assert seen.stdout == b"of the host\n"
        assert len(equipped.containerd.containers()) >= 1
    equipped.hpcctr("cleanup")
    wait_until(lambda: equipped.containerd.containers() == (), what="removal")


def test_the_callers_own_mounts_go_over_and_into_it(
    equipped: Node, tree: Path, place: Path, alice: User, busybox_image: str
) -> None:
    mine = place / "mine"
    mine.mkdir()
    (mine / "file").write_text("of alice\n")
    for target, shown in (
        (tree, tree / "file"),
        (tree / "sub", tree / "sub/file"),
        (tree.parent, tree.parent / "file"),
    ):
        flags = (*FEATURE, "-v", f"{mine}:{target}")
        assert equipped.run(busybox_image, "cat", str(shown), user=alice, flags=flags).stdout == b"of alice\n"
    flags = (*FEATURE, "-v", f"{mine}:{tree}/none")
    done = equipped.run(busybox_image, "true", user=alice, flags=flags, check=126)
    assert done.stderr.startswith(b"hpcctr: error[mount-target]: ")
    assert f"{tree}/none".encode() in done.stderr
