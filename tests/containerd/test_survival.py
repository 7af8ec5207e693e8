"""What outlives the death of engine, containerd, shim and anchor, and what is cleared away after it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcctr.containerd import Containerd as Client
from hpcctr.errors import ContainerdFailed, HpcctrError
from tests.support import containerd as containerds
from tests.support.containerd import Containerd
from tests.support.host import Host
from tests.support.mountinfo import read_mountinfo
from tests.support.node_engine import Got, NodeEngine, launch, node_engine
from tests.support.polling import wait_until
from tests.support.processes import Process
from tests.support.scratch import scratch

pytestmark = [pytest.mark.root, pytest.mark.containerd]


def _anchor(containerd: Containerd, container_id: str) -> int:
    rows = [line.split() for line in containerd.ctr("tasks", "list").splitlines()]
    return next(int(row[1]) for row in rows if row[0] == container_id)


def _squashfs(containerd: Containerd) -> int:
    return sum(mount.kind == "squashfs" for mount in containerd.host.mounts())


def _end(member: subprocess.Popen[bytes]) -> None:
    member.kill()
    member.wait()


def test_a_container_in_use_is_taken_over_by_the_next_engine(clean: Containerd, image: Path) -> None:
    first = launch(clean, image)
    used, unused = first.get(), first.get(uid=61001)
    member = first.enter(used)
    first.kill()
    with node_engine(clean, image, linger_seconds=0.3) as second:
        second.call("adopt")
        assert second.call("listing") == {used.container_id: [member.pid]}
        assert clean.containers() == (used.container_id,)
        again = second.get()
        assert again.container_id == used.container_id
        assert os.stat(again.namespace).st_ino == os.stat(f"/proc/{member.pid}/ns/mnt").st_ino
        assert second.call("images_opened") == 0
        assert (_squashfs(clean), unused.container_id in clean.tasks()) == (1, False)
        second.call("forget")
        _end(member)
        wait_until(lambda: clean.containers() == (), what="removal")
        wait_until(lambda: _squashfs(clean) == 0, what="removal of the image mount")


def test_a_container_that_goes_lets_go_of_its_namespace_whoever_remembers_it(clean: Containerd, image: Path) -> None:
    """Else the kernel keeps the image's loop device for as long as Python keeps the value."""
    first = launch(clean, image)
    used = first.get()
    member = first.enter(used)
    first.kill()
    with node_engine(clean, image, linger_seconds=0.1) as second:
        second.call("adopt")
        second.call("remember")
        held = second.call("descriptors")
        _end(member)
        wait_until(lambda: clean.containers() == (), what="removal")
        # The namespace's, and that of the member.
        wait_until(lambda: second.call("descriptors") == held - 2, what="the end of the namespace")


def test_nothing_is_left_of_an_engine_that_died_without_members(clean: Containerd, image: Path) -> None:
    first = launch(clean, image)
    for uid in (61000, 61001):
        first.get(uid=uid, targets=[("d", "/home/u")])
    first.kill()
    with node_engine(clean, image) as second:
        second.call("adopt")
        assert clean.containers() == ()
        assert _squashfs(clean) == 0
        for part in ("containers", "images"):
            assert os.listdir(clean.host.path(second.state) / part) == []


def test_a_stopping_gateway_leaves_containers_in_use_to_the_next(clean: Containerd, image: Path) -> None:
    first = launch(clean, image)
    used = first.get()
    first.get(uid=61001)
    member = first.enter(used)
    first.close(remove=False)
    assert clean.containers() == (used.container_id,)
    with node_engine(clean, image) as second:
        assert second.get().container_id == used.container_id
        _end(member)


def test_a_dead_anchor_is_replaced_after_a_restart_while_the_program_goes_on(clean: Containerd, image: Path) -> None:
    first = launch(clean, image)
    old = first.get()
    member = first.enter(old)
    os.kill(_anchor(clean, old.container_id), 9)
    first.kill()
    with node_engine(clean, image) as second:
        new = second.get()
        assert new.container_id != old.container_id
        assert clean.containers() == (new.container_id,)
        assert member.poll() is None
        root = Path(f"/proc/{member.pid}/root")
        assert (root / "etc/os-release").read_text() == "ID=busybox\n"
        _end(member)


@pytest.mark.parametrize("kill", [True, False])
def test_containers_outlive_containerd(clean: Containerd, image: Path, kill: bool) -> None:
    with node_engine(clean, image) as engine:
        got = engine.get()
        member = engine.enter(got)
        clean.restart(kill=kill)
        assert clean.tasks() == {got.container_id: "CREATED"}
        assert engine.get().container_id == got.container_id
        assert engine.run_inside(got, "/bin/cat", "/etc/os-release") == "ID=busybox\n"
        _end(member)
        engine.get(uid=61001)


