"""Attacks by way of what a site adds to containers: hostile images, users who race it, runtimes that do less than they
were asked, on a real containerd.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from hpcctr.errors import ContainerdFailed, FeatureUnusable, HpcctrError
from hpcctr.host.edits import CacheEntry, FileEdit, HookEdit, HostEdits, LinkEdit, MountEdit
from tests.containerd.conftest import left
from tests.support import containerd as containerds
from tests.support import enter
from tests.support.containerd import Containerd
from tests.support.host import Host
from tests.support.mountinfo import Mount, read_mountinfo
from tests.support.node_engine import Got, NodeEngine, launch, node_engine
from tests.support.polling import wait_until
from tests.support.scratch import scratch
from tests.support.squashfs import busybox_tree, make_squashfs
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]

UID = 61510
LIBRARY = "/.hpcctr-host/lib/libx.so.1"


def _hostile_tree(root: Path) -> None:
    busybox_tree(root)
    for name in ("real/lib", "opt/directory"):
        (root / name).mkdir(parents=True)
    (root / "etc/secret").write_text("of the image\n")
    os.mkfifo(root / "opt/pipe")
    os.mknod(root / "opt/disk", 0o60666, os.makedev(7, 0))
    for name, text in (
        ("to-etc", "/etc"),
        ("to-root", "/proc/self/root/etc"),
        ("to-dev", "/dev"),
        ("up", "../../../../../../.."),
        ("long", "/" + "x/" * 100),
        ("loop", "loop"),
        ("lib", "real/lib"),
        ("opt/final", str(root.parent / "victim")),
        ("opt/final-loop", "final-loop"),
        (".hpcctr-host", "/to-etc/../opt"),
        ("etc/ld.so.cache", "/etc/shadow"),
        ("etc/ld.so.preload", "/evil.so"),
    ):
        (root / name).symlink_to(text)


@pytest.fixture(scope="module")
def images() -> Iterator[dict[str, Path]]:
    """A plain image file and a hostile one."""
    with scratch("edited-images") as directory:
        (directory / "victim").write_text("of the host, and no business of an image's\n")
        yield {
            "plain": make_squashfs(directory / "plain.squashfs"),
            "hostile": make_squashfs(directory / "hostile.squashfs", _hostile_tree),
        }


@pytest.fixture(scope="module")
def daemons() -> Iterator[dict[str, Containerd]]:
    """A containerd for each runtime, in Hosts of their own, whose mounts are shared as systemd makes them."""
    with contextlib.ExitStack() as stack:
        made = {}
        for runtime in ("runc", "crun"):
            root = stack.enter_context(scratch(f"edits-{runtime}"))
            host = stack.enter_context(Host.start(root, propagation="shared", cgroup2_only=runtime == "crun"))
            made[runtime] = containerds.start(host)
            stack.callback(made[runtime].stop)
        yield made


@pytest.fixture
def daemon(daemons: dict[str, Containerd], images: dict[str, Path]) -> Iterator[Containerd]:
    """The one with runc; a test leaves nothing in it."""
    yield from _clean(daemons["runc"], images)


def _clean(daemon: Containerd, images: dict[str, Path]) -> Iterator[Containerd]:
    before = left(daemon, images["hostile"])
    yield daemon
    wait_until(lambda: not left(daemon, images["hostile"]) - before, what=lambda: f"{left(daemon, images['hostile'])}")


@pytest.fixture
def engine(daemon: Containerd, images: dict[str, Path]) -> Iterator[NodeEngine]:
    with node_engine(daemon, images["hostile"]) as running:
        yield running


@pytest.fixture
def site(daemon: Containerd) -> Iterator[Path]:
    """A directory of root's with what a site would show: a library, and a tree with traps."""
    with scratch("site") as directory:
        (directory / "libx.so.1").write_text("of the host\n")
        (directory / "tree/sub").mkdir(parents=True)
        (directory / "tree/file").write_text("of the tree\n")
        yield directory


