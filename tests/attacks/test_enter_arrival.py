"""What a command finds when enter was given a lawful plan and a real namespace: it is the caller's own process."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
from pathlib import Path

import pytest

from tests.support import enter
from tests.support.enter import ALICE, ROOT, World
from tests.support.polling import wait_until

pytestmark = pytest.mark.root

OPEN_DESCRIPTORS = "n=0; while [ $n -lt 300 ]; do [ ! -e /proc/$$/fd/$n ] || l=$l$n,; n=$((n+1)); done"
"""Shell that leaves the numbers in $l. A glob over /proc/self/fd would show its own directory as well."""


def test_the_command_keeps_pid_uid_gid_and_groups(world: World) -> None:
    ended = world.run(world.plan(["sh", "-c", "echo $$; id -u; id -g; id -G; grep -E '^[UG]id' /proc/self/status"]))
    uid, gid = ALICE.uid, ALICE.gid
    assert ended.status == 0, ended
    assert ended.lines == [
        str(ended.pid),
        str(uid),
        str(gid),
        " ".join(map(str, ALICE.groups)),
        f"Uid:\t{uid}\t{uid}\t{uid}\t{uid}",
        f"Gid:\t{gid}\t{gid}\t{gid}\t{gid}",
    ]


def test_argv_and_environment_arrive_byte_for_byte(world: World) -> None:
    words = [b"cat", b"/proc/self/cmdline", b"/proc/self/environ", b"", b"\xff\xfe \n", b"--", b"\\"]
    env = {
        b"LD_PRELOAD": b"/tmp/evil.so",
        b"LD_LIBRARY_PATH": b"/x",
        b"GLIBC_TUNABLES": b"glibc.malloc.check=3",
        b"TMPDIR": b"/tmp/mine",
        b"BYTES": bytes(range(1, 256)),
        b"EMPTY": b"",
    }
    ended = world.run(world.plan(words, candidates=["/bin/cat"]), env=env)
    cmdline = b"".join(word + b"\0" for word in words)
    environ = b"".join(name + b"=" + value + b"\0" for name, value in env.items())
    assert ended.out == cmdline + environ


def test_a_megabyte_of_arguments_arrives(world: World) -> None:
    words = [os.urandom(50_000).hex() for _ in range(12)]
    ended = world.run(world.plan(["sh", "-c", 'echo $# ${#1}; echo "${12}"', "sh", *words]))
    assert ended.lines == ["12 100000", words[11]]


def test_the_command_starts_in_the_directory_asked_for(world: World) -> None:
    directory = world.directory("work")
    ended = world.run(world.plan(["pwd"], mounts=[(f"{directory}/.", "/mnt/one", "rw")], cwd="/mnt/one"))
    assert ended.lines == ["/mnt/one"]


def test_a_writable_mount_is_writable_and_a_read_only_one_is_not(world: World) -> None:
    writable, readable = world.directory("writable"), world.directory("readable")
    ended = world.run(
        world.plan(
            ["sh", "-c", "touch /mnt/one/made; touch /mnt/two/made; touch /made"],
            mounts=[(f"{writable}/.", "/mnt/one", "rw"), (f"{readable}/.", "/mnt/two", "ro")],
        )
    )
    assert ended.err.decode().splitlines() == [
        "touch: /mnt/two/made: Read-only file system",
        "touch: /made: Read-only file system",
    ]
    assert (writable / "made").stat().st_uid == ALICE.uid
    assert not (readable / "made").exists()


def test_every_mount_is_nosuid_and_nodev_but_dev_is_nosuid_only(world: World) -> None:
    directory = world.directory("carried")
    mounts = [("/sys/.", "/sys", "ro"), ("/dev/.", "/dev", "rw"), (f"{directory}/.", "/mnt/one", "rw")]
    ended = world.run(world.plan(["cat", "/proc/self/mountinfo"], mounts=mounts))
    options = {line.split()[4]: line.split()[5].split(",") for line in ended.lines}
    assert {"/", "/proc", "/sys", "/dev", "/mnt/one"} <= set(options)
    for target, flags in options.items():
        assert "nosuid" in flags, target
        assert "nodev" in flags or target.startswith("/dev"), target
        assert ("ro" in flags) == (target == "/" or target.startswith("/sys")), target
    assert "nodev" not in options["/dev"]


def test_a_setuid_program_in_a_carried_directory_gains_nothing(world: World) -> None:
    directory = world.directory("setuid", mode=0o755)
    program = directory / "busybox"
    program.write_bytes(Path("/bin/busybox").read_bytes())
    program.chmod(0o4755)
    os.chown(program, 0, 0)
    program.chmod(0o4755)
    ended = world.run(
        world.plan(
            ["/mnt/one/busybox", "id", "-u"],
            mounts=[(f"{directory}/.", "/mnt/one", "rw")],
            candidates=["/mnt/one/busybox"],
        )
    )
    assert ended.lines == [str(ALICE.uid)]


def test_a_device_node_in_a_carried_directory_is_dead_and_dev_null_lives(world: World) -> None:
    directory = world.directory("devices", mode=0o755)
    os.mknod(directory / "zero", 0o20666, os.makedev(1, 5))
    os.chmod(directory / "zero", 0o666)
    ended = world.run(
        world.plan(
            ["sh", "-c", "echo x > /dev/null && echo lives; : < /mnt/one/zero"],
            mounts=[("/dev/.", "/dev", "rw"), (f"{directory}/.", "/mnt/one", "rw")],
        )
    )
    assert ended.lines == ["lives"]
    assert b"/mnt/one/zero: Permission denied" in ended.err


def test_targets_nest_in_the_order_of_the_plan(world: World) -> None:
    outer, inner = world.directory("outer"), world.directory("inner")
    (outer / "below").mkdir()
    (inner / "file").write_text("inner\n")
    (inner / "file").chmod(0o644)
    (outer / "below").chmod(0o755)
    mounts = [(f"{outer}/.", "/mnt/one", "rw"), (f"{inner}/.", "/mnt/one/below", "ro")]
    ended = world.run(world.plan(["cat", "/mnt/one/below/file"], mounts=mounts))
    assert ended.lines == ["inner"]


def test_a_mount_goes_on_top_of_what_is_mounted_on_its_target(world: World) -> None:
    stacked = world.build_container(prepare="mount -t tmpfs under mnt/one; mount -t tmpfs over mnt/one")
    directory = world.directory("topmost")
    (directory / "seen").touch()
    launch = world.start(world.plan(["ls", "/mnt/one"], mounts=[(f"{directory}/.", "/mnt/one", "rw")]))
    world.answer(stacked)
    os.close(stacked)
    assert launch.finish().lines == ["seen"]


def test_a_file_is_mounted_onto_a_file(world: World) -> None:
    source = world.place / "file-source"
    source.write_text("of the caller\n")
    ended = world.run(world.plan(["cat", "/etc/file"], mounts=[(str(source), "/etc/file", "ro")]))
    assert ended.lines == ["of the caller"]


def test_mounts_beneath_a_source_come_with_it(world: World) -> None:
    tree = world.place / "tree"
    world.shell(f"mkdir -p {tree}/sub; mount -t tmpfs t {tree}/sub; touch {tree}/sub/deep")
    ended = world.run(world.plan(["ls", "/mnt/one/sub"], mounts=[(f"{tree}/.", "/mnt/one", "rw")]))
    world.shell(f"umount {tree}/sub")
    assert ended.lines == ["deep"]


def test_proc_sys_and_dev_are_those_of_the_host(world: World) -> None:
    mounts = [("/sys/.", "/sys", "rw"), ("/dev/.", "/dev", "rw")]
    ended = world.run(
        world.plan(["sh", "-c", "readlink /proc/self/ns/pid; stat -f -c %T /proc /sys; stat -c %d /dev"], mounts=mounts)
    )
    assert ended.lines == [os.readlink("/proc/self/ns/pid"), "proc", "sysfs", str(os.stat("/dev").st_dev)]


def test_no_capability_is_left_and_no_new_privileges_are_possible(world: World) -> None:
    question = ["grep", "-E", "^(Cap(Inh|Prm|Eff|Amb)|NoNewPrivs)", "/proc/self/status"]
    nothing = [f"Cap{name}:\t{0:016}" for name in ("Inh", "Prm", "Eff", "Amb")]
    for account in (ALICE, ROOT):
        assert world.run(world.plan(question), account=account).lines == [*nothing, "NoNewPrivs:\t1"]


def test_the_bounding_set_and_the_umask_are_left_alone(world: World) -> None:
    wanted = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapBnd")]
    question = ["grep", "-E", "^(CapBnd|Umask)", "/proc/self/status"]
    ended = world.run(world.plan(question), before=lambda: void(os.umask(0o031)))
    assert ended.lines == ["Umask:\t0031", *wanted]


def void(_: object) -> None:
    """For calls in a lambda whose result does not matter."""


def test_the_personality_is_put_back(world: World) -> None:
    address_no_randomize, uname26 = 0x0040000, 0x0020000
    wanted = address_no_randomize | uname26
    ended = world.run(
        world.plan(["cat", "/proc/self/personality"], personality=wanted),
        before=lambda: void(enter.require(enter.libc.personality(wanted))),
    )
    assert ended.lines == [f"{wanted:08x}"]


def test_the_signal_at_the_parents_death_is_put_back(world: World) -> None:
    directory = world.directory("pdeathsig")
    script = "trap 'touch /mnt/one/told; exit' USR1; touch /mnt/one/ready; while :; do sleep 0.05; done"
    argv = world.plan(["sh", "-c", script], mounts=[(f"{directory}/.", "/mnt/one", "rw")], pdeathsig=signal.SIGUSR1)

    def parent() -> None:
        world.run(argv)

    pid = world.child(parent, account=ROOT)
    wait_until((directory / "ready").exists, what="the command")
    os.kill(pid, signal.SIGKILL)
    assert enter.ended(pid) == -signal.SIGKILL
    wait_until((directory / "told").exists, what="the signal")


def test_enter_closes_its_own_descriptors_and_keeps_the_callers(world: World) -> None:
    read_end, write_end = os.pipe()

    def keep() -> None:
        os.dup2(write_end, 120)

    ended = world.run(world.plan(["sh", "-c", f"{OPEN_DESCRIPTORS}; echo $l; echo x >&120"]), before=keep)
    os.close(write_end)
    assert os.read(read_end, 10) == b"x\n"
    os.close(read_end)
    assert ended.lines == ["0,1,2,120,"]


def test_what_the_program_mounts_stays_out_of_a_host_whose_mounts_are_shared(systemd_like_world: World) -> None:
    world = systemd_like_world
    carried = world.directory("carried", mode=0o755)
    (carried / "below").mkdir()
    container = world.build_container(shared=True)
    assert any(tag.startswith("shared:") for mount in world.host.mounts() for tag in mount.tags)
    before = world.own_mounts()
    mounts = [(f"{carried}/.", "/mnt/one", "rw"), ("/tmp/.", "/tmp", "rw")]
    launch = world.start(world.plan(["cat", "/proc/self/mountinfo"], mounts=mounts))
    world.answer(container)
    ended = launch.finish()
    assert ended.status == 0, ended
    assert not re.search(rb" shared:\d+", ended.out)
    assert b"/mnt/one" in ended.out
    assert world.own_mounts() == before
    # The container's own view has no mount of the program's either.
    launch = world.start(world.plan(["cat", "/proc/self/mountinfo"]))
    world.answer(container)
    assert b"/mnt/one" not in launch.finish().out
    os.close(container)


def test_what_the_host_mounts_later_appears_in_a_running_program(systemd_like_world: World) -> None:
    world = systemd_like_world
    carried = world.directory("carried", mode=0o755)
    (carried / "later").mkdir()
    script = "touch /mnt/one/ready; until [ -e /mnt/one/later/there ]; do sleep 0.05; done; echo seen"
    launch = world.start(world.plan(["sh", "-c", script], mounts=[(f"{carried}/.", "/mnt/one", "rw")]))
    world.answer(world.container)
    wait_until((carried / "ready").exists, what="the program")
    world.shell(f"mount -t tmpfs later {carried}/later; touch {carried}/later/there")
    assert launch.finish().lines == ["seen"]
    world.shell(f"umount {carried}/later")


def test_a_command_that_is_nowhere_ends_with_127(world: World) -> None:
    ended = world.run(world.plan(["train"], candidates=["/usr/bin/train", "/etc/file/train", "/bin/train"]))
    ended.require_refusal("command-not-found", "train", "not found in the image")
    assert ended.status == 127


def test_a_command_that_may_not_be_executed_ends_with_126(world: World) -> None:
    ended = world.run(world.plan(["not-executable"], candidates=["/bin/not-executable", "/no/where"]))
    ended.require_refusal("not-executable", "permission denied")
    assert ended.status == 126


def test_a_command_in_no_known_format_ends_with_126(world: World) -> None:
    ended = world.run(world.plan(["no-format"]))
    ended.require_refusal("not-executable", "/bin/no-format", "not a program this machine can run")
    assert ended.status == 126


def test_a_missing_interpreter_is_named_as_such(world: World) -> None:
    ended = world.run(world.plan(["orphan"]))
    ended.require_refusal("not-executable", "/bin/orphan", "interpreter")
    assert ended.status == 126


def test_candidates_are_tried_in_order(world: World) -> None:
    tries = ["/no/where", "/etc/file/x", "/bin/not-executable", "/bin/script", "/bin/true"]
    assert world.run(world.plan(["script", "word"], candidates=tries)).lines == ["script word"]


def test_a_relative_candidate_is_looked_up_in_the_working_directory(world: World) -> None:
    assert world.run(world.plan(["script"], candidates=["./script"], cwd="/bin")).lines == ["script"]


def test_a_missing_working_directory_is_an_error_of_its_own(world: World) -> None:
    ended = world.run(world.plan(["pwd"], cwd="/not/there"))
    ended.require_refusal("cwd", "/not/there", "no such file or directory")
    assert ended.status == 125


def test_the_engine_sees_who_asks_from_the_kernel(world: World) -> None:
    launch = world.start(world.plan(["true"]))
    with world.accept() as connection:
        assert world.hear(connection) == (launch.pid, ALICE.uid, ALICE.gid)
        assert os.stat(f"/proc/{launch.pid}/exe").st_ino == world.program.stat().st_ino
        socket.send_fds(connection, [b"\0"], [world.container])
    assert launch.finish().status == 0


@pytest.mark.parametrize("asks_for_credentials", [False, True])
def test_root_is_served_over_a_socketpair(world: World, asks_for_credentials: bool) -> None:
    """A half that asks for credentials gets a name from the kernel at its first message (unix(7), autobind)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        if asks_for_credentials:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            ours.send(b"x")
            assert theirs.recv(1) == b"x"
            assert len(theirs.getpeername()) == 6
        launch = world.start(world.plan(["id", "-u"]), account=ROOT, sock=theirs)
        assert ours.recv(16) == b"E"
        socket.send_fds(ours, [b"\0"], [world.container])
        assert launch.finish().lines == ["0"]