def test_what_ends_while_containerd_is_away_is_removed_when_it_is_back(clean: Containerd, image: Path) -> None:
    with node_engine(clean, image, linger_seconds=0.1, retry_seconds=0.3) as engine:
        got = engine.get()
        member = engine.enter(got)
        clean.process.kill()
        clean.process.wait()
        _end(member)
        wait_until(lambda: engine.call("listing") == {}, what="the end of the linger")
        clean.restart()
        wait_until(lambda: clean.containers() == (), what="removal")


def test_the_namespace_outlives_the_shim(clean: Containerd, image: Path) -> None:
    with node_engine(clean, image, linger_seconds=0.1, retry_seconds=0.3) as engine:
        got = engine.get()
        member = engine.enter(got)
        os.kill(Process.read(_anchor(clean, got.container_id)).ppid, 9)
        wait_until(lambda: clean.tasks() == {}, what="containerd's clean-up after the shim")
        assert engine.get().container_id == got.container_id
        assert engine.run_inside(got, "/bin/cat", "/etc/os-release") == "ID=busybox\n"
        engine.call("forget")
        _end(member)
        wait_until(lambda: clean.containers() == (), what="removal")


def test_a_container_an_administrator_removed_is_no_trouble(clean: Containerd, image: Path) -> None:
    with node_engine(clean, image, linger_seconds=0.1) as engine:
        got = engine.get()
        member = engine.enter(got)
        clean.ctr("tasks", "delete", "--force", got.container_id)
        clean.ctr("containers", "delete", got.container_id)
        assert engine.run_inside(got, "/bin/cat", "/etc/os-release") == "ID=busybox\n"
        engine.call("forget")
        _end(member)
        wait_until(lambda: engine.call("listing") == {}, what="removal")
        engine.get()


def test_the_next_engine_clears_away_after_a_killed_direct_one(clean: Containerd, image: Path) -> None:
    direct = launch(clean, image, state="/run/hpcctr/direct-4242", owner="direct-4242")
    direct.get(uid=0)
    alive = launch(clean, image, state="/run/hpcctr/direct-4243", owner="direct-4243")
    kept = alive.get(uid=0)
    direct.kill()
    with node_engine(clean, image) as engine:
        engine.call("adopt")
        assert clean.containers() == (kept.container_id,)
        assert not os.path.exists(clean.host.path("/run/hpcctr/direct-4242"))
        assert alive.run_inside(kept, "/bin/cat", "/etc/os-release", uid=0) == "ID=busybox\n"
    alive.close(remove=True)
    assert not os.path.exists(clean.host.path("/run/hpcctr/direct-4243"))


def test_records_that_outlived_a_reboot_are_removed(clean: Containerd, image: Path) -> None:
    client = Client(str(clean.socket))
    for owner in ("direct-77", "gateway"):
        client.create_container(
            f"{'0' * 32}-{len(owner):08}", labels={"hpcctr.owner": owner, "hpcctr.uid": "0"}, spec={}
        )
    client.create_container("foreign", labels={"hpcctr.owner": "somebody-else"}, spec={})
    client.close()
    with node_engine(clean, image) as engine:
        engine.call("adopt")
        assert clean.containers() == ("foreign",)
    clean.ctr("containers", "delete", "foreign")


_IMPOSTOR = """
set -e
mount -t tmpfs tmpfs /run
mkdir -p {upper} {upper}.work /run/lower /run/root
mount -t overlay -o lowerdir=/run/lower,upperdir={upper},workdir={upper}.work,userxattr overlay /run/root
mkdir /run/root/old
cd /run/root
pivot_root . old
exec old/usr/bin/busybox sh -c 'echo ready; exec /old/usr/bin/busybox cat'
"""