def _mount(source: Path | str, target: str, **changes: Any) -> MountEdit:
    kind = "d" if os.path.isdir(source) else "f"
    return MountEdit(**{"source": str(source), "target": target, "kind": kind, "origin": "site.toml", **changes})


def _hook(path: Path, *, stage: Literal["prestart", "createRuntime"] = "createRuntime", **changes: Any) -> HostEdits:
    values = {
        "stage": stage,
        "path": str(path),
        "args": ("hook",),
        "env": ("A=1",),
        "timeout": None,
        "origin": "x.json",
    }
    return HostEdits(hooks=(HookEdit(**{**values, **changes}),))


def _program(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text))
    path.chmod(0o755)
    return path


def _table(engine: NodeEngine, got: Got) -> dict[str, Mount]:
    rows = [line.split() for line in engine.containerd.ctr("tasks", "list").splitlines()]
    anchor = next(int(row[1]) for row in rows if row[0] == got.container_id)
    return {mount.target: mount for mount in read_mountinfo(Path(f"/proc/{anchor}/mountinfo"))}


def _inside(engine: NodeEngine, got: Got, script: str) -> str:
    """What a script of root's prints inside, with its errors: nothing forbids it anything but the mounts."""
    done = engine.host.run(
        ["nsenter", f"--mount={got.namespace}", "/bin/sh", "-c", f"exec 2>&1; {script}"], check=False
    )
    return done.stdout.decode()


# hostile images


@pytest.mark.parametrize(
    ("target", "place"),
    [
        ("/to-etc/x", "/etc/x"),
        ("/up/up/opt/x", "/opt/x"),
        ("/lib/deep/x", "/real/lib/deep/x"),
        ("/opt/final", "/opt/final"),
        ("/opt/final-loop", "/opt/final-loop"),
        ("/opt/pipe", "/opt/pipe"),
        ("/opt/disk", "/opt/disk"),
        ("/etc/secret", "/etc/secret"),
        ("/etc/passwd", "/etc/passwd"),
        (LIBRARY, "/opt/lib/libx.so.1"),
    ],
)
def test_whatever_an_image_has_in_the_way_a_file_lands_below_its_root(
    engine: NodeEngine, images: dict[str, Path], site: Path, target: str, place: str
) -> None:
    got = engine.get(edits=HostEdits(mounts=(_mount(site / "libx.so.1", target),)))
    assert _table(engine, got).keys() == {"/", "/proc", "/dev", place}
    assert engine.run_inside(got, "/bin/cat", place) == "of the host\n"
    assert not [mount for mount in engine.host.mounts() if mount.target.endswith("/x") or "libx" in mount.target]
    assert (images["hostile"].parent / "victim").read_text().startswith("of the host, and no")


@pytest.mark.parametrize(
    ("edits", "reason"),
    [
        ({"mounts": ["/to-root/x"]}, "/proc, /sys and /dev are the caller's own"),
        ({"mounts": ["/to-dev/null"]}, "/proc, /sys and /dev are the caller's own"),
        ({"mounts": ["/loop/x"]}, "more than 40 symbolic links"),
        ({"mounts": ["/long/x"]}, "directories deep"),
        ({"mounts": ["/opt/directory"]}, "it is a directory in the image, not a file"),
        ({"mounts": ["/etc/secret/x"]}, "/etc/secret is a file in the image"),
        ({"links": ["/to-root/passwd"]}, "/proc, /sys and /dev are the caller's own"),
        ({"links": ["/opt/directory"]}, "it is a directory in the image"),
        ({"files": ["/loop/x"]}, "more than 40 symbolic links"),
    ],
)
def test_what_an_image_makes_impossible_is_refused_by_name_and_leaves_nothing(
    engine: NodeEngine, site: Path, edits: dict[str, list[str]], reason: str
) -> None:
    made = HostEdits(
        mounts=tuple(_mount(site / "libx.so.1", path) for path in edits.get("mounts", [])),
        links=tuple(LinkEdit(path=path, target="/x", origin="site.toml") for path in edits.get("links", [])),
        files=tuple(FileEdit(path=path, content=b"x", origin="site.toml") for path in edits.get("files", [])),
    )
    with pytest.raises(FeatureUnusable, match=reason) as raised:
        engine.get(edits=made)
    assert raised.value.message.startswith("site.toml: ") and raised.value.message.endswith("(image test)")
    assert engine.containerd.containers() == ()
    assert os.listdir(engine.host.path(engine.state) / "containers") == []


