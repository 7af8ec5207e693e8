"""Attacks by the content of an image: files of /etc that are none, trees that are missing, words without end, and image
files that no converter wrote or that have rotted in the store."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from hpcctr.errors import TargetImpossible
from tests.support import oci
from tests.support.node import Node, node
from tests.support.node_engine import NodeEngine, node_engine
from tests.support.polling import wait_until
from tests.support.scratch import scratch
from tests.support.squashfs import busybox_tree, make_squashfs
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]

#: What programs and C libraries read of /etc before anything else.
ETC = ("passwd", "group", "nsswitch.conf", "ld.so.cache", "ld.so.preload", "hosts", "resolv.conf", "localtime")
MIB = 1 << 20


@pytest.fixture(scope="module")
def attacked() -> Iterator[Node]:
    with scratch("images") as place, node(place) as started:
        yield started


def _brought(on: Node, image: oci.Image, name: str, *, check: bool | int = True) -> subprocess.CompletedProcess[bytes]:
    """The image in the store, as the site's."""
    place = on.host.root / "brought"
    shutil.rmtree(place, ignore_errors=True)
    return on.hpcctr("pull", "--name", name, f"oci:{oci.write_layout(place, image)}", check=check)


def _without(*names: str, more: Sequence[oci.Member] = (), config: dict[str, object] | None = None) -> oci.Image:
    """The busybox image without what is at or below some names of its root."""
    kept = [
        member
        for member in oci.busybox_members()
        if not any(f"{member.name.decode()}/".startswith(f"{name}/") for name in names)
    ]
    return oci.Image(layers=(oci.tar(*kept, *more),), config={"Env": ["PATH=/bin"], **(config or {})})


# /etc


def _passwd(alice: User) -> dict[str, list[oci.Member]]:
    lines = f"{alice.name}:x:0:0::/evil:/evil\nevil:x:{alice.uid}:0::/evil:/evil\nother:x:77:77::/:/bin/sh"
    return {
        "fifos": [oci.fifo(f"etc/{name}") for name in ETC],
        "devices": [oci.character_device(f"etc/{name}", 1, 5) for name in ETC],
        "directories": [oci.directory(f"etc/{name}") for name in ETC],
        "links to the reader": [oci.symlink(f"etc/{name}", "/proc/self/environ") for name in ETC],
        "links to a terminal": [oci.symlink(f"etc/{name}", "/dev/stdin") for name in ETC],
        "links out": [oci.symlink(f"etc/{name}", "../../../../../etc/shadow") for name in ETC],
        "links in a loop": [oci.symlink(f"etc/{name}", name) for name in ETC],
        "links in a ring": [oci.symlink(f"etc/{name}", f"{name}.x") for name in ETC]
        + [oci.symlink(f"etc/{name}.x", name) for name in ETC],
        "100 MiB": [oci.file("etc/passwd", bytes(100 * MIB)), oci.file("etc/group", b"a" * (100 * MIB))],
        "a million lines": [oci.file(f"etc/{name}", b"u:x:9:9:::\n" * 1_000_000) for name in ("passwd", "group")],
        "the callers own": [
            oci.file("etc/passwd", lines.encode()),
            oci.file("etc/group", f"evil:x:{alice.gid}:\n".encode()),
        ],
        "zeros and escapes": [oci.file("etc/passwd", b"\0\0root:x:0:0:\x1b[2J:/:/\n\0" + lines.encode() + b"\0\n")],
    }


CASES = tuple(_passwd(User(name="a", uid=1, gid=1, groups=(), home=Path("/"))))


