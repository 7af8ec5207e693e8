"""Directories and files a launch takes along, from wherever people keep them; what cannot come is named.

Beside test_mounts.py, which has the ordinary ones. Every refusal names the path, the reason and a remedy.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.e2e.conftest import Profile
from tests.support import autofs, fuse
from tests.support.engine import HPCCTR
from tests.support.node import Node, node
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.usefixtures("module_leaves_nothing")]


def _require(text: str, slug: str, *words: str) -> None:
    first, *rest = text.splitlines()
    assert first.startswith(f"hpcctr: error[{slug}]: "), text
    assert rest and rest[-1].startswith("hint: "), text
    for word in words:
        assert word in text, f"{word!r} is not in {text}"


def _give(user: User | None, *paths: Path) -> None:
    for path in paths:
        os.chown(path, user.uid if user else 0, user.gid if user else 0)


@pytest.fixture
def mine(profile: Profile, place: Path) -> Path:
    """A directory of the caller's outside home and /tmp, with a file ``in`` and a directory ``sub``."""
    return _tree(place / "data", profile.user)


def _tree(directory: Path, user: User | None) -> Path:
    (directory / "sub").mkdir(parents=True)
    (directory / "in").write_text("data\n")
    _give(user, directory, directory / "sub", directory / "in")
    return directory


def _empty(directory: Path, user: User | None) -> Path:
    directory.mkdir()
    _give(user, directory)
    return directory


# directories named by variables


def test_a_temporary_directory_on_a_filesystem_that_is_gone_is_not_named_inside(
    gateway: Profile, alice: User, place: Path
) -> None:
    script = 'echo "${TMPDIR-unset}"; mktemp'
    seen = gateway.output("sh", "-c", script, env={"TMPDIR": "/nowhere/scratch/7"}).splitlines()
    assert seen[0] == "unset" and seen[1].startswith("/tmp/")
    os.unlink(seen[1])
    source, point = _tree(place / "source", alice), _empty(place / "point", alice)
    with fuse.dead(gateway.node.host, alice, source, point):
        with pytest.raises(OSError, match="Transport endpoint|Permission denied"):
            os.stat(f"/proc/{gateway.node.host.holder.pid}/root{point}/in")
        assert gateway.output("sh", "-c", 'echo "${TMPDIR-unset}"', env={"TMPDIR": str(point)}) == "unset\n"
        assert gateway.output("echo", "ok", env={"HOME": f"{point}/sub"}) == "ok\n"
        _require(gateway.refusal("true", flags=["-v", f"{point}:/x"]), "mount-source", str(point), "ls -ld")


def test_a_temporary_directory_behind_a_link_is_reached_inside(profile: Profile, mine: Path) -> None:
    """A link in the home to the big filesystem: what it leads to comes along too."""
    link = Path(profile.home) / f"scratch-{os.getpid()}"
    link.symlink_to(mine)
    try:
        assert profile.output("sh", "-c", 'cat "$TMPDIR/in"', env={"TMPDIR": str(link)}) == "data\n"
    finally:
        link.unlink()


def test_a_temporary_directory_of_the_system_is_the_images_and_not_named(gateway: Profile) -> None:
    assert gateway.output("sh", "-c", 'echo "${TMPDIR-unset}"', env={"TMPDIR": "/usr/share"}) == "unset\n"
    assert gateway.output("sh", "-c", 'echo "${TMPDIR-unset}"', env={"TMPDIR": "/dev/shm"}) == "/dev/shm\n"


# automounts


@pytest.fixture
def automounting(place: Path, alice: User, busybox_image: str) -> Iterator[tuple[Profile, Path]]:
    """A node whose mounts propagate, as systemd sets it, with an automounter; and its directory."""
    point = place / "auto"
    point.mkdir()
    with node(place, propagation="shared", carry=[str(point / "site")]) as made:
        made.pull(busybox_image)
        exports = {name: _tree(place / f"export-{name}", alice) for name in ("home", "data", "later", "site", "tmp")}
        with autofs.automounts(made.host, point, exports):
            yield Profile(name="gateway-user", node=made, user=alice, image=busybox_image), point


def test_automounts_are_mounted_by_coming_along(automounting: tuple[Profile, Path]) -> None:
    profile, point = automounting
    mounted = {mount.target for mount in profile.node.host.mounts()}
    assert not any(target.startswith(f"{point}/") for target in mounted)
    script = f'cat "$HOME/in" "$TMPDIR/in" /d/in {point}/site/in; pwd'
    text = profile.output(
        "sh",
        "-c",
        script,
        flags=["-v", f"{point}/data:/d"],
        env={"HOME": f"{point}/home", "TMPDIR": f"{point}/tmp"},
        cwd="/",
    )
    assert text == "data\n" * 4 + "/\n"