def test_links_and_files_of_the_sites_are_written_nowhere_but_in_the_upper_layer(
    engine: NodeEngine, images: dict[str, Path]
) -> None:
    edits = HostEdits(
        links=(
            LinkEdit(path="/opt/final", target="/opt/x", origin="o"),
            LinkEdit(path="/up/e", target="x", origin="o"),
        ),
        files=(FileEdit(path="/to-etc/made", content=b"made\n", origin="o"),),
        cache=(CacheEntry(soname="libx.so.1", path=LIBRARY, flags=0x303, origin="o"),),
    )
    got = engine.get(edits=edits)
    assert _inside(engine, got, "ls -l /opt/final /e | cut -d'>' -f2; cat /etc/made") == " x\n /opt/x\nmade\n"
    # A link of the image's in its place: it was not followed when it was read, nor when it was written.
    told = _inside(engine, got, "ls -l /etc/ld.so.cache; cat /etc/ld.so.cache | /bin/busybox strings")
    assert told.startswith("-rw-r--r--") and LIBRARY in told and "root:" not in told
    assert (images["hostile"].parent / "victim").read_text().startswith("of the host, and no")
    assert not Path("/etc/made").exists() and not Path("/e").is_symlink()


# whose files


def test_a_file_a_user_can_write_or_put_in_place_goes_into_nobodys_container(engine: NodeEngine, site: Path) -> None:
    theirs = site / "home"
    theirs.mkdir()
    (theirs / "lib.so").write_text("evil")
    (site / "loose").write_text("x")
    (site / "loose").chmod(0o666)
    (site / "owned").write_text("x")
    os.chown(site / "owned", UID, UID)
    (site / "link").symlink_to(theirs / "lib.so")
    os.chown(theirs, UID, UID)
    hook = _program(site / "hook", "#!/bin/sh\n")
    hook.chmod(0o777)
    for source in (theirs, theirs / "lib.so", site / "loose", site / "owned", site / "link"):
        with pytest.raises(FeatureUnusable, match="not root's alone, and goes into containers of every user"):
            engine.get(edits=HostEdits(mounts=(_mount(source, "/x"),)))
    with pytest.raises(FeatureUnusable, match="not root's alone"):
        engine.get(edits=_hook(hook))
    assert engine.containerd.containers() == ()


def test_nothing_comes_by_way_of_a_filesystem_that_a_user_serves_whoever_it_says_owns_the_files(
    engine: NodeEngine, site: Path, alice: User
) -> None:
    common, theirs, conf = site / "common", site / "theirs", site / "fuse.conf"
    for directory in (common, theirs):
        directory.mkdir()
    common.chmod(0o1777)
    (theirs / "lib.so").write_text("evil")
    (theirs / "link").symlink_to("/usr/bin/env")
    conf.write_text("user_allow_other\n")
    subprocess.run(["chown", "-R", f"{alice.uid}:{alice.gid}", theirs], check=True)
    host, point = engine.host, common / "lib"
    host.run(["sh", "-c", f"touch /etc/fuse.conf; mount --bind {conf} /etc/fuse.conf"])
    host.run(["mkdir", str(point)], user=alice)
    options = ["-u", "root", "-g", "root", "-p", "0644,a+X,og-w", "-o", "allow_other"]
    host.run(["bindfs", *options, str(theirs), str(point)], user=alice)
    try:
        seen = host.run(["stat", "-c", "%u %a", str(point), f"{point}/lib.so", f"{point}/link"]).stdout
        assert seen.splitlines()[:2] == [b"0 755", b"0 644"] and seen.splitlines()[2].startswith(b"0 ")
        for source, kind in ((point, "d"), (point / "lib.so", "f"), (point / "link", "f")):
            with pytest.raises(FeatureUnusable, match=r"a program of a user's serves \(FUSE\)"):
                engine.get(edits=HostEdits(mounts=(_mount(source, "/x", kind=kind),)))
    finally:
        host.run(["fusermount3", "-u", "-z", str(point)], user=alice)
        host.run(["umount", "/etc/fuse.conf"])
    assert engine.containerd.containers() == ()