@pytest.mark.parametrize("case", CASES)
def test_whatever_etc_is_in_the_image_the_caller_is_known_by_name_and_number(
    attacked: Node, alice: User, case: str
) -> None:
    _brought(attacked, _without("etc/passwd", "etc/group", more=_passwd(alice)[case]), "localhost/etc:1")
    script = "id -un; id -u; id -gn; wc -c < /etc/passwd; cat /etc/passwd"
    done = attacked.run("localhost/etc:1", "sh", "-c", script, user=alice, timeout=60)
    name, uid, group, size, *lines = done.stdout.split(b"\n")[:-1]
    assert (name, uid, group) == (alice.name.encode(), b"%d" % alice.uid, alice.name.encode())
    assert int(size) <= MIB + 4096
    assert lines[0].startswith(f"{alice.name}:x:{alice.uid}:{alice.gid}:".encode())
    for line in lines[1:]:
        fields = line.split(b":")
        assert len(fields) == 7 and b"\0" not in line
        assert fields[0] != alice.name.encode() and int(fields[2]) != alice.uid


# trees


TREES: dict[str, tuple[list[str], list[oci.Member], bytes]] = {
    "nothing but a shell": (["etc", "root", "usr", "var", "home", "proc", "sys", "dev", "run", "tmp"], [], b""),
    "proc is a file": (["proc"], [oci.file("proc", b"x")], b"mount target /proc: it is a file"),
    "sys is a file": (["sys"], [oci.file("sys", b"x")], b"mount target /sys: it is a file"),
    "dev is a file": (["dev"], [oci.file("dev", b"x")], b"mount target /dev: it is a file"),
    "etc is a file": (["etc"], [oci.file("etc", b"x")], b"mount target /etc: it is a file"),
    "tmp is a file": (["tmp"], [oci.file("tmp", b"x")], b"mount target /tmp: it is a file"),
    "tmp leads to etc": (["tmp"], [oci.symlink("tmp", "etc")], b"tmp is a symbolic link"),
    "tmp leads out": (["tmp"], [oci.symlink("tmp", "../../../../../../tmp")], b"tmp is a symbolic link"),
    "tmp is proc's": (["tmp"], [oci.symlink("tmp", "/proc/self/root")], b"tmp is a symbolic link"),
    "home leads to dev": (["home"], [oci.symlink("home", "dev")], b"home is a symbolic link"),
    "home is a file": (["home"], [oci.file("home", b"x")], b"home is a file"),
    "fifos everywhere": (["proc", "sys", "dev", "etc", "tmp"], [oci.fifo(x) for x in ("proc", "dev", "etc")], b""),
    "dev has nodes of its own": (
        ["dev"],
        [oci.directory("dev"), oci.symlink("dev/null", "/etc/passwd"), oci.symlink("dev/console", "/proc/self/mem")],
        b"",
    ),
    "dev/pts leads out": (["dev"], [oci.directory("dev"), oci.symlink("dev/pts", "/etc")], b""),
    "the anchors name is a directory": ([], [oci.directory(".hpcctr-anchor"), oci.file(".hpcctr-anchor/x")], b""),
    "the anchors name is a link": ([], [oci.symlink(".hpcctr-anchor", "/bin/busybox")], b""),
    "the anchors name is a program": ([], [oci.file(".hpcctr-anchor", b"#!/bin/sh\n", mode=0o755)], b""),
}


@pytest.mark.parametrize("case", TREES)
def test_a_tree_that_is_none_is_refused_by_name_or_is_the_nodes_inside(attacked: Node, alice: User, case: str) -> None:
    gone, more, says = TREES[case]
    _brought(attacked, _without(*gone, more=more), "localhost/tree:1")
    before = {name: os.lstat(name).st_mtime_ns for name in ("/etc", "/dev/null", "/etc/passwd")}
    done = attacked.run(
        "localhost/tree:1",
        *["sh", "-c", "echo >/dev/null && id -un && ls /proc/self/exe /sys/kernel >/dev/null && echo whole"],
        user=alice,
        check=126 if says else 0,
        timeout=60,
    )
    if says:
        assert b"error[mount-target]" in done.stderr and says in done.stderr and b"hint: " in done.stderr
        assert done.stdout == b""
    else:
        assert done.stdout == f"{alice.name}\nwhole\n".encode()
    assert before == {name: os.lstat(name).st_mtime_ns for name in before}


# words


