"""Node containers through a node's life: one for many launches, gone when nobody needs it, found again after a
restart.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.conftest import Profile
from tests.support.leftovers import Leftovers, require_nothing_new
from tests.support.node import node
from tests.support.polling import wait_until
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]


def _require_only_a_new_engine(before: Leftovers) -> None:
    """Nothing is new but the engine's own process."""

    def new() -> list[str]:
        return [thing for thing in before.again().new_since(before) if "engine serve" not in thing]

    wait_until(lambda: not new(), seconds=15, what=lambda: f"the end of {new()}")


def test_many_launches_at_once_share_one_container(own_node_with_busybox: Profile) -> None:
    profile = own_node_with_busybox
    with ThreadPoolExecutor(16) as pool:
        done = list(pool.map(lambda number: profile.output("echo", str(number)), range(48)))
    assert sorted(map(int, done)) == list(range(48))
    containerd = profile.node.containerd
    assert len(containerd.created()) == 1
    assert set(containerd.tasks().values()) <= {"CREATED"}


def test_a_container_that_nobody_uses_is_removed_with_everything(own_node_with_busybox: Profile) -> None:
    profile = own_node_with_busybox
    before = Leftovers.of(profile.node.host, profile.node.containerd)
    process = profile.start()[0]
    assert len(profile.node.containerd.containers()) == 1
    process.communicate()
    require_nothing_new(before)


def test_users_images_and_targets_have_containers_of_their_own(own_node_with_busybox: Profile, bob: User) -> None:
    profile = own_node_with_busybox
    others = Profile(name="bob", node=profile.node, user=bob, image=profile.image)
    started = [profile.start(), profile.start(), others.start(), profile.start(flags=["-v", "/var:/there"])]
    assert len(profile.node.containerd.containers()) == 3
    for process, _ in started:
        process.communicate()


def test_a_restarted_engine_finds_its_containers_again(own_node_with_busybox: Profile) -> None:
    profile = own_node_with_busybox
    before = Leftovers.of(profile.node.host, profile.node.containerd)
    for kill in (False, True):
        process = profile.start()[0]
        containers = profile.node.containerd.containers()
        profile.node.engine.restart(kill=kill)
        assert profile.output("echo", "again") == "again\n"
        assert profile.node.containerd.containers() == containers
        process.communicate()
        _require_only_a_new_engine(before)


def test_a_restart_that_finds_no_member_removes_the_container(own_node_with_busybox: Profile) -> None:
    profile = own_node_with_busybox
    before = Leftovers.of(profile.node.host, profile.node.containerd)
    process = profile.start()[0]
    profile.node.engine.stop(kill=True)
    process.communicate()
    assert profile.node.containerd.containers()
    profile.node.engine.restart()
    _require_only_a_new_engine(before)


def test_a_killed_anchor_does_not_matter(own_node_with_busybox: Profile) -> None:
    profile = own_node_with_busybox
    process = profile.start()[0]
    rows = profile.node.containerd.ctr("tasks", "list").splitlines()[1:]
    anchor = int(rows[0].split()[1])
    # It runs as its user, who may kill it.
    profile.node.host.run(["kill", "-9", str(anchor)], user=profile.user)
    wait_until(lambda: not Path(f"/proc/{anchor}").exists() or "Z" in Path(f"/proc/{anchor}/stat").read_text())
    assert profile.output("echo", "still") == "still\n"
    process.communicate()


def test_direct_mode_leaves_nothing_whatever_ends_it(own_node_with_busybox: Profile) -> None:
    profile = own_node_with_busybox
    direct = Profile(name="direct", node=profile.node, user=None, image=profile.image)
    before = Leftovers.of(profile.node.host, profile.node.containerd)
    direct.run("no-such-program", check=127)
    direct.run("sh", "-c", "kill -9 $$", check=-9)
    process = direct.start()[0]
    process.terminate()
    assert process.wait(20) == -15
    process.communicate()
    require_nothing_new(before)


def test_what_a_killed_direct_engine_left_is_removed_by_the_next(own_node_with_busybox: Profile) -> None:
    profile = own_node_with_busybox
    direct = Profile(name="direct", node=profile.node, user=None, image=profile.image)
    before = Leftovers.of(profile.node.host, profile.node.containerd)
    process = direct.start()[0]
    process.kill()
    process.wait(20)
    command = Path(f"/proc/{process.pid}")
    wait_until(lambda: not command.exists())
    assert process.stdin is not None
    process.stdin.close()
    assert profile.node.containerd.containers()
    direct.run("true")
    assert process.stdout is not None
    process.stdout.close()
    require_nothing_new(before)


def test_ps_lists_the_callers_programs(own_node_with_busybox: Profile, bob: User) -> None:
    profile = own_node_with_busybox
    process = profile.start()[0]
    listing = profile.node.hpcctr("ps", user=profile.user).stdout.decode()
    assert f"{process.pid} " in listing and "busybox" in listing and "cat" in listing
    assert str(process.pid) not in profile.node.hpcctr("ps", user=bob).stdout.decode()
    assert str(process.pid) in profile.node.hpcctr("ps").stdout.decode()
    process.communicate()


def test_crun_builds_containers_where_only_cgroup2_is_shown(place: Path, alice: User, busybox_image: str) -> None:
    with node(place, runtime="crun", cgroup2_only=True) as started:
        started.pull(busybox_image)
        before = Leftovers.of(started.host, started.containerd)
        profile = Profile(name="crun", node=started, user=alice, image=busybox_image)
        assert profile.output("id", "-u") == f"{alice.uid}\n"
        assert profile.output("cat", "/proc/self/cgroup") == profile.native("cat", "/proc/self/cgroup")
        require_nothing_new(before)


def test_runc_builds_containers_where_only_cgroup2_is_shown(place: Path, alice: User, busybox_image: str) -> None:
    with node(place, cgroup2_only=True) as started:
        started.pull(busybox_image)
        before = Leftovers.of(started.host, started.containerd)
        assert started.run(busybox_image, "id", "-u", user=alice).stdout == f"{alice.uid}\n".encode()
        require_nothing_new(before)


def test_mounts_of_programs_stay_off_a_host_whose_mounts_are_shared(
    place: Path, alice: User, busybox_image: str
) -> None:
    with node(place, propagation="shared") as started:
        started.pull(busybox_image)
        before = {mount.target for mount in started.host.mounts()}
        profile = Profile(name="shared", node=started, user=alice, image=busybox_image)
        process = profile.start()[0]
        new = {mount.target for mount in started.host.mounts()} - before
        own = ("/run/hpcctr/", "/run/containerd/", str(place))
        assert all(target.startswith(own) for target in new), new
        assert "shared:" not in Path(f"/proc/{process.pid}/mountinfo").read_text()
        process.communicate()