@pytest.fixture
def impostor(engine: NodeEngine) -> Iterator[tuple[Got, int]]:
    """A container, and a process of its user in a namespace the user made, with a mount table that reads the same."""
    got = engine.get()
    upper = f"{engine.state}/containers/{got.container_id}/upper"
    user = ["setpriv", "--reuid=61000", "--regid=61000", "--clear-groups", "--inh-caps=-all"]
    process = engine.host.popen(
        [*user, "unshare", "--user", "--map-root-user", "--mount", "sh", "-c", _IMPOSTOR.format(upper=upper)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    (root,) = [mount for mount in read_mountinfo(Path(f"/proc/{process.pid}/mountinfo")) if mount.target == "/"]
    assert root.kind == "overlay"
    yield got, process.pid
    process.kill()
    process.wait()


def test_a_namespace_a_user_made_is_never_taken_for_the_container(
    engine: NodeEngine, impostor: tuple[Got, int]
) -> None:
    got, pid = impostor
    with pytest.raises(ContainerdFailed, match="its namespace is not root's"):
        engine.call("open_namespace", got.container_id, pid)


def test_a_namespace_a_user_made_keeps_no_container(
    clean: Containerd, image: Path, engine: NodeEngine, impostor: tuple[Got, int]
) -> None:
    engine.kill()
    with node_engine(clean, image) as second:
        second.call("adopt")
        assert second.call("listing") == {}
        assert clean.containers() == ()


def test_the_nodes_own_namespace_is_never_taken_for_the_container(engine: NodeEngine) -> None:
    got = engine.get()
    with pytest.raises(ContainerdFailed, match="the node's own"):
        engine.call("open_namespace", got.container_id, engine.process.pid)


def test_another_container_of_the_same_user_is_not_taken_for_this_one(engine: NodeEngine) -> None:
    one, other = engine.get(), engine.get(targets=[("d", "/other")])
    with pytest.raises(ContainerdFailed, match="not the overlay that was built for it"):
        engine.call("open_namespace", one.container_id, _anchor(engine.containerd, other.container_id))


def test_a_failing_build_leaves_nothing_at_all(engine: NodeEngine, clean: Containerd) -> None:
    # containerd records the container, and then cannot make its bundle.
    clean.host.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(clean.directory / "state")])
    try:
        with pytest.raises(HpcctrError):
            engine.get()
    finally:
        clean.host.run(["umount", str(clean.directory / "state")])
    assert clean.containers() == ()
    assert os.listdir(clean.host.path(engine.state) / "containers") == []
    assert _squashfs(clean) == 0


def test_crun_builds_it_where_cgroups_are_of_version_2_only(image: Path) -> None:
    with scratch("crun") as root, Host.start(root, cgroup2_only=True) as host:
        daemon = containerds.start(host)
        with node_engine(daemon, image, runtime="crun", linger_seconds=1.0) as engine:
            got = engine.get(uid=4711, targets=[("d", "/home/u")])
            assert daemon.tasks() == {got.container_id: "CREATED"}
            assert engine.run_inside(got, "/bin/cat", "/etc/os-release") == "ID=busybox\n"
            member = engine.enter(got)
            (where,) = [
                line
                for line in Path(f"/proc/{_anchor(daemon, got.container_id)}/cgroup").read_text().split()
                if line[:3] == "0::"
            ]
            assert where == f"0::/hpcctr-{got.container_id}"
            engine.call("forget")
            _end(member)
            wait_until(lambda: daemon.containers() == (), what="removal")
            cgroup2 = next(mount.target for mount in read_mountinfo() if mount.kind == "cgroup2")
            assert not os.path.exists(f"{cgroup2}/hpcctr-{got.container_id}")
        daemon.stop()


def test_runc_builds_it_where_cgroups_are_of_version_2_only(image: Path) -> None:
    with scratch("runc2") as root, Host.start(root, cgroup2_only=True) as host:
        daemon = containerds.start(host)
        with node_engine(daemon, image) as engine:
            got = engine.get()
            assert engine.run_inside(got, "/bin/cat", "/etc/os-release") == "ID=busybox\n"
        cgroup2 = next(mount.target for mount in read_mountinfo() if mount.kind == "cgroup2")
        assert not os.path.exists(f"{cgroup2}/hpcctr-{got.container_id}")
        daemon.stop()


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_nothing_propagates_on_a_node_whose_mounts_are_shared(image: Path, runtime: str) -> None:
    cgroup2_only = runtime == "crun"
    with scratch("shared") as root, Host.start(root, propagation="shared", cgroup2_only=cgroup2_only) as host:
        daemon = containerds.start(host)
        with node_engine(daemon, image, runtime=runtime) as engine:
            got = engine.get()
            table = read_mountinfo(Path(f"/proc/{_anchor(daemon, got.container_id)}/mountinfo"))
            assert {mount.target for mount in table} == {"/", "/proc", "/dev"}
            assert not [mount for mount in table if mount.tags]
            before = len(host.mounts())
            engine.host.run(
                ["nsenter", f"--mount={got.namespace}", "mount", "-t", "tmpfs", "none", "/tmp"], check=False
            )
            assert len(host.mounts()) == before
        assert not [mount for mount in host.mounts() if "hpcctr/" in mount.target]
        daemon.stop()