SPRUNG = """
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>
__attribute__((constructor)) static void sprung(void) {{
    char exe[512] = {{0}}, line[600];
    readlink("/proc/self/exe", exe, sizeof exe - 1);
    int file = open("{log}", O_WRONLY | O_APPEND);
    write(file, line, snprintf(line, sizeof line, "%s\\n", exe));
    close(file);
}}
"""


def test_no_variable_of_an_image_makes_anything_of_hpcctrs_load_or_run_a_file(attacked: Node, alice: User) -> None:
    """Each names a real library or program of this machine, which says who it was loaded or started by."""
    with scratch("sprung") as place:
        log = place / "log"
        log.touch()
        log.chmod(0o666)
        (place / "trap.c").write_text(SPRUNG.format(log=log))
        library = place / "libc.so.6"
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, place / "trap.c"], check=True, capture_output=True)
        (place / "sitecustomize.py").write_text(f"open({str(log)!r}, 'a').write('python\\n')\n")
        script = place / "script"
        script.write_text(f"echo script >> {log}\n")
        for name in ("python3", "hpcctr", "enter", "sh", "runc", "env"):
            (place / name).write_text(f"#!/bin/sh\necho {name} >> {log}\n")
            (place / name).chmod(0o755)
        variables = [
            f"LD_PRELOAD={library}",
            f"LD_AUDIT={library}",
            f"LD_LIBRARY_PATH={place}",
            f"GCONV_PATH={place}",
            f"LOCPATH={place}",
            "GLIBC_TUNABLES=glibc.malloc.check=3:glibc.malloc.perturb=7",
            f"BASH_ENV={script}",
            f"ENV={script}",
            f"PYTHONPATH={place}",
            f"PYTHONHOME={place}",
            f"PYTHONSTARTUP={place}/sitecustomize.py",
            f"HPCCTR_SITE={place}/site.toml",
            f"PATH={place}:/bin",
            "IFS=/",
            "PS4=$(id)",
        ]
        image = _without(config={"Env": variables, "Cmd": ["/bin/busybox", "env"]})
        _brought(attacked, image, "localhost/variables:1")
        for words in ([], ["--", "/bin/busybox", "true"]):
            done = attacked.hpcctr("run", "localhost/variables:1", *words, user=alice, env={"PATH": "/usr/bin:/bin"})
            assert done.stderr == b"", done.stderr
        inside = attacked.hpcctr("run", "localhost/variables:1", user=alice).stdout.decode().splitlines()
        assert {f"LD_PRELOAD={library}", f"LD_AUDIT={library}"} <= set(inside)
        attacked.hpcctr("run", "localhost/variables:1")
        assert log.read_text() == ""
        # And it is a trap.
        subprocess.run(["/bin/true"], env={"LD_PRELOAD": str(library)}, check=True)
        assert log.read_text() == f"{os.path.realpath('/bin/true')}\n"


