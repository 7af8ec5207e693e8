"""What a node container is, on a real containerd and runtime."""

from __future__ import annotations

import json
import os
import signal
import stat
import time
from pathlib import Path

import pytest

from hpcctr.engine.members import is_anchor
from hpcctr.errors import ContainerdFailed, ContainerdUnavailable, EngineBusy, ImageMountFailed, TargetImpossible
from tests.support.containerd import Containerd
from tests.support.mountinfo import read_mountinfo
from tests.support.node_engine import NodeEngine, node_engine
from tests.support.polling import wait_until
from tests.support.processes import Process
from tests.support.scratch import scratch
from tests.support.squashfs import busybox_tree, make_squashfs

pytestmark = [pytest.mark.root, pytest.mark.containerd]


def _anchor(engine: NodeEngine, container_id: str) -> int:
    rows = [line.split() for line in engine.containerd.ctr("tasks", "list").splitlines()]
    return next(int(row[1]) for row in rows if row[0] == container_id)


def _cgroups(container_id: str) -> list[str]:
    return [
        f"{mount.target}/hpcctr-{container_id}"
        for mount in read_mountinfo()
        if mount.kind in ("cgroup", "cgroup2") and os.path.exists(f"{mount.target}/hpcctr-{container_id}")
    ]


def test_it_is_created_and_never_started(engine: NodeEngine) -> None:
    got = engine.get()
    assert engine.containerd.tasks() == {got.container_id: "CREATED"}
    assert got.container_id.startswith(got.key + "-")


def test_its_record_has_our_labels_and_no_others(engine: NodeEngine) -> None:
    got = engine.get(uid=4711)
    assert json.loads(engine.containerd.ctr("containers", "info", got.container_id))["Labels"] == {
        "hpcctr.key": got.key,
        "hpcctr.uid": "4711",
        "hpcctr.digest": "sha256:" + "a" * 64,
        "hpcctr.owner": "gateway",
    }


def test_its_root_is_the_image_read_only_under_an_overlay(engine: NodeEngine) -> None:
    got = engine.get()
    mounts = {
        mount.target: mount for mount in read_mountinfo(Path(f"/proc/{_anchor(engine, got.container_id)}/mountinfo"))
    }
    assert mounts.keys() == {"/", "/proc", "/dev"}
    assert mounts["/"].kind == "overlay"
    assert "ro" in mounts["/"].options.split(",")
    assert all(not mount.tags for mount in mounts.values())
    assert engine.run_inside(got, "/bin/cat", "/etc/os-release") == "ID=busybox\n"


def test_nobody_can_write_into_it(engine: NodeEngine) -> None:
    got = engine.get(targets=[("d", "/home/u")])
    for path in ("/x", "/tmp/x", "/home/u/x", "/etc/x"):
        assert engine.host.run(
            ["nsenter", f"--mount={got.namespace}", "/bin/touch", path], check=False
        ).stderr.endswith(b"Read-only file system\n")