def test_a_text_of_the_engine_is_written_as_it_is_with_its_status(world: World) -> None:
    text = b"hpcctr: error[policy-denied]: denied by 40-gpu.toml\nhint: ask \xc3\xa4\n"
    launch = world.start(world.plan(["true"]))
    world.answer(data=bytes([126]) + text)
    ended = launch.finish()
    assert (ended.status, ended.out, ended.err) == (126, b"", text)


def test_a_text_of_the_engine_arrives_though_it_hung_up_before_it_was_asked(world: World) -> None:
    launch = world.start(world.plan(["true"]))
    with world.accept() as connection:
        connection.send(b"\x7eno seat is free\n")
    ended = launch.finish()
    assert (ended.status, ended.err) == (126, b"no seat is free\n")


def test_a_peer_that_closes_without_an_answer_is_an_error(world: World) -> None:
    launch = world.start(world.plan(["true"]))
    world.accept().close()
    ended = launch.finish()
    ended.require_refusal("protocol", "closed the connection without an answer")
    assert ended.status == 125


def test_a_peer_that_closes_after_hearing_is_an_error(world: World) -> None:
    launch = world.start(world.plan(["true"]))
    with world.accept() as connection:
        world.hear(connection)
    launch.finish().require_refusal("protocol", "closed the connection without an answer")