CONFIGS: dict[str, tuple[dict[str, object], tuple[int, ...], bytes]] = {
    "a hundred thousand words": ({"Cmd": ["echo", *["word"] * 100_000]}, (125,), b"over the limit"),
    "a word of 1 MiB": ({"Cmd": ["echo", "w" * MIB]}, (125,), b"over the limit"),
    "a variable of 100 KiB": ({"Env": ["PATH=/bin", "A=" + "v" * 100_000]}, (125,), b"over the limit"),
    "ten thousand variables": (
        {"Env": ["PATH=/bin", *[f"VARIABLE{n}=x" for n in range(10_000)]]},
        (125,),
        b"over the limit",
    ),
    "a zero in a variable": ({"Env": ["PATH=/bin", "A=1\0B=2"]}, (125,), b"NUL"),
    "a zero in a word": ({"Cmd": ["echo", "a\0b"]}, (125,), b"NUL"),
    "no word": ({"Cmd": [], "Entrypoint": []}, (125,), b"no-command"),
    "an empty word": ({"Cmd": [""]}, (125,), b"no-command"),
    "words that are empty": ({"Cmd": ["echo", "", ""]}, (0,), b""),
    "a program above": ({"Cmd": ["../../../../bin/busybox", "echo", "ran"]}, (0, 127), b""),
    "a program in proc": ({"Cmd": ["/proc/self/fd/3"]}, (126, 127), b"error["),
    "a program in proc 1": ({"Cmd": ["/proc/1/exe"]}, (126, 127), b"error["),
    "a program that is a directory": ({"Cmd": ["/"]}, (126,), b"error["),
    "a name of newlines": ({"Cmd": ["\n" * 255]}, (127,), b"error["),
    "a name of 5000": ({"Cmd": ["/" + "n" * 5000]}, (126, 127), b"error["),
    "a working directory in proc": ({"WorkingDir": "/proc/self/fd/7", "Cmd": ["echo", "ran"]}, (0,), b""),
    "a variable without a name": ({"Env": ["PATH=/bin", "=x", "", "B"], "Cmd": ["echo", "ran"]}, (0,), b""),
    "a variable of lines": ({"Env": ["PATH=/bin", "A=\nLD_PRELOAD=/x\n"], "Cmd": ["echo", "ran"]}, (0,), b""),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_whatever_words_a_config_has_the_program_starts_or_there_is_a_named_error(
    attacked: Node, alice: User, case: str
) -> None:
    config, statuses, says = CONFIGS[case]
    _brought(attacked, _without(config=config), "localhost/config:1")
    done = attacked.hpcctr("run", "localhost/config:1", user=alice, check=False, timeout=60)
    assert done.returncode in statuses, done
    assert says in done.stderr
    assert b"Traceback" not in done.stderr and len(done.stderr) < 6000
    if done.returncode:
        assert done.stderr.startswith(b"hpcctr: error[")
        # One message, one hint, whatever the image's words hold.
        assert done.stderr.count(b"\n") <= 2, done.stderr
    assert attacked.run("localhost/config:1", "/bin/busybox", "echo", "on", user=alice, check=False).returncode in (
        0,
        125,
    )


def test_a_config_of_64_mib_is_refused_when_it_is_pulled(attacked: Node) -> None:
    env = [f"V{number}={'x' * 65_000}" for number in range(1000)]
    done = _brought(attacked, _without(config={"Env": env}), "localhost/large:1", check=125)
    assert b"hpcctr: error[not-an-image]" in done.stderr and b"4194304" in done.stderr, done.stderr
    assert attacked.run("localhost/large:1", "true", check=125, flags=["--pull", "never"]).returncode == 125


# files no converter wrote


@pytest.fixture(scope="module")
def engine() -> Iterator[NodeEngine]:
    """Node containers of files as they are: no store, no converter."""
    from tests.support import containerd
    from tests.support.host import Host

    with scratch("raw") as place, Host.start(place) as host:
        daemon = containerd.start(host)
        try:
            with node_engine(daemon, make_squashfs(place / "root.squashfs"), linger_seconds=0.1) as running:
                yield running
        finally:
            daemon.stop()


def _raw(name: str, fill: Callable[[Path], None]) -> contextlib.AbstractContextManager[Path]:
    @contextlib.contextmanager
    def made() -> Iterator[Path]:
        with scratch(name) as place:
            tree = place / "tree"
            tree.mkdir()
            busybox_tree(tree)
            fill(tree)
            file = place / "root.squashfs"
            subprocess.run(["mksquashfs", tree, file, "-quiet", "-no-progress"], check=True, capture_output=True)
            # Not by Python, which goes down by recursion.
            subprocess.run(["rm", "-rf", tree], check=True)
            yield file

    return made()


def test_set_user_id_capabilities_and_devices_of_a_file_nobody_cleaned_are_worth_nothing(
    attacked: Node, alice: User
) -> None:
    """As if the converter had let them through: a view is nosuid and nodev, whoever wrote its image file."""

    def fill(root: Path) -> None:
        for name in ("busybox-suid", "busybox-capable"):
            shutil.copy("/usr/bin/busybox", root / "bin" / name)
        (root / "bin/busybox-suid").chmod(0o6755)
        capabilities = "cap_setuid,cap_sys_admin,cap_dac_override+ep"
        subprocess.run(["setcap", capabilities, root / "bin/busybox-capable"], check=True)
        (root / "home").mkdir()
        os.mknod(root / "memory", stat.S_IFCHR | 0o666, os.makedev(1, 1))
        os.mknod(root / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))

    _brought(attacked, _without(), "localhost/unclean:1")
    digest = json.loads(attacked.hpcctr("inspect", "--format", "json", "localhost/unclean:1").stdout)["digest"]
    directory = attacked.site.store / "images" / digest.replace(":", "-")
    with _raw("unclean", fill) as file:
        (directory / "root.squashfs").unlink()
        shutil.copyfile(file, directory / "root.squashfs")
    record = json.loads((directory / "image.json").read_bytes())
    record["file_size"] = (directory / "root.squashfs").stat().st_size
    (directory / "image.json").write_text(json.dumps(record))
    script = """
        stat -c %a /bin/busybox-suid; busybox-suid id -u; busybox-suid id -g
        busybox-capable grep -c 'Cap[PEIA].*[1-9a-f]$' /proc/self/status
        cat /memory /zero
    """
    done = attacked.run("localhost/unclean:1", "sh", "-c", script, user=alice, check=1, env={"PATH": "/bin"})
    assert done.stdout == f"6755\n{alice.uid}\n{alice.gid}\n0\n".encode()
    assert done.stderr.count(b"Permission denied") == 2
    attacked.hpcctr("rm", "localhost/unclean:1")