def test_an_automount_inside_a_carried_directory_is_mounted_when_a_program_walks_into_it(
    automounting: tuple[Profile, Path],
) -> None:
    profile, point = automounting
    assert profile.output("cat", f"{point}/later/in", "/m/data/in", flags=["-v", str(point), "-v", f"{point}:/m"]) == (
        "data\n" * 2
    )


# homes root cannot reach


def test_a_home_below_a_directory_that_is_closed_for_listing_comes_along(
    gateway: Profile, alice: User, place: Path
) -> None:
    private = place / "private"
    private.mkdir(mode=0o711)
    home = _tree(private / "home", alice)
    home.chmod(0o700)
    text = gateway.output("sh", "-c", "cat ~/in; echo x > ~/new; pwd", env={"HOME": str(home)}, cwd=home)
    assert text == f"data\n{home}\n" and (home / "new").stat().st_uid == alice.uid


def test_a_home_the_user_cannot_reach_is_as_unreachable_inside(gateway: Profile, alice: User, place: Path) -> None:
    private = place / "private"
    private.mkdir()
    home = _tree(private / "home", alice)
    private.chmod(0o700)
    env = {"HOME": str(home)}
    assert "Permission denied" in gateway.node.host.run(["ls", str(home)], user=alice, check=2).stderr.decode()
    assert gateway.run("ls", str(home), env=env, check=False, cwd="/").stderr.endswith(b"No such file or directory\n")
    text = gateway.refusal("true", env=env, flags=["-v", str(home)])
    _require(text, "mount-source", str(home), "Permission denied", "ls -ld")


def test_a_home_on_a_filesystem_that_root_cannot_look_into_comes_along(
    gateway: Profile, alice: User, place: Path
) -> None:
    source, home = _tree(place / "source", alice), _empty(place / "home", alice)
    (source / "in").write_text("of the server\n")
    with fuse.mounted(gateway.node.host, alice, source, home):
        with pytest.raises(PermissionError):
            os.stat(f"/proc/{gateway.node.host.holder.pid}/root{home}/in")
        script = f"cat ~/in; echo new > ~/new; pwd; cat /v/in /f; ls {home}/sub"
        flags = ["-v", f"{home}:/v:ro", "-v", f"{home}/in:/f"]
        text = gateway.output("sh", "-c", script, flags=flags, env={"HOME": str(home)}, cwd=home / "sub")
        assert text == "of the server\n" + f"{home}/sub\n" + "of the server\n" * 2
        assert (source / "new").read_text() == "new\n"
        refusal = gateway.run("sh", "-c", "echo x > /v/new", flags=flags, check=False)
        assert b"Read-only file system" in refusal.stderr


def test_what_the_caller_alone_sees_is_what_the_program_sees(gateway: Profile, alice: User) -> None:
    """A mount namespace of the caller's own, as Slurm's job_container makes one: a private /tmp, scratch over /mnt."""
    setpriv = ["setpriv", f"--reuid={alice.uid}", f"--regid={alice.gid}", "--clear-groups", "--inh-caps=-all"]
    command = [*setpriv, str(HPCCTR), "run", "-v", "/mnt:/scratch", gateway.image, "--", "sh", "-c"]
    script = "cat /tmp/private /scratch/big; echo seen > /tmp/by-the-program"
    setup = (
        "mount -t tmpfs -o mode=1777 tmpfs /tmp && echo private > /tmp/private && mount -t tmpfs tmpfs /mnt && "
        'echo big > /mnt/big && "$@" && cat /tmp/by-the-program'
    )
    done = gateway.node.host.run(
        ["unshare", "--mount", "--propagation", "slave", "sh", "-c", setup, "sh", *command, script],
        env=gateway.node.environment({"HOME": str(alice.home)}),
    )
    assert done.stdout == b"private\nbig\nseen\n"
    assert not Path("/tmp/by-the-program").exists()


# the working directory


def test_a_deleted_working_directory_needs_another(gateway: Profile) -> None:
    def run(*words: str, check: bool | int = True) -> tuple[str, str]:
        script = 'd=$(mktemp -d) && cd "$d" && rmdir "$d" && exec "$@"'
        done = gateway.node.host.run(
            ["sh", "-c", script, "sh", str(HPCCTR), "run", *words],
            user=gateway.user,
            env=gateway.node.environment(),
            check=check,
        )
        return done.stdout.decode(), done.stderr.decode()

    image = gateway.image
    assert run("-w", "/bin", image, "--", "sh", "-c", 'pwd; echo "$PWD"')[0] == "/bin\n/bin\n"
    _require(run(image, "--", "pwd", check=125)[1], "cwd", "working directory", "-w DIR")
    _require(run("-w", "/", "-v", "relative:/x", image, "--", "pwd", check=125)[1], "cwd", "working directory")