def test_stopping_and_continuing_during_the_wait_changes_nothing(world: World) -> None:
    launch = world.start(world.plan(["pwd"]))
    with world.accept() as connection:
        world.hear(connection)
        for _ in range(3):
            enter.wait_for_state(launch.pid, "S")
            os.kill(launch.pid, signal.SIGSTOP)
            enter.wait_for_state(launch.pid, "T")
            os.kill(launch.pid, signal.SIGCONT)
        socket.send_fds(connection, [b"\0"], [world.container])
    assert launch.finish().lines == ["/"]


def test_a_socket_in_non_blocking_mode_is_waited_for(world: World) -> None:
    def set_nonblocking() -> None:
        os.set_blocking(enter.DESCRIPTOR, False)

    launch = world.start(world.plan(["pwd"]), before=set_nonblocking)
    with world.accept() as connection:
        world.hear(connection)
        enter.wait_for_state(launch.pid, "S")
        socket.send_fds(connection, [b"\0"], [world.container])
    assert launch.finish().lines == ["/"]


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_descriptors_closed_by_the_caller_stay_closed(world: World, closed: tuple[int, ...]) -> None:
    directory = world.directory("closed." + "".join(map(str, closed)))
    mounts = [(f"{directory}/.", "/mnt/one", "rw")]
    script = f"{OPEN_DESCRIPTORS}; echo $l > /mnt/one/list"
    ended = world.run(world.plan(["sh", "-c", script], mounts=mounts), closed=closed)
    assert ended.status == 0, ended
    assert (directory / "list").read_text() == "".join(f"{n}," for n in range(3) if n not in closed) + "\n"


