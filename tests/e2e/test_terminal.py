"""At a terminal and in pipelines a program in a container behaves as it does without one: through a real tmux."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import Profile
from tests.support.engine import HPCCTR
from tests.support.host import Host
from tests.support.node import Node
from tests.support.polling import wait_until
from tests.support.terminal import PROMPT, Terminal
from tests.support.users import User

pytestmark = [
    pytest.mark.root,
    pytest.mark.containerd,
    pytest.mark.network,
    pytest.mark.usefixtures("module_leaves_nothing"),
    pytest.mark.timeout(120, func_only=True),
]


@pytest.fixture(params=["gateway", "direct"])
def tools(request: pytest.FixtureRequest, shared_node: Node, alice: User, debian_tools_image: str) -> Profile:
    """A Debian with an editor and a pager, in every mode."""
    shared_node.pull(debian_tools_image)
    user = alice if request.param == "gateway" else None
    return Profile(name=request.param, node=shared_node, user=user, image=debian_tools_image)


@pytest.fixture
def terminal(tools: Profile) -> Iterator[Terminal]:
    with Terminal.start(tools.node.host, user=tools.user, env=tools.node.environment()) as started:
        yield started


def _line(tools: Profile, *command: str) -> str:
    return " ".join([str(HPCCTR), "run", tools.image, "--", *command])


INSIDE = "inside>"


def _shell(tools: Profile, terminal: Terminal) -> None:
    """An interactive shell in the container, at its prompt."""
    terminal.type(f"PS1='{INSIDE} ' {_line(tools, 'bash', '--norc', '--noprofile', '-i')}")
    terminal.wait_for(f"^{INSIDE}")
    assert "no job control" not in terminal.screen()


def _end_of_shell(terminal: Terminal, status: int) -> None:
    terminal.clear()
    terminal.type(f"exit {status}")
    terminal.wait_for(rf"^{PROMPT}")
    assert terminal.says("echo $?") == str(status)


def _pids(terminal: Terminal, command: str) -> list[int]:
    """Living processes of the Host with this command line."""
    return [process.pid for process in terminal.host.processes() if process.command == command]


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
        return file.read().rsplit(")", 1)[1].split()[0]


# interactive shells


def test_an_interactive_shell_has_job_control(tools: Profile, terminal: Terminal) -> None:
    _shell(tools, terminal)
    terminal.type("sleep 1234")
    wait_until(lambda: _pids(terminal, "sleep 1234"))
    terminal.press("C-z")
    terminal.wait_for(r"Stopped +sleep 1234")
    (sleeping,) = _pids(terminal, "sleep 1234")
    assert _state(sleeping) == "T"
    terminal.type("bg")
    terminal.wait_for(r"\[1\]\+ sleep 1234 &")
    assert "Running" in terminal.says("jobs")
    assert _state(sleeping) == "S"
    terminal.clear()
    terminal.type("fg")
    terminal.wait_for(r"^sleep 1234$")
    terminal.press("C-c")
    terminal.wait_for(rf"\^C\n(?:\n)?{INSIDE}")
    assert terminal.says("echo $?") == "130"
    assert not _pids(terminal, "sleep 1234")
    _end_of_shell(terminal, 23)


def test_an_interactive_shell_can_be_suspended_and_resumed(tools: Profile, terminal: Terminal) -> None:
    _shell(tools, terminal)
    terminal.clear()
    terminal.type("suspend")
    terminal.wait_for(rf"^{PROMPT}")
    assert "Stopped" in terminal.says("jobs")
    terminal.clear()
    terminal.type("fg")
    terminal.wait_for(rf"^{INSIDE}")
    assert terminal.says("echo $((6 * 7))") == "42"
    _end_of_shell(terminal, 5)


def test_interrupt_and_end_of_input_at_the_prompt_of_a_shell(tools: Profile, terminal: Terminal) -> None:
    _shell(tools, terminal)
    terminal.type("half a command", enter=False)
    terminal.press("C-c")
    terminal.wait_for(rf"half a command\^C\n{INSIDE}")
    assert terminal.says("echo $?") == "130"
    terminal.press("C-d")
    terminal.wait_for(rf"exit\n{PROMPT}")


# a program as a job of the host's shell


def test_the_hosts_shell_stops_and_resumes_the_program_as_its_own_job(tools: Profile, terminal: Terminal) -> None:
    terminal.type(_line(tools, "sleep", "4321"))
    wait_until(lambda: _pids(terminal, "sleep 4321"))
    (program,) = _pids(terminal, "sleep 4321")
    terminal.clear()
    terminal.press("C-z")
    terminal.wait_for(rf"(?s)Stopped +.*^{PROMPT}")
    assert _state(program) == "T"
    terminal.type("bg")
    wait_until(lambda: _state(program) == "S")
    assert "Running" in terminal.says("jobs")
    terminal.clear()
    terminal.type("fg")
    terminal.wait_for("sleep 4321$")
    terminal.press("C-z")
    terminal.wait_for(rf"(?s)Stopped +.*^{PROMPT}")
    assert _state(program) == "T"
    terminal.clear()
    terminal.type("fg")
    wait_until(lambda: _state(program) == "S")
    terminal.press("C-c")
    terminal.wait_for(rf"\^C\n(?:\n)?{PROMPT}")
    assert terminal.says("echo $?") == "130"


def test_a_program_that_only_stops_itself_gives_the_terminal_back(tools: Profile, terminal: Terminal) -> None:
    terminal.type(_line(tools, "sh", "-c", "'kill -STOP $$; echo resumed; exit 9'"))
    terminal.wait_for(rf"(?s)Stopped.*^{PROMPT}")
    terminal.clear()
    terminal.type("fg")
    terminal.wait_for(rf"(?s)^resumed$.*{PROMPT}")
    assert terminal.says("echo $?") == "9"


def test_a_program_that_ignores_the_keys_stays_in_the_foreground(tools: Profile, terminal: Terminal) -> None:
    terminal.type(_line(tools, "sh", "-c", "\"trap '' INT TSTP QUIT; echo ready; read answer; echo got \\$answer\""))
    terminal.wait_for("^ready$")
    terminal.press("C-z", "C-c", "C-\\")
    terminal.type("this")
    terminal.wait_for(r"^got this$")
    terminal.wait_for(rf"^{PROMPT}")


def test_a_signal_typed_is_received_once(tools: Profile, terminal: Terminal) -> None:
    script = (
        "n=0; trap 'n=$((n+1))' INT WINCH; echo ready; read a; while [ $n = 0 ]; do read a; done; read a; echo n=$n"
    )
    assert '"' not in script
    terminal.type(_line(tools, "bash", "-c", '"' + script.replace("$", "\\$") + '"'))
    terminal.wait_for("^ready$")
    terminal.press("C-c")
    terminal.wait_for(r"\^C")
    for _ in range(3):
        terminal.press("Enter")
    terminal.wait_for(r"^n=1$")


def test_a_background_program_that_reads_stops_and_can_be_brought_back(tools: Profile, terminal: Terminal) -> None:
    terminal.type(_line(tools, "cat") + " &")
    terminal.wait_for(r"\[1\] \d+")
    wait_until(lambda: [pid for pid in _pids(terminal, "cat") if _state(pid) == "T"])
    assert "Stopped" in terminal.says("jobs")
    terminal.type("fg")
    terminal.type("hello")
    terminal.wait_for(r"(?s)^hello\nhello$")
    terminal.press("C-d")
    terminal.wait_for(rf"^{PROMPT}")


# full-screen programs


def test_an_editor_edits_is_suspended_and_saves(tools: Profile, terminal: Terminal) -> None:
    path = f"{tools.home}/edited"
    before = terminal.says("stty -a")
    terminal.type(_line(tools, "vim.tiny", path))
    terminal.wait_for(r"(?s)^~.*^~")
    terminal.press("i")
    terminal.type("first line")
    terminal.type("second line", enter=False)
    terminal.press("Escape")
    terminal.type(":w")
    terminal.wait_for("2L|2 lines|written")
    terminal.press("C-z")
    terminal.wait_for(rf"(?s)Stopped.*^{PROMPT}")
    assert terminal.says("cat " + path) == "first line\nsecond line"
    terminal.clear()
    terminal.type("fg")
    terminal.wait_for(r"(?s)^first line\nsecond line\n~")
    terminal.type(":q")
    terminal.wait_for(rf"^{PROMPT}")
    assert terminal.says("stty -a") == before
    terminal.says("rm " + path)


def test_a_pager_pages_searches_and_follows_the_size(tools: Profile, terminal: Terminal) -> None:
    terminal.type(_line(tools, "sh", "-c", "'seq 1 5000 | less'"))
    terminal.wait_for(r"^29$")
    terminal.type("/4321")
    terminal.wait_for(r"^4321$")
    terminal.press("g")
    terminal.wait_for(r"^1$")
    terminal.resize(90, 20)
    wait_until(lambda: re.search(r"(?s)^1\n.*^19\n:", terminal.screen(), re.MULTILINE), what=terminal.screen)
    terminal.press("q")
    terminal.wait_for(rf"^{PROMPT}")


# the terminal itself


def test_the_terminal_is_the_callers_own(tools: Profile, terminal: Terminal) -> None:
    for probe in (
        "tty",
        "stty -a",
        "sh -c 'echo x >/dev/tty'",
        "ls -l /proc/self/fd/0",
        "cut -d' ' -f7 /proc/self/stat",
    ):
        inside = terminal.says(_line(tools, *probe.split(" ") if "'" not in probe else [probe]))
        outside = terminal.says(probe)
        if probe.startswith("ls"):
            assert inside.split("->")[1] == outside.split("->")[1]
        else:
            # The image's stty and the host's may fold their lines differently.
            assert inside.split() == outside.split() != []


def test_a_new_size_arrives_at_once(tools: Profile, terminal: Terminal) -> None:
    _shell(tools, terminal)
    assert terminal.says("stty size") == "30 100"
    terminal.type("trap 'echo size $(stty size)' WINCH")
    terminal.resize(77, 21)
    # A shell looks at its traps when its wait for a key is over.
    terminal.press("Enter")
    terminal.wait_for(r"size 21 77$")
    assert terminal.says("stty size") == "21 77"
    _end_of_shell(terminal, 0)


def test_what_a_program_does_to_the_terminal_is_done_to_it(tools: Profile, terminal: Terminal) -> None:
    before = terminal.says("stty -a")
    terminal.says(_line(tools, "stty", "-ixon", "erase", "^H"))
    changed = terminal.says("stty -a")
    assert "-ixon" in changed and "erase = ^H" in changed
    terminal.says("stty ixon erase '^?'")
    assert terminal.says("stty -a") == before


def test_a_secret_is_read_without_echo_from_the_terminal(tools: Profile, terminal: Terminal) -> None:
    code = "import getpass; print('length', len(getpass.getpass('secret: ')))"
    # Standard input is a pipe: it is /dev/tty that is asked.
    terminal.type("true | " + _line(tools, "python3", "-c", f'"{code}"'))
    terminal.wait_for("^secret: ")
    terminal.type("s3cr3t")
    terminal.wait_for("^length 6$")
    assert "s3cr3t" not in terminal.screen()
    assert "-echo " not in terminal.says("stty -a")


def test_a_program_that_is_killed_leaves_the_shell_its_terminal(tools: Profile, terminal: Terminal) -> None:
    terminal.type(_line(tools, "sh", "-c", "'kill -KILL $$'"))
    terminal.wait_for(rf"(?s)Killed.*^{PROMPT}")
    assert terminal.says("echo $?") != ""


def test_exec_gives_a_second_shell_beside_a_running_program(tools: Profile, terminal: Terminal) -> None:
    process, said = tools.start("sh", "-c", "echo $$; exec cat")
    shell = "bash --norc --noprofile -i"
    terminal.type(f"PS1='{INSIDE} ' {HPCCTR} exec {said} -- {shell}")
    terminal.wait_for(f"^{INSIDE}")
    assert "no job control" not in terminal.screen()
    terminal.type("sleep 777")
    wait_until(lambda: _pids(terminal, "sleep 777"))
    terminal.press("C-z")
    terminal.wait_for(r"Stopped +sleep 777")
    terminal.says("kill %1; wait")
    _end_of_shell(terminal, 3)
    process.communicate()


# pipelines


def test_a_pipeline_of_containers_is_one_job(tools: Profile, terminal: Terminal) -> None:
    line = f"{_line(tools, 'seq', '1', '1000')} | {_line(tools, 'grep', '7')} | {_line(tools, 'wc', '-l')}"
    assert terminal.says(line) == terminal.says("seq 1 1000 | grep 7 | wc -l") == "271"
    terminal.clear()
    terminal.type(f"{_line(tools, 'sleep', '999')} | {_line(tools, 'cat')} | {_line(tools, 'cat')}")
    wait_until(lambda: _pids(terminal, "sleep 999") and len(_pids(terminal, "cat")) >= 2)
    terminal.press("C-z")
    terminal.wait_for(rf"(?s)Stopped.*^{PROMPT}")
    assert {_state(pid) for pid in (*_pids(terminal, "sleep 999"), *_pids(terminal, "cat"))} == {"T"}
    terminal.clear()
    terminal.type("fg")
    wait_until(lambda: {_state(pid) for pid in _pids(terminal, "sleep 999")} == {"S"})
    terminal.press("C-c")
    terminal.wait_for(rf"\^C\n(?:\n)?{PROMPT}")
    wait_until(lambda: not _pids(terminal, "sleep 999"))


def _bash(tools: Profile, script: str, **options: object) -> str:
    host: Host = tools.node.host
    done = host.run(["bash", "-c", script], user=tools.user, env=tools.node.environment(), **options)  # type: ignore[arg-type]
    return done.stdout.decode()


def test_a_reader_that_has_enough_ends_the_writer_as_natively(tools: Profile) -> None:
    def script(yes: str, head: str) -> str:
        return f"{yes} | {head}; echo ${{PIPESTATUS[@]}}"

    native = _bash(tools, script("yes", "head -n 1"))
    assert native == "y\n141 0\n"
    before = time.monotonic()
    assert _bash(tools, script(_line(tools, "yes"), _line(tools, "head", "-n", "1"))) == native
    assert _bash(tools, script(_line(tools, "yes"), "head -n 1")) == native
    assert time.monotonic() - before < 30


def test_a_script_of_the_caller_can_ignore_a_closed_pipe(tools: Profile) -> None:
    # bash says nothing about signals ignored when it started; the program writes and sees EPIPE.
    script = "trap '' PIPE; {yes} | true; echo ${{PIPESTATUS[0]}}"
    native = _bash(tools, script.format(yes="yes 2>/dev/null"))
    assert _bash(tools, script.format(yes=_line(tools, "yes") + " 2>/dev/null")) == native == "1\n"


def test_ten_gigabytes_pass_through_at_the_speed_of_a_pipe(tools: Profile, capsys: pytest.CaptureFixture[str]) -> None:
    size = 10 * 2**30

    def seconds(argv: list[str]) -> float:
        """The time between the first and the last byte: the launch itself is not what is measured."""
        process = tools.node.host.popen(argv, user=tools.user, env=tools.node.environment(), stdout=subprocess.PIPE)
        assert process.stdout is not None
        number = process.stdout.fileno()
        buffer = bytearray(2**16)
        got = os.readv(number, [buffer])
        begun = time.monotonic()
        while count := os.readv(number, [buffer]):
            got += count
        taken = time.monotonic() - begun
        assert (process.wait(20), got) == (0, size)
        return taken

    writer = ["head", "-c", str(size), "/dev/zero"]
    contained = seconds([str(HPCCTR), "run", tools.image, "--", *writer])
    native = seconds(writer)
    with capsys.disabled():
        print(
            f"\n10 GiB through stdout, {tools.name}: {size / contained / 1e9:.1f} GB/s in a container, "
            f"{size / native / 1e9:.1f} GB/s natively, ratio {native / contained:.2f}"
        )


# standard input


def test_input_comes_from_a_pipe_a_file_or_nowhere(tools: Profile) -> None:
    run = _line(tools, "sh", "-c", "'cat; readlink /proc/self/fd/0 | sed s/[0-9].*//'")
    native = "sh -c 'cat; readlink /proc/self/fd/0 | sed s/[0-9].*//'"
    for source in ("printf abc | {}", "{} </etc/hostname", "{} </dev/null", "{} <<<here", "cat /etc/passwd | {}"):
        assert _bash(tools, source.format(run)) == _bash(tools, source.format(native)), source


def test_a_closed_input_stays_closed(tools: Profile) -> None:
    probe = "ls /proc/self/fd | tr '\\n' ' '"
    script = "{} <&- 2>/dev/null"
    native = _bash(tools, script.format(f'sh -c "{probe}"'))
    assert _bash(tools, script.format(_line(tools, "sh", "-c", f'"{probe}"'))) == native


def test_a_part_of_a_file_is_read_and_the_rest_is_left(tools: Profile) -> None:
    script = "printf 'one\\ntwo\\nthree\\n' >f; ({} ; cat) <f; rm f"
    line = _line(tools, "sh", "-c", "'read a; echo got $a'")
    assert _bash(tools, script.format(line)) == _bash(tools, script.format("sh -c 'read a; echo got $a'"))


def test_a_socket_is_input_and_output_as_inetd_has_it(tools: Profile) -> None:
    ours, its = socket.socketpair()
    process = tools.node.popen(
        "run", tools.image, "--", "sh", "-c", "read a; echo you said $a", user=tools.user, stdin=its, stdout=its
    )
    its.close()
    ours.sendall(b"hello\n")
    assert ours.makefile("rb").read() == b"you said hello\n"
    assert process.wait(20) == 0
    ours.close()


def test_output_that_is_closed_is_an_error_of_the_program(tools: Profile) -> None:
    script = "{} >&-; echo $?"
    assert _bash(tools, script.format(_line(tools, "echo", "x") + " 2>/dev/null")) == _bash(
        tools, script.format("/bin/echo x 2>/dev/null")
    )


def test_without_a_terminal_there_is_none(tools: Profile) -> None:
    done = tools.run("sh", "-c", "tty; exec 3</dev/tty", check=False)
    native = tools.node.host.run(["sh", "-c", "tty; exec 3</dev/tty"], user=tools.user, check=False)
    assert (done.stdout, done.returncode) == (native.stdout, native.returncode)
    assert b"No such device or address" in done.stderr


def test_signals_sent_to_the_group_or_to_hpcctr_reach_the_program(tools: Profile) -> None:
    script = "trap 'echo got; exit 7' INT TERM; echo ready; while :; do sleep 0.05; done"
    for number in (signal.SIGINT, signal.SIGTERM):
        process, _ = tools.start("sh", "-c", script)
        process.send_signal(number)
        assert process.communicate(timeout=20)[0] == b"got\n"
        assert process.returncode == 7