def test_a_working_directory_below_a_volume_is_on_top_of_it(profile: Profile, mine: Path, place: Path) -> None:
    other = _tree(place / "other", profile.user)
    (other / "in").write_text("other\n")
    script = f"cat {mine}/in; pwd; echo x > here"
    flags = ["-v", f"{other}:{mine}"]
    assert profile.output("sh", "-c", script, flags=flags, cwd=mine / "sub") == f"other\n{mine}/sub\n"
    assert (mine / "sub/here").exists() and not (other / "sub/here").exists()
    (other / "sub").rmdir()
    text = profile.refusal("true", flags=flags, cwd=mine / "sub", status=126)
    _require(text, "mount-target", f"{mine}/sub", str(other), f"mkdir -p {other}/sub")


def test_a_working_directory_that_is_a_volumes_target_is_the_volume(profile: Profile, mine: Path, place: Path) -> None:
    other = _tree(place / "other", profile.user)
    (other / "in").write_text("other\n")
    assert profile.output("cat", "in", flags=["-v", f"{other}:{mine}"], cwd=mine) == "other\n"


def test_a_working_directory_reached_through_a_link_keeps_its_name_where_the_link_is_there(
    profile: Profile, mine: Path
) -> None:
    """$PWD is the name the shell shows; programs write to it. The kernel's name is always the real one."""
    home = Path(profile.home)
    near, far = home / f"near-{os.getpid()}", Path(f"/mnt/far-{os.getpid()}")
    for link in (near, far):
        link.symlink_to(mine)
    try:
        for link, name in ((near, str(near)), (far, str(mine))):
            argv = ["sh", "-c", f'cd {link} && exec "$@"', "sh", str(HPCCTR), "run", profile.image, "--"]
            script = 'echo "$PWD"; cat "$PWD/in"; readlink /proc/self/cwd'
            done = profile.node.host.run(
                [*argv, "busybox", "sh", "-c", script], user=profile.user, env=profile.node.environment()
            )
            assert done.stdout.decode() == f"{name}\ndata\n{mine}\n"
    finally:
        near.unlink()
        far.unlink()


def test_a_chosen_working_directory_is_also_its_name(profile: Profile) -> None:
    env = {"PWD": profile.home}
    assert profile.output("sh", "-c", 'echo "$PWD"', flags=["-w", "/bin"], env=env) == "/bin\n"


# kinds of files as volumes


def test_a_socket_and_a_fifo_work_through_a_volume(gateway: Profile, alice: User, place: Path) -> None:
    directory = _tree(place / "d", alice)
    fifo = directory / "fifo"
    os.mkfifo(fifo)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(directory / "sock"))
        server.listen()
        server.settimeout(20)
        _give(alice, fifo, directory / "sock")
        flags = ["-v", f"{directory}/sock:/var/tmp/daemon.sock", "-v", f"{fifo}:/pipe"]
        script = "test -S /var/tmp/daemon.sock && test -p /pipe && echo through > /pipe"
        process = gateway.node.popen("run", *flags, gateway.image, "--", "sh", "-c", script, user=alice)
        assert fifo.read_text() == "through\n"
        assert process.wait(20) == 0


def test_a_program_connects_to_a_socket_that_is_a_volume(
    shared_node: Node, alice: User, debian12_mpi_image: str, place: Path
) -> None:
    """Under Debian's perl, which opens the socket by the name it has inside."""
    shared_node.pull(debian12_mpi_image)
    directory = _tree(place / "d", alice)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(directory / "sock"))
        server.listen()
        server.settimeout(20)
        _give(alice, directory / "sock")
        code = "use IO::Socket::UNIX; $s = IO::Socket::UNIX->new('/var/tmp/there') or die $!; print $s 'hello'"
        flags = ["-v", f"{directory}/sock:/var/tmp/there"]
        shared_node.run(debian12_mpi_image, "perl", "-e", code, user=alice, flags=flags)
        connection, _ = server.accept()
        with connection:
            assert connection.recv(9) == b"hello"


@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero"])
def test_a_device_file_is_no_volume(profile: Profile, device: str) -> None:
    text = profile.refusal("true", flags=["-v", f"{device}:/etc/app.conf"])
    _require(text, "mount-source", device, "device file", "below /dev")