def test_marks_of_overlays_in_a_file_hide_and_redirect_nothing_of_the_engines(engine: NodeEngine) -> None:
    """Whiteouts, opaque directories and redirects, as attributes and as devices, in the layer below."""

    def fill(root: Path) -> None:
        (root / "etc/passwd").unlink()
        for name in ("passwd", "group", "hosts"):
            (root / f"etc/{name}").unlink(missing_ok=True)
            os.mknod(root / f"etc/{name}", stat.S_IFCHR, os.makedev(0, 0))
        os.mknod(root / ".hpcctr-anchor", stat.S_IFCHR, os.makedev(0, 0))
        (root / "secret").mkdir()
        (root / "secret/file").write_text("secret")
        (root / "small").write_text("")
        for prefix in ("trusted.overlay.", "user.overlay."):
            for path in ("", "etc", "proc", "dev", "usr", "tmp"):
                os.setxattr(root / path, f"{prefix}opaque", b"y")
            os.setxattr(root / "usr", f"{prefix}redirect", b"/secret")
            os.setxattr(root / "etc", f"{prefix}redirect", b"/secret")
            os.setxattr(root / "small", f"{prefix}metacopy", b"")
            os.setxattr(root / "small", f"{prefix}redirect", b"/secret/file")

    with _raw("marks", fill) as file:
        got = engine.get(digest="d", image=file, uid=0, gid=0, targets=[("d", "/usr/x"), ("d", "/etc/y")])
        assert engine.run_inside(got, "/bin/cat", "/etc/passwd").startswith("root:x:0:0:")
        assert engine.run_inside(got, "/bin/ls", "/etc").split()[0] != "file"
        listed = engine.run_inside(got, "/bin/ls", "/etc", "/usr")
        assert "y\n" in listed and "x\n" in listed and "file" not in listed.split()
        # A file that claims its content is elsewhere is empty or refused, as the kernel's version has it.
        assert engine.run_inside(got, "/bin/cat", "/small", check=False) == ""
        assert engine.run_inside(got, "/bin/stat", "-c", "%F", "/.hpcctr-anchor").strip() == "regular empty file"
        engine.call("forget")


@pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK])
def test_a_fifo_device_or_socket_as_a_tree_or_on_the_way_to_a_target_is_refused_and_never_opened(
    engine: NodeEngine, kind: int
) -> None:
    def fill(root: Path) -> None:
        for name in ("etc/passwd", "etc/group", "way"):
            (root / name).unlink(missing_ok=True)
            os.mknod(root / name, kind | 0o666, os.makedev(1, 5))

    def fill_proc(root: Path) -> None:
        (root / "proc").rmdir()
        os.mknod(root / "proc", kind | 0o666, os.makedev(1, 5))

    with _raw("odd", fill) as file:
        got = engine.get(digest="e", image=file, uid=0, gid=0)
        assert engine.run_inside(got, "/bin/cat", "/etc/passwd").startswith("root:x:0:0:")
        for target in (("d", "/way"), ("d", "/way/x"), ("f", "/way/x")):
            with pytest.raises(TargetImpossible, match="/way"):
                engine.get(digest="e", image=file, uid=0, gid=0, targets=[target])
        engine.call("forget")
    with _raw("oddproc", fill_proc) as file, pytest.raises(TargetImpossible, match="mount target /proc"):
        engine.get(digest="f", image=file)


def test_an_image_4000_directories_deep_is_built_entered_and_taken_down(engine: NodeEngine) -> None:
    def fill(root: Path) -> None:
        here = os.open(root, os.O_DIRECTORY)
        for _ in range(4000):
            os.mkdir("d", dir_fd=here)
            inner = os.open("d", os.O_DIRECTORY, dir_fd=here)
            os.close(here)
            here = inner
        os.close(here)
        (root / ("\n" * 255)).mkdir()
        (root / ("\n" * 255) / ("\x1b" * 255)).write_text("")

    with _raw("deep", fill) as file:
        got = engine.get(digest="9", image=file, targets=[("d", "/d/d/d/" + "x" * 255), ("d", "/" + "\n" * 255 + "/m")])
        assert engine.run_inside(got, "/bin/ls", "-d", "/d/d/d/" + "x" * 255, check=False)
        with pytest.raises(TargetImpossible, match="64 directories"):
            engine.get(digest="9", image=file, targets=[("d", "/d" * 1500)])
        engine.call("forget")


# files that have rotted


def _loops_of(file: Path) -> list[str]:
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        # Any of them may be detached between two looks.
        with contextlib.suppress(OSError):
            if backing.read_text().startswith(str(file)):
                found.append(str(backing))
    return found


@pytest.fixture
def rotten(attacked: Node) -> Iterator[Callable[[Callable[[Path], object]], Path]]:
    """Do something to the image file of localhost/rot:1 in the store. At the end no loop device has it."""
    if not attacked.hpcctr("inspect", "localhost/rot:1", check=False).stdout:
        _brought(attacked, _without(more=[oci.file("data", random.Random(3).randbytes(MIB))]), "localhost/rot:1")
    digest = str(json.loads(attacked.hpcctr("inspect", "--format", "json", "localhost/rot:1").stdout)["digest"])
    file = attacked.site.store / "images" / digest.replace(":", "-") / "root.squashfs"
    whole = attacked.host.root / "whole"
    if not whole.exists():
        shutil.copyfile(file, whole)

    def spoil(how: Callable[[Path], object]) -> Path:
        file.unlink()
        shutil.copyfile(whole, file)
        file.chmod(0o644)
        how(file)
        return file

    yield spoil
    wait_until(lambda: not _loops_of(file), what=lambda: f"the end of {_loops_of(file)}")
    if file.is_dir() and not file.is_symlink():
        file.rmdir()
    else:
        file.unlink(missing_ok=True)
    shutil.copyfile(whole, file)
    file.chmod(0o644)


def _overwritten(file: Path, at: int, content: bytes) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(content)


def _replaced(file: Path, make: Callable[[Path], object]) -> None:
    file.unlink()
    make(file)