def test_a_user_who_renames_things_meanwhile_gets_none_of_theirs_in(engine: NodeEngine, site: Path) -> None:
    theirs = site / "theirs"
    theirs.mkdir()
    os.chown(theirs, UID, UID)
    script = f"""
        cd {theirs}; mkdir real; echo evil > real/lib.so; echo in
        while :; do
            ln -sfn /usr/lib way; mv -T way now; ln -sfn real way; mv -T way now; rm -rf now
        done"""
    racer = engine.host.popen(
        ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "sh", "-c", script], stdout=-1, stderr=-3
    )
    try:
        assert racer.stdout is not None and racer.stdout.readline() == b"in\n"
        for number in range(60):
            with pytest.raises(FeatureUnusable):
                engine.get(edits=HostEdits(mounts=(_mount(theirs / "now/lib.so", f"/x{number}", kind="f"),)))
    finally:
        racer.kill()
        racer.wait()
    assert engine.containerd.containers() == ()


# what a program may do with them


def test_no_program_gains_anything_by_a_set_user_id_file_or_a_device_of_the_sites(
    world: enter.World, engine: NodeEngine, site: Path
) -> None:
    tree = site / "tree"
    (tree / "busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (tree / "busybox").chmod(0o4755)
    for directory in (tree, tree / "sub"):
        os.mknod(directory / "zero", 0o20666, os.makedev(1, 5))
        (directory / "zero").chmod(0o666)
    engine.host.run(["mount", "-t", "tmpfs", "-o", "dev,suid,mode=755", "below", str(tree / "sub")])
    engine.host.run(["mknod", "-m", "666", str(tree / "sub/zero"), "c", "1", "5"])
    edits = HostEdits(mounts=(_mount(tree, "/opt/tree"), _mount(tree / "busybox", "/opt/busybox")))
    got = engine.get(uid=enter.ALICE.uid, gid=enter.ALICE.gid, edits=edits)
    script = "for tool in /opt/busybox /opt/tree/busybox; do $tool id -u; done; cat /proc/self/mountinfo; echo; "
    script += "(: </opt/tree/zero); (: </opt/tree/sub/zero); (echo x >/opt/tree/file); (echo x >/opt/tree/sub/new)"
    plan = world.plan(["sh", "-c", script], mounts=[("/sys/.", "/sys", "ro"), ("/dev/.", "/dev", "rw")])
    started = world.start(plan)
    namespace = os.open(got.namespace, os.O_RDONLY)
    world.answer(namespace)
    os.close(namespace)
    ended = started.finish()
    engine.host.run(["umount", str(tree / "sub")])
    assert ended.lines[:2] == [str(enter.ALICE.uid)] * 2, ended
    flags = {line.split()[4]: set(line.split()[5].split(",")) for line in ended.lines[2:] if line}
    for target in ("/opt/tree", "/opt/tree/sub", "/opt/busybox"):
        assert {"ro", "nosuid", "nodev"} <= flags[target], target
    assert ended.err.count(b"zero: Permission denied") == 2, ended
    assert ended.err.count(b"Read-only file system") == 2, ended


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_mounts_are_as_restricted_and_as_private_as_asked(
    daemons: dict[str, Containerd], images: dict[str, Path], runtime: str
) -> None:
    daemon = daemons[runtime]
    with (
        scratch("site") as site,
        contextlib.contextmanager(_clean)(daemon, images),
        node_engine(daemon, images["plain"], runtime=runtime) as engine,
    ):
        (site / "file").write_text("x")
        (site / "tree/sub").mkdir(parents=True)
        daemon.host.run(["mount", "-t", "tmpfs", "-o", "noexec", "below", str(site / "tree/sub")])
        daemon.host.run(["mount", "--bind", str(site / "file"), str(site / "file")])
        daemon.host.run(["mount", "-o", "remount,bind,noexec,ro", str(site / "file")])
        edits = HostEdits(
            mounts=(
                _mount(site / "tree", "/ro"),
                _mount(site / "tree", "/rw", is_read_only=False, is_noexec=True),
                _mount(site / "file", "/file", is_read_only=False),
            )
        )
        got = engine.get(edits=edits)
        table = _table(engine, got)
        options = {target: set(mount.options.split(",")) & {"ro", "noexec"} for target, mount in table.items()}
        assert {target: options[target] for target in ("/ro", "/ro/sub", "/rw", "/rw/sub", "/file")} == {
            "/ro": {"ro"},
            "/ro/sub": {"ro", "noexec"},
            "/rw": {"noexec"},
            "/rw/sub": {"noexec"},
            "/file": {"ro", "noexec"},
        }
        assert not [mount for mount in table.values() if mount.tags]
        # Neither way: what is mounted in one of them is not seen in the other.
        before = len(daemon.host.mounts())
        _inside(engine, got, "/bin/busybox mount -t tmpfs none /rw")
        assert len(daemon.host.mounts()) == before
        (site / "tree/later").mkdir()
        daemon.host.run(["mount", "-t", "tmpfs", "later", str(site / "tree/later")])
        assert "/ro/later" not in _table(engine, got)
        for name in ("tree/later", "tree/sub", "file"):
            daemon.host.run(["umount", "-l", str(site / name)])


def test_a_container_with_edits_is_of_one_user_and_of_these_edits_only(engine: NodeEngine, site: Path) -> None:
    edits = HostEdits(mounts=(_mount(site / "libx.so.1", "/x"),))
    mine, theirs, plain = engine.get(uid=UID, edits=edits), engine.get(uid=UID + 1, edits=edits), engine.get(uid=UID)
    assert len({os.stat(got.namespace).st_ino for got in (mine, theirs, plain)}) == 3
    assert engine.get(uid=UID, edits=edits).container_id == mine.container_id
    os.utime(site / "libx.so.1", ns=(1, 1))
    newer = HostEdits(mounts=(_mount(site / "libx.so.1", "/x", identity="of a newer driver"),))
    with pytest.raises(FeatureUnusable, match="has just changed"):
        engine.get(uid=UID, edits=newer)
    assert "/x" not in _table(engine, plain)


def test_a_program_in_a_container_with_edits_is_found_again_by_the_next_engine_and_by_nobody_else(
    daemon: Containerd, images: dict[str, Path], site: Path
) -> None:
    edits = HostEdits(mounts=(_mount(site / "libx.so.1", LIBRARY), _mount(site / "tree", "/opt/tree")))
    first = launch(daemon, images["hostile"])
    whole, spoilt = first.get(uid=UID, edits=edits), first.get(uid=UID + 1, edits=edits)
    members = [first.enter(got) for got in (whole, spoilt)]
    first.kill()
    containers = daemon.host.path(first.state) / "containers"
    record = containers / spoilt.container_id / "bindings"
    record.write_bytes(record.read_bytes().replace(b'"/opt/tree"', b'"/opt/other"'))
    # An update in between: those who are inside keep what they have.
    (site / "libx.so.1").write_text("written over\n")
    os.rename(site / "libx.so.1", site / "old")
    (site / "libx.so.1").write_text("newer\n")
    with node_engine(daemon, images["hostile"], linger_seconds=0.3) as second:
        second.call("adopt")
        assert second.call("listing") == {whole.container_id: [members[0].pid]}
        assert daemon.containers() == (whole.container_id,)
        assert second.get(uid=UID, edits=edits).container_id == whole.container_id
        assert members[1].poll() is None
        second.call("forget")
        for member in members:
            member.kill()
            member.wait()
        wait_until(lambda: daemon.containers() == (), what="removal")


# hooks


@pytest.mark.parametrize("stage", ["prestart", "createRuntime"])
@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_nothing_of_an_image_reaches_a_hook(
    daemons: dict[str, Containerd],
    images: dict[str, Path],
    runtime: str,
    stage: Literal["prestart", "createRuntime"],
) -> None:
    daemon = daemons[runtime]
    with (
        scratch("hooks") as site,
        contextlib.contextmanager(_clean)(daemon, images),
        node_engine(daemon, images["hostile"], runtime=runtime) as engine,
    ):
        hook = _program(
            site / "hook",
            f"""\
            #!/usr/bin/python3 -I
            import json, os, sys
            seen = {{"env": dict(os.environ), "argv": sys.argv, "cwd": os.getcwd(), "names": os.listdir(".")}}
            seen["descriptors"] = [n for n in range(1024) if os.path.lexists(f"/proc/self/fd/{{n}}")]
            seen["mounts"] = os.readlink("/proc/self/ns/mnt")
            seen["root"] = os.stat("/").st_ino == os.stat({str(site)!r} + "/../../../..").st_ino
            seen["state"] = sys.stdin.read()
            open({str(site)!r} + "/seen", "w").write(json.dumps(seen))
            """,
        )
        evil = ("LD_PRELOAD=/proc/self/cwd/evil.so", "LD_LIBRARY_PATH=.", "PATH=.", "BASH_ENV=evil", "PYTHONPATH=.")
        for env, wanted in ((("A=1",), {"A": "1"}), ((), {})):
            edits = _hook(hook, stage=stage, args=("called", "so"), env=env)
            got = engine.get(edits=edits, image_env=evil)
            seen = json.loads((site / "seen").read_text())
            # What Python sets for itself where no locale is.
            seen["env"].pop("LC_CTYPE", None)
            assert seen["env"] == wanted
            assert seen["descriptors"] == [0, 1, 2]
            assert seen["mounts"] == os.readlink(f"/proc/{daemon.process.pid}/ns/mnt")
            assert seen["cwd"].endswith(f"/io.containerd.runtime.v2.task/hpcctr/{got.container_id}")
            assert not {"bin", "etc", "evil.so"} & set(seen["names"])
            assert seen["root"]
            state = json.loads(seen["state"])
            assert state["id"] == got.container_id
            assert not any(word.split("=")[0] in seen["state"] for word in evil if len(word) > 6)


def test_a_hook_that_fails_or_does_not_end_stops_the_launch_and_is_named(engine: NodeEngine, site: Path) -> None:
    hook = _program(site / "broken-hook", "#!/bin/sh\necho what is wrong >&2; exit 3\n")
    with pytest.raises(ContainerdFailed, match="what is wrong|broken-hook|exit status 3"):
        engine.get(edits=_hook(hook))
    slow = _program(site / "slow-hook", "#!/bin/sh\nexec sleep 600\n")
    begun = time.monotonic()
    with pytest.raises(HpcctrError):
        engine.get(edits=_hook(slow, timeout=1))
    assert time.monotonic() - begun < 8
    assert engine.containerd.containers() == ()
    assert os.listdir(engine.host.path(engine.state) / "containers") == []
    wait_until(lambda: not [one for one in engine.host.processes() if one.name == "sleep"], what="the hook's end")


def test_no_hook_runs_where_a_runtime_works_in_the_images_root(engine: NodeEngine, site: Path) -> None:
    hook = _program(site / "hook", f"#!/bin/sh\ntouch {site}/ran\n")
    with pytest.raises(FeatureUnusable, match="is to run at createContainer"):
        engine.get(edits=_hook(hook, stage="createContainer"))  # type: ignore[arg-type]
    assert not (site / "ran").exists()


# runtimes and hosts that do something else


def _wrapper(site: Path, change: str) -> Path:
    """A runtime that does ``change`` to the document ``spec``, or to the host, before runc builds the container."""
    return _program(
        site / "runtime",
        f"""\
        #!/usr/bin/python3 -I
        import json, os, sys
        if "create" in sys.argv:
            file = sys.argv[sys.argv.index("--bundle") + 1] + "/config.json"
            spec = json.load(open(file))
            mine = spec["mounts"][-1]
            site = {str(site)!r}
            {change}
            json.dump(spec, open(file, "w"))
        os.execv("/usr/sbin/runc", ["runc", *sys.argv[1:]])
        """,
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("mine['options'].remove('ro')", "/x is not ro"),
        ("mine['options'].remove('nosuid')", "/x is not nosuid"),
        ("mine['options'].remove('nodev')", "/x is not nodev"),
        ("mine['options'].remove('noexec')", "/x is not noexec"),
        ("mine['options'] = ['shared' if one == 'private' else one for one in mine['options']]", "exchanges mounts"),
        ("spec['mounts'].pop()", "nothing is mounted on /x"),
        ("spec['mounts'].append(dict(mine, destination='/y'))", "something is mounted on /y"),
        ("spec['mounts'].append(mine)", "two things are mounted on /x"),
        ("mine['source'] = '/etc/shadow'", "libx.so.1 changed while it was mounted"),
        (
            "open(site + '/new', 'w').write('x'); os.rename(site + '/new', mine['source'])",
            "changed while it was mounted",
        ),
        ("open(mine['source'], 'a').write('x')", "changed while it was mounted"),
        ("os.unlink(mine['source'])", "containerd did not build the container"),
        ("sys.exit(1)", "containerd did not build the container"),
    ],
)
def test_a_mount_that_is_not_the_one_that_was_asked_for_stops_the_launch_and_leaves_nothing(
    daemon: Containerd, images: dict[str, Path], site: Path, change: str, reason: str
) -> None:
    with node_engine(daemon, images["hostile"], runtime=str(_wrapper(site, change))) as engine:
        edits = HostEdits(mounts=(_mount(site / "libx.so.1", "/x", is_noexec=True),))
        with pytest.raises((ContainerdFailed, FeatureUnusable), match=reason):
            engine.get(edits=edits)
        assert daemon.containers() == ()
        assert os.listdir(daemon.host.path(engine.state) / "containers") == []
        assert os.listdir(daemon.host.path(engine.state) / "images") == []