def test_a_device_file_in_a_volume_cannot_be_opened(gateway: Profile, place: Path) -> None:
    directory = _tree(place / "d", gateway.user)
    os.mknod(directory / "null", 0o20666, os.makedev(1, 3))
    os.chmod(directory / "null", 0o666)
    done = gateway.run("sh", "-c", "cat /x/null", flags=["-v", f"{directory}:/x"], check=1)
    assert b"Permission denied" in done.stderr


# places for volumes


def test_a_volume_is_mounted_on_its_own_kind_only(profile: Profile, mine: Path) -> None:
    assert profile.output("cat", "/etc/passwd", flags=["-v", f"{mine}/in:/etc/passwd"]) == "data\n"
    assert profile.output("cat", "/etc/hosts", flags=["-v", f"{mine}/in:/etc/hosts"]) == "data\n"
    assert profile.output("ls", "/etc", flags=["-v", f"{mine}:/etc"]) == "in\nsub\n"
    text = profile.refusal("true", flags=["-v", f"{mine}:/etc/passwd"], status=126)
    _require(text, "mount-target", "/etc/passwd", "it is a file in the image", "-v SRC:DST")
    text = profile.refusal("true", flags=["-v", f"{mine}/in:/usr"], status=126)
    _require(text, "mount-target", "/usr", "it is a directory in the image", "-v SRC:DST")


def test_a_volume_on_a_link_of_the_image_is_refused_with_the_place_it_leads_to(profile: Profile, mine: Path) -> None:
    text = profile.refusal("true", flags=["-v", f"{mine}/in:/bin/ls"], status=126)
    _require(text, "mount-target", "/bin/ls", "symbolic link", "busybox")


def test_a_volume_on_a_link_in_another_volume_is_refused_with_the_place_it_leads_to(
    profile: Profile, mine: Path
) -> None:
    (mine / "link").symlink_to("sub")
    text = profile.refusal("true", flags=["-v", f"{mine}:/m", "-v", f"{mine}:/m/link"], status=126)
    _require(text, "mount-target", "/m/link", "symbolic link", f"{mine}/sub")


def test_two_volumes_for_one_place_contradict_each_other(profile: Profile, mine: Path) -> None:
    text = profile.refusal("true", flags=["-v", f"{mine}:/x", "-v", f"{mine}/sub:/x/"])
    _require(text, "usage", f"{mine}/sub", "/x", "leave one out")
    assert profile.output("ls", "/x", flags=["-v", f"{mine}:/x", "-v", f"{mine}:/x/"]) == "in\nsub\n"


def test_nested_volumes_are_seen_in_whatever_order_they_are_given(profile: Profile, mine: Path) -> None:
    volumes = [f"{mine}:/a/b", f"{mine}/sub:/a/b/sub", f"{mine}/in:/a/c", f"{mine}:/a/b/sub/deep:ro"]
    (mine / "sub/deep").mkdir()
    for order in (volumes, volumes[::-1]):
        flags = [word for volume in order for word in ("-v", volume)]
        assert profile.output("cat", "/a/b/sub/deep/in", "/a/b/in", "/a/c", flags=flags) == "data\n" * 3


def test_a_read_only_volume_may_hold_a_writable_one(profile: Profile, mine: Path, place: Path) -> None:
    other = _tree(place / "other", profile.user)
    flags = ["-v", f"{mine}:/m:ro", "-v", f"{other}:/m/sub"]
    profile.run("sh", "-c", "echo x > /m/sub/new", flags=flags)
    assert (other / "new").exists()
    assert b"Read-only file system" in profile.run("sh", "-c", "echo x > /m/new", flags=flags, check=False).stderr
    text = profile.refusal("true", flags=["-v", f"{mine}:/m:ro", "-v", f"{other}:/m/none"], status=126)
    _require(text, "mount-target", "/m/none", str(mine), f"mkdir -p {mine}/none")


# many, long and odd


def test_sixty_volumes_are_mounted_and_more_than_possible_are_refused(profile: Profile, mine: Path) -> None:
    def flags(count: int) -> list[str]:
        return [word for number in range(count) for word in ("-v", f"{mine}:/many/{number}")]

    assert profile.output("sh", "-c", "cat /many/*/in | wc -l", flags=flags(60)) == "60\n"
    _require(profile.refusal("true", flags=flags(121)), "usage", "120", "common directory")


ODD = [b"two words", b"line\nbreak", b"\xff\xfe not text", "ümläut €".encode(), b"-dash", b"n" * 255, b"a\\ \"'$(x)`y`"]