ROT: dict[str, tuple[Callable[[Path], object], bytes]] = {
    "cut": (lambda file: os.truncate(file, file.stat().st_size // 2), b"bytes"),
    "longer": (lambda file: os.truncate(file, file.stat().st_size + 4096), b"bytes"),
    "empty": (lambda file: os.truncate(file, 0), b"bytes"),
    "a hole": (lambda file: _overwritten(file, 0, bytes(file.stat().st_size)), b"not a squashfs"),
    "no superblock": (lambda file: _overwritten(file, 4, b"\xff" * 92), b"cannot be mounted"),
    "nothing but a superblock": (lambda file: _overwritten(file, 96, bytes(file.stat().st_size - 96)), b""),
    "another kind": (lambda file: _overwritten(file, 0, b"\x7fELF"), b"not a squashfs"),
    "a link": (lambda file: _replaced(file, lambda path: path.symlink_to("/etc/shadow")), b"symbolic link"),
    "a link to an image": (lambda file: _replaced(file, lambda path: path.symlink_to("../whole")), b"symbolic link"),
    "a fifo": (lambda file: _replaced(file, os.mkfifo), b"not a regular file"),
    "a directory": (lambda file: _replaced(file, os.mkdir), b"not a regular file"),
    "a device": (
        lambda file: _replaced(file, lambda path: os.mknod(path, stat.S_IFBLK | 0o644, os.makedev(7, 0))),
        b"not a regular file",
    ),
    "a users": (lambda file: os.chown(file, 61999, 61999), b"can be changed by others"),
    "everybodys": (lambda file: file.chmod(0o666), b"can be changed by others"),
}


@pytest.mark.parametrize("case", ROT)
def test_an_image_file_that_is_not_what_was_published_is_refused_and_leaves_no_loop_device(
    attacked: Node, alice: User, rotten: Callable[[Callable[[Path], object]], Path], case: str
) -> None:
    how, says = ROT[case]
    rotten(how)
    done = attacked.run("localhost/rot:1", "true", user=alice, check=False, timeout=60)
    assert done.returncode in (125, 126), done
    assert done.stderr.startswith(b"hpcctr: error[") and says in done.stderr and b"hint: " in done.stderr
    assert attacked.engine.process.poll() is None


def test_wherever_an_image_file_has_rotted_there_is_a_program_or_a_named_error(
    attacked: Node, alice: User, rotten: Callable[[Callable[[Path], object]], Path]
) -> None:
    dice = random.Random(20)
    outcomes = set()
    for _ in range(8):

        def spoil(file: Path) -> None:
            # linux/squashfs_fs.h: at 40 the bytes used, at 64 where the table of inodes begins; data is before it.
            used, inodes = (int.from_bytes(file.read_bytes()[at : at + 8], "little") for at in (40, 64))
            for at in (dice.randrange(96, inodes), dice.randrange(inodes, used)):
                _overwritten(file, at, dice.randbytes(16))

        rotten(spoil)
        done = attacked.run("localhost/rot:1", "cat", "/data", user=alice, check=False, timeout=60)
        outcomes.add(done.returncode)
        if done.returncode not in (0, 1):
            assert b"hpcctr: error[" in done.stderr or b"error" in done.stderr, done
        assert b"Traceback" not in done.stderr
        assert attacked.engine.process.poll() is None
    assert outcomes & {125, 126, 127, 1}


def test_where_the_site_reads_files_first_no_rot_is_mounted_at_all(alice: User) -> None:
    with scratch("verified") as place, node(place, more="") as strict:
        text = strict.site.file.read_text()
        strict.engine.stop()
        strict.site.file.write_text("verify-at-mount = true\n" + text)
        from tests.support import engine

        strict.engine = engine.start(strict.host, strict.site)
        _brought(strict, _without(more=[oci.file("data", random.Random(3).randbytes(MIB))]), "localhost/rot:1")
        (file,) = strict.site.store.glob("images/*/root.squashfs")
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        _overwritten(file, file.stat().st_size // 2, b"\0rot")
        assert hashlib.sha256(file.read_bytes()).hexdigest() != digest
        done = strict.run("localhost/rot:1", "true", user=alice, check=125)
        assert b"error[image-damaged]" in done.stderr
        assert not [mount for mount in strict.host.mounts() if mount.kind == "squashfs"]