def test_its_anchor_is_the_callers_and_can_gain_nothing(engine: NodeEngine) -> None:
    got = engine.get(uid=4711, gid=100, groups=[20, 44])
    anchor = _anchor(engine, got.container_id)
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{anchor}/status").read_text().splitlines())
    assert status["Uid"].split() == ["4711"] * 4
    assert status["Gid"].split() == ["100"] * 4
    assert set(status["Groups"].split()) == {"20", "44", "100"}
    assert [status[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")] == ["0" * 16] * 5
    assert status["NoNewPrivs"] == "1"
    assert Path(f"/proc/{anchor}/oom_score_adj").read_text() == "0\n"


def test_its_anchor_cannot_be_looked_into_by_its_user(engine: NodeEngine) -> None:
    anchor = _anchor(engine, engine.get().container_id)
    user = ["setpriv", "--reuid=61000", "--regid=61000", "--clear-groups", "--inh-caps=-all"]
    for place in ("root/etc", "fd", "cwd/", "map_files"):
        looked = engine.host.run([*user, "ls", f"/proc/{anchor}/{place}"], check=False)
        assert looked.stderr.endswith(b"Permission denied\n"), place
    for file in ("environ", "mem", "auxv"):
        assert engine.host.run([*user, "cat", f"/proc/{anchor}/{file}"], check=False).returncode != 0, file


def test_its_anchor_is_told_apart_from_programs_by_its_cgroup(engine: NodeEngine) -> None:
    got = engine.get()
    member = engine.enter(got)
    assert is_anchor(_anchor(engine, got.container_id))
    assert not is_anchor(member.pid)
    member.kill()


def test_all_namespaces_but_the_mount_namespace_are_the_nodes(engine: NodeEngine) -> None:
    anchor = _anchor(engine, engine.get().container_id)

    def namespaces(pid: int) -> dict[str, int]:
        return {
            name: os.stat(f"/proc/{pid}/ns/{name}").st_ino
            for name in ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
        }

    here, there = namespaces(engine.containerd.process.pid), namespaces(anchor)
    assert {name for name in here if here[name] != there[name]} == {"mnt"}


def test_its_cgroups_are_flat_and_go_with_it(clean: Containerd, image: Path) -> None:
    with node_engine(clean, image) as engine:
        got = engine.get()
        assert _cgroups(got.container_id)
    assert _cgroups(got.container_id) == []


def test_mount_points_are_made_in_the_upper_layer_only(engine: NodeEngine) -> None:
    got = engine.get(
        targets=[("d", "/home/u/project"), ("f", "/opt/tool"), ("d", "/usr/share"), ("d", "/usr/share/below")]
    )
    assert engine.run_inside(got, "/bin/stat", "-c", "%F %a %u", "/home/u/project").strip() == "directory 755 0"
    assert engine.run_inside(got, "/bin/stat", "-c", "%F %s", "/opt/tool").strip() == "regular empty file 0"
    assert (
        "No such file"
        in engine.host.run(
            ["nsenter", f"--mount={got.namespace}", "/bin/ls", "/usr/share/below"], check=False
        ).stderr.decode()
    )


def test_a_target_through_a_link_of_the_image_is_refused_and_leaves_nothing(engine: NodeEngine) -> None:
    for path in ("/var/run/x", "/escape/tmp/x"):
        with pytest.raises(TargetImpossible, match=f"mount target {path}: .*symbolic link"):
            engine.get(targets=[("d", path)])
    assert engine.containerd.containers() == ()
    assert os.listdir(engine.host.path(engine.state) / "containers") == []
    assert os.listdir(engine.host.path(engine.state) / "images") == []


def test_targets_with_more_directories_than_there_is_room_for_are_refused(engine: NodeEngine) -> None:
    deep = "/d" * 60
    targets = [("d", f"/{number:03}{deep}/{half}") for number in range(150) for half in "ab"]
    with pytest.raises(TargetImpossible, match="more directories than"):
        engine.get(targets=targets)


def test_the_caller_is_in_passwd_whatever_the_image_says(engine: NodeEngine) -> None:
    got = engine.get(uid=0, gid=0, passwd="root:x:0:0::/evil:/evil\nnode:x:1000:1000::/:/bin/sh\n")
    lines = engine.run_inside(got, "/bin/cat", "/etc/passwd").splitlines()
    assert lines[0].startswith("root:x:0:0:root:/root:")
    assert lines[1:] == ["node:x:1000:1000::/:/bin/sh"]


def test_the_hosts_names_and_time_are_there(engine: NodeEngine) -> None:
    got = engine.get()
    for name in ("resolv.conf", "hosts", "localtime"):
        path = Path("/etc") / name
        if path.exists():
            inside = engine.host.run(["nsenter", f"--mount={got.namespace}", "/bin/cat", f"/etc/{name}"]).stdout
            assert inside == path.read_bytes()


def test_one_image_is_mounted_once_however_many_containers_stand_on_it(engine: NodeEngine, image: Path) -> None:
    for uid in (61000, 61001, 61002):
        engine.get(uid=uid)
    mounted = [mount for mount in engine.host.mounts() if mount.kind == "squashfs"]
    assert len(mounted) == 1
    assert set(mounted[0].options.split(",")) >= {"ro", "nosuid", "nodev"}
    loop = Path("/sys/block") / Path(mounted[0].source).name
    assert (loop / "ro").read_text() == "1\n"
    assert (loop / "loop/autoclear").read_text() == "1\n"


def test_the_file_that_was_opened_is_mounted_even_when_its_name_is_swapped(engine: NodeEngine, image: Path) -> None:
    def marked(mark: str) -> Path:
        def fill(root: Path) -> None:
            busybox_tree(root)
            (root / "mark").write_text(mark)

        return make_squashfs(directory / mark, fill)

    with scratch("swap") as directory:
        first, second = marked("first"), marked("second")
        one = engine.get(uid=61000, digest="b", image=first)
        # The same digest is claimed for another file, as a private import could do.
        os.rename(second, first)
        other = engine.get(uid=61001, digest="b", image=first)
        assert engine.run_inside(one, "/bin/cat", "/mark") == "first"
        assert engine.run_inside(other, "/bin/cat", "/mark") == "second"


@pytest.mark.parametrize("content", [b"", b"\x7fELF" * 1000, b"hsqs" + b"\xff" * 8192])
def test_what_is_no_squashfs_is_not_mounted(engine: NodeEngine, content: bytes) -> None:
    with scratch("bad") as directory:
        file = directory / "root.squashfs"
        file.write_bytes(content)
        with pytest.raises(ImageMountFailed) as raised:
            engine.get(image=file)
    assert raised.value.hint
    assert engine.containerd.containers() == ()
    assert os.listdir(engine.host.path(engine.state) / "images") == []


def test_an_ext4_image_is_never_given_to_the_kernel(engine: NodeEngine) -> None:
    with scratch("ext4") as directory:
        file = directory / "root.squashfs"
        file.write_bytes(bytes(1 << 20))
        engine.host.run(["mkfs.ext4", "-q", str(file)])
        with pytest.raises(ImageMountFailed, match="is not a squashfs"):
            engine.get(image=file)


def test_two_users_never_share_a_container(engine: NodeEngine) -> None:
    one, other = engine.get(uid=61000), engine.get(uid=61001)
    assert one.key != other.key
    namespaces = {os.stat(got.namespace).st_ino for got in (one, other)}
    shims = {Process.read(_anchor(engine, got.container_id)).ppid for got in (one, other)}
    assert (len(namespaces), len(shims)) == (2, 2)


def test_the_same_user_with_other_targets_gets_another_container(engine: NodeEngine) -> None:
    one = engine.get(targets=[("d", "/a")])
    assert engine.get(targets=[("d", "/b")]).key != one.key
    assert engine.get(targets=[("d", "/a")]).container_id == one.container_id


def test_fifty_who_ask_at_once_get_one_container(engine: NodeEngine) -> None:
    before = engine.call("images_opened")
    got = engine.get_at_once([engine.request()] * 50)
    assert len({container.container_id for container in got if not isinstance(container, Exception)}) == 1
    assert not any(isinstance(container, Exception) for container in got)
    assert engine.call("images_opened") == before + 1
    assert len(engine.containerd.containers()) == 1


def test_fifty_who_ask_for_the_impossible_are_all_told(engine: NodeEngine) -> None:
    answers = engine.get_at_once([engine.request(targets=[("d", "/var/run/x")])] * 50)
    assert {type(answer) for answer in answers} == {TargetImpossible}
    assert engine.containerd.containers() == ()


def test_different_containers_are_built_side_by_side(engine: NodeEngine) -> None:
    got = engine.get_at_once(
        [engine.request(uid=61000 + number % 4, targets=[("d", f"/t{number}")]) for number in range(12)]
    )
    assert not [answer for answer in got if isinstance(answer, Exception)]
    assert len(engine.containerd.containers()) == 12
    assert len([mount for mount in engine.host.mounts() if mount.kind == "squashfs"]) == 1


def test_the_limit_of_a_user_refuses_only_while_all_are_in_use(clean: Containerd, image: Path) -> None:
    with node_engine(clean, image, containers_per_uid=2) as engine:
        members = [engine.enter(engine.get(targets=[("d", f"/{name}")])) for name in "ab"]
        with pytest.raises(EngineBusy, match="uid 61000 has 2 node containers"):
            engine.get(targets=[("d", "/c")])
        engine.get(uid=61001)
        members[0].kill()
        members[0].wait()
        wait_until(lambda: [] in engine.call("listing").values(), what="an idle container")
        engine.get(targets=[("d", "/c")])
        assert len(engine.containerd.containers()) == 3
        members[1].kill()


def test_it_stays_while_a_member_lives_and_a_linger_longer(clean: Containerd, image: Path) -> None:
    with node_engine(clean, image, linger_seconds=0.3) as engine:
        got = engine.get()
        first, second = engine.enter(got), engine.enter(got)
        assert engine.call("listing") == {got.container_id: sorted([first.pid, second.pid])}
        first.kill()
        wait_until(lambda: engine.call("listing") == {got.container_id: [second.pid]}, what="one member")
        second.kill()
        wait_until(lambda: engine.call("listing") == {}, what="removal")
        wait_until(lambda: clean.containers() == (), what="removal in containerd")
        wait_until(
            lambda: not [m for m in clean.host.mounts() if m.kind == "squashfs"], what="removal of the image mount"
        )


def test_a_container_nobody_enters_goes_after_the_linger(clean: Containerd, image: Path) -> None:
    with node_engine(clean, image, linger_seconds=0.2) as engine:
        got = engine.get()
        wait_until(lambda: clean.containers() == (), what="removal")
        # Whoever has got the namespace can still go in.
        assert engine.run_inside(got, "/bin/cat", "/etc/os-release") == "ID=busybox\n"


def test_a_member_that_has_ended_before_it_joined_counts_for_nothing(clean: Containerd, image: Path) -> None:
    with node_engine(clean, image, linger_seconds=0.2) as engine:
        got = engine.get()
        process = engine.popen_inside(got, "/bin/cat", uid=61000)
        process.kill()
        # A zombie: it has ended, and its number is still its own.
        wait_until(lambda: Process.read(process.pid).is_zombie, what="a zombie")
        engine.call("join", got.container_id, process.pid)
        wait_until(lambda: clean.containers() == (), what="removal")


def test_programs_left_inside_keep_it_and_keep_what_they_see_when_it_is_removed(clean: Containerd, image: Path) -> None:
    with node_engine(clean, image, linger_seconds=0.1) as engine:
        got = engine.get()
        inside = engine.popen_inside(got, "/bin/sh", "-c", "read go; cat /etc/os-release /proc/self/comm", uid=61000)
        engine.call("forget")
        # Nobody joined; the watcher finds the program in /proc when the linger is over, ten times in this while.
        kept_until = time.monotonic() + 1
        while time.monotonic() < kept_until:
            assert clean.containers() == (got.container_id,)
        engine.close(remove=True)
        assert clean.containers() == ()
        out, _ = inside.communicate(b"go\n", timeout=10)
        assert out.startswith(b"ID=busybox\n")


def test_building_leaves_no_descriptor_and_removing_takes_the_last(clean: Containerd, image: Path) -> None:
    with node_engine(clean, image, linger_seconds=0.1) as engine:
        engine.get()
        engine.call("forget")
        wait_until(lambda: clean.containers() == (), what="removal")
        before = engine.call("descriptors")
        for _ in range(3):
            engine.get(targets=[("d", "/a/b/c")])
            engine.call("forget")
            wait_until(lambda: engine.call("listing") == {}, what="removal")
        wait_until(lambda: engine.call("descriptors") <= before, what="descriptors")


def test_nothing_wakes_up_while_nothing_happens(engine: NodeEngine) -> None:
    member = engine.enter(engine.get())
    count = engine.call("wake_ups")
    # Nothing can be waited for here: what is proved is that nothing happens in a second.
    engine.host.run(["sleep", "1"])
    assert engine.call("wake_ups") - count <= 1
    member.kill()


def test_without_containerd_the_error_says_so_and_nothing_is_left(clean: Containerd, image: Path) -> None:
    with node_engine(clean, image, socket="/run/nothing.sock") as engine:
        with pytest.raises(ContainerdUnavailable, match="/run/nothing.sock") as raised:
            engine.get()
        assert "systemctl start containerd" in raised.value.hint


def test_a_containerd_that_dies_between_two_launches_is_named_and_comes_back(clean: Containerd, image: Path) -> None:
    with node_engine(clean, image) as engine:
        warm = engine.get()
        clean.process.kill()
        clean.process.wait()
        assert engine.get().container_id == warm.container_id
        with pytest.raises(ContainerdUnavailable):
            engine.get(targets=[("d", "/other")])
        assert os.listdir(engine.host.path(engine.state) / "containers") == [warm.container_id]
        clean.restart()
        engine.get(targets=[("d", "/other")])


def test_crun_on_a_hybrid_node_is_refused_with_a_remedy_and_leaves_nothing(clean: Containerd, image: Path) -> None:
    if not any(mount.kind == "cgroup" for mount in read_mountinfo()):
        pytest.skip("this node has cgroup v2 only")
    with node_engine(clean, image, runtime="crun") as engine:
        with pytest.raises(ContainerdFailed) as raised:
            engine.get()
        assert 'runtime = "runc"' in raised.value.hint
        assert clean.containers() == ()


def test_the_state_directory_is_closed_to_users(engine: NodeEngine) -> None:
    engine.get()
    status = os.stat(engine.host.path(engine.state))
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o700, 0)


def test_a_second_engine_on_the_same_state_is_refused(engine: NodeEngine, clean: Containerd, image: Path) -> None:
    engine.get()
    with node_engine(clean, image) as second, pytest.raises(EngineBusy, match="another engine uses"):
        second.get()


def test_the_users_signal_reaches_the_anchor_only(engine: NodeEngine) -> None:
    got = engine.get()
    anchor = _anchor(engine, got.container_id)
    member = engine.enter(got)
    engine.host.run(["setpriv", "--reuid=61000", "--clear-groups", "kill", "-9", str(anchor)])
    wait_until(lambda: engine.containerd.tasks().get(got.container_id) == "STOPPED", what="end of the anchor")
    assert engine.get().container_id == got.container_id
    assert engine.run_inside(got, "/bin/cat", "/etc/os-release") == "ID=busybox\n"
    member.send_signal(signal.SIGKILL)