@pytest.mark.parametrize("name", ODD, ids=["blanks", "newline", "bytes", "utf-8", "dash", "255", "quotes"])
def test_names_of_any_bytes_come_along(profile: Profile, mine: Path, name: bytes) -> None:
    directory = mine / os.fsdecode(name)
    directory.mkdir()
    (directory / "in").write_text("odd\n")
    _give(profile.user, directory)
    assert profile.output("cat", "in", cwd=directory) == "odd\n"
    assert profile.output("cat", f"/x/{os.fsdecode(name)}/in", flags=["-v", f"{directory}:/x/{os.fsdecode(name)}"]) == (
        "odd\n"
    )
    assert profile.output("sh", "-c", 'cat "$TMPDIR/in"', env={"TMPDIR": str(directory)}) == "odd\n"


def test_an_error_about_an_odd_name_stays_one_line_of_plain_text(profile: Profile) -> None:
    text = profile.refusal("true", flags=["-v", "/no\x1b[31m\nsuch:/x"])
    _require(text, "mount-source", "/no?[31m?such", "No such file")
    assert "\x1b" not in text and len(text.splitlines()) == 2


def _deep(directory: Path, *, length: int, parts: int) -> Path:
    """A directory whose path has LENGTH bytes, PARTS levels below."""
    each = (length - len(str(directory))) // parts - 1
    names = ["d" * each] * (parts - 1)
    rest = length - len(str(directory / "/".join(names))) - 1
    return directory / "/".join([*names, "e" * rest])


def test_paths_of_nearly_four_kilobytes_come_along(gateway: Profile, alice: User, place: Path) -> None:
    target = _deep(place / "t", length=4000, parts=20)
    target.mkdir(parents=True)
    (target / "in").write_text("deep\n")
    assert len(str(target)) == 4000
    assert gateway.output("cat", "in", cwd=target) == "deep\n"
    assert gateway.output("cat", f"{target}/in", flags=["-v", str(target)]) == "deep\n"


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("/" + "/".join(["d" * 200] * 21), "longer than 4095 bytes"),
        ("/" + "n" * 256, "more than 255 bytes"),
        ("/" + "/".join(["d"] * 65), "64 directories deep"),
    ],
)
def test_a_place_that_is_too_long_is_named(gateway: Profile, target: str, why: str) -> None:
    text = gateway.refusal("true", flags=["-v", f"/tmp:{target}"], status=126)
    _require(text, "mount-target", target[:100], why)


def test_a_working_directory_with_a_name_too_long_for_the_kernel_is_named(
    gateway: Profile, alice: User, place: Path
) -> None:
    directory = _empty(place / "d", alice)
    script = (
        f'n=$(printf "%0200d" 0); cd {directory}; for i in $(seq 22); do mkdir -p $n; cd -P ./$n; done; '
        f'exec {HPCCTR} run "$@"'
    )
    for words, status in (((gateway.image, "--", "true"), 125), (("-w", "/", gateway.image, "--", "true"), 0)):
        done = gateway.node.host.run(
            ["bash", "-c", script, "bash", *words], user=alice, env=gateway.node.environment(), check=status
        )
        if status:
            _require(done.stderr.decode(), "cwd", "longer than 4095 bytes", "-w DIR")


# options together


def test_options_mean_the_same_together(profile: Profile, mine: Path) -> None:
    flags: Sequence[str] = (
        *("--clean-env", "--no-home", "-w", "/x/sub", "--entrypoint", "sh", "-v", f"{mine}:/x"),
        *("-e", "A=1", "-e", "MINE"),
    )
    script = f'pwd; echo "$A $MINE ${{OTHER-none}} $HOME"; ls -d {profile.home} 2>&1; cat ../in'
    done = profile.run("-c", script, flags=flags, env={"MINE": "m", "OTHER": "o"}, cwd="/")
    lines = done.stdout.decode().splitlines()
    assert lines[:2] == ["/x/sub", f"1 m none {profile.home}"] and lines[-1] == "data"
    if profile.user is not None:
        assert "No such file" in lines[2]


def test_without_home_a_working_directory_in_the_home_still_comes_along(gateway: Profile, alice: User) -> None:
    work = Path(alice.home) / f"work-{os.getpid()}"
    work.mkdir()
    _give(alice, work)
    (Path(alice.home) / "secret").write_text("x")
    try:
        text = gateway.output("sh", "-c", f"pwd; ls -A {alice.home}", flags=["--no-home"], cwd=work)
        assert text == f"{work}\n{work.name}\n"
    finally:
        work.rmdir()