@pytest.mark.parametrize("closed", [(2,), (0, 1, 2), (1, 2)])
def test_an_error_with_a_closed_descriptor_2_is_written_nowhere(world: World, closed: tuple[int, ...]) -> None:
    ended = world.run(world.plan(["nowhere"]), closed=closed)
    assert (ended.status, ended.out, ended.err) == (127, b"", b"")


def test_an_error_into_a_closed_pipe_keeps_its_status(world: World) -> None:
    def close_reader() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 2)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)

    assert world.run(world.plan(["nowhere"]), before=close_reader).status == 127


def test_proc_with_hidden_processes_is_no_obstacle(world: World) -> None:
    world.shell("mount -t proc -o hidepid=2,nosuid,nodev,noexec proc /proc")
    try:
        ended = world.run(world.plan(["sh", "-c", "ls /proc/1 || pwd"]))
        assert ended.lines == ["/"]
    finally:
        world.shell("umount /proc")


def test_128_mounts_are_carried(world: World) -> None:
    directory = world.directory("many")
    for number in range(127):
        (directory / f"{number}").mkdir()
    mounts = [(f"{directory}/.", "/mnt/one", "rw")]
    mounts += [(f"{directory}/{number}/.", f"/mnt/one/{number}", "ro") for number in range(126)]
    ended = world.run(world.plan(["grep", "-c", " /mnt/one/", "/proc/self/mountinfo"], mounts=mounts))
    assert ended.lines == ["126"]


def test_two_launches_share_nothing_but_the_container(world: World) -> None:
    one, other = world.directory("mine"), world.directory("theirs")
    (one / "a").touch()
    (other / "b").touch()
    first = world.start(world.plan(["ls", "/mnt/one"], mounts=[(f"{one}/.", "/mnt/one", "rw")]))
    second = world.start(world.plan(["ls", "/mnt/one"], mounts=[(f"{other}/.", "/mnt/one", "rw")]))
    world.answer(world.container)
    world.answer(world.container)
    assert (first.finish().lines, second.finish().lines) == (["a"], ["b"])


def test_credentials_sent_are_those_of_enter_itself(world: World) -> None:
    """The engine can tell a byte of enter's from one another holder of the same socket sends."""
    launch = world.start(world.plan(["true"]))
    connection = world.accept()
    _, ancillary, _, _ = connection.recvmsg(16, socket.CMSG_SPACE(12))
    assert struct.unpack("iII", ancillary[0][2])[0] == launch.pid
    connection.close()
    assert launch.finish().status == 125