def test_a_mount_over_one_of_the_hosts_is_noticed(engine: NodeEngine, site: Path) -> None:
    hook = _program(
        site / "hook",
        """\
        #!/usr/bin/python3 -I
        import json, os, sys
        state = json.load(sys.stdin)
        target = state["bundle"] + "/rootfs/opt/tree/file"
        there = f"--mount=/proc/{state['pid']}/ns/mnt"
        os.execv("/usr/bin/nsenter", ["nsenter", there, "mount", "--bind", "/etc/shadow", target])
        """,
    )
    edits = HostEdits(mounts=(_mount(site / "tree", "/opt/tree"), _mount(site / "tree/file", "/opt/tree/file")))
    engine.get(edits=edits)
    with pytest.raises(ContainerdFailed, match="two things are mounted on /opt/tree/file"):
        engine.get(edits=HostEdits(mounts=edits.mounts, hooks=_hook(hook).hooks))


def test_an_upper_layer_that_is_full_is_said_and_leaves_nothing(engine: NodeEngine, site: Path) -> None:
    deep = "/d" * 60
    targets = [("d", f"/{number:03}{deep}/{half}") for number in range(150) for half in "ab"]
    with pytest.raises(FeatureUnusable, match="need more room than a node container has"):
        engine.get(targets=targets, edits=HostEdits(mounts=(_mount(site / "libx.so.1", "/x"),)))
    assert engine.containerd.containers() == ()
