"""Debuggers, tracers and profilers on a running program: from the host as natively, and from inside with exec."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Profile
from tests.support.engine import HPCCTR
from tests.support.node import Node
from tests.support.polling import wait_until
from tests.support.users import User

pytestmark = [
    pytest.mark.root,
    pytest.mark.containerd,
    pytest.mark.network,
    pytest.mark.usefixtures("module_leaves_nothing"),
]

PY_SPY = HPCCTR.with_name("py-spy")
#: Busy and asleep in turn, in functions with names.
PROGRAM = """
import os, time
def work_hard():
    return sum(range(20000))
def take_turns():
    while True:
        work_hard()
        time.sleep(0.001)
print(os.getpid(), flush=True)
take_turns()
"""
WORDS = ("python3", "-c", PROGRAM)


@pytest.fixture(params=["gateway", "direct"])
def tools(request: pytest.FixtureRequest, shared_node: Node, alice: User, debian_tools_image: str) -> Profile:
    """A Debian with a debugger, in every mode."""
    shared_node.pull(debian_tools_image)
    user = alice if request.param == "gateway" else None
    return Profile(name=request.param, node=shared_node, user=user, image=debian_tools_image)


@contextlib.contextmanager
def _running(tools: Profile, *, natively: bool = False) -> Iterator[int]:
    """The program, in a container or on the host; its pid."""
    words = ["/usr/bin/python3", *WORDS[1:]] if natively else [str(HPCCTR), "run", tools.image, "--", *WORDS]
    process = tools.node.host.popen(
        words, user=tools.user, env=tools.node.environment(), cwd="/tmp", stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    yield pid
    tools.node.host.run(["kill", str(pid)], user=tools.user)
    process.communicate(timeout=20)


def _host(tools: Profile, *argv: str, **options: object) -> str:
    done = tools.node.host.run(argv, user=tools.user, env=tools.node.environment(), **options)  # type: ignore[arg-type]
    return done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")


def _inside(tools: Profile, pid: int, *argv: str, **options: object) -> str:
    return _host(tools, str(HPCCTR), "exec", str(pid), "--", *argv, **options)


def _require_calls(text: str) -> None:
    """What strace tells of the program: it sleeps."""
    assert "clock_nanosleep(" in text or "select(" in text, text


TRACE = ("timeout", "--signal=INT", "1", "strace", "-e", "trace=clock_nanosleep,select,pselect6", "-p")


def test_strace_attaches_from_the_host_as_natively(tools: Profile) -> None:
    for natively in (True, False):
        with _running(tools, natively=natively) as pid:
            _require_calls(_host(tools, *TRACE, str(pid), check=124))


def test_strace_attaches_from_inside(tools: Profile) -> None:
    with _running(tools) as pid:
        _require_calls(_inside(tools, pid, *TRACE, str(pid), check=124))


def test_strace_traces_the_program_when_it_is_started_inside(tools: Profile) -> None:
    text = _host(tools, str(HPCCTR), "run", tools.image, "--", "strace", "-e", "trace=execve", "cat", "/etc/hostname")
    assert 'execve("/usr/bin/cat", ["cat", "/etc/hostname"]' in text


GDB = ("gdb", "-nx", "-batch", "-iex", "set debuginfod enabled off", "-iex", "set auto-load safe-path /")


def _require_backtrace(text: str) -> None:
    """Names of the program's own file and of its libraries."""
    assert re.search(r"#0 .*\n(?s:.*) in (main|Py_\w+|_Py\w+|PyEval\w+) ", text), text
    assert "__libc_start" in text, text


def test_gdb_attaches_from_the_host_as_natively(tools: Profile) -> None:
    with _running(tools, natively=True) as pid:
        _require_backtrace(_host(tools, *GDB, "-p", str(pid), "-ex", "backtrace"))
    copy = Path(tools.home) / "program"
    try:
        with _running(tools) as pid:
            # gdb follows the link /proc/PID/root when it is part of a program's name, and arrives at the host's file.
            _host(tools, "cp", f"/proc/{pid}/exe", str(copy))
            settings = ("-iex", f"set sysroot /proc/{pid}/root", "-iex", "set exec-file-mismatch off")
            _require_backtrace(_host(tools, *GDB, *settings, str(copy), "-p", str(pid), "-ex", "backtrace"))
    finally:
        copy.unlink(missing_ok=True)


def test_gdb_attaches_from_inside(tools: Profile) -> None:
    with _running(tools) as pid:
        _require_backtrace(_inside(tools, pid, *GDB, "-p", str(pid), "-ex", "backtrace"))


def test_gdb_starts_a_program_inside(tools: Profile) -> None:
    text = _host(
        tools, str(HPCCTR), "run", tools.image, "--", *GDB, "-ex", "run", "-ex", "backtrace", "--args",
        "python3", "-c", "import os; os.abort()",
    )  # fmt: skip
    assert "SIGABRT" in text and "__libc_start" in text, text


def test_py_spy_reads_the_stack_from_the_host_as_natively(tools: Profile) -> None:
    for natively in (True, False):
        with _running(tools, natively=natively) as pid:
            text = _host(tools, str(PY_SPY), "dump", "--pid", str(pid))
            assert "take_turns (<string>:" in text, text


def test_py_spy_reads_the_stack_from_inside(tools: Profile) -> None:
    own = Path(tools.home) / "py-spy"
    own.write_bytes(PY_SPY.read_bytes())
    own.chmod(0o755)
    try:
        with _running(tools) as pid:
            text = _inside(tools, pid, str(own), "dump", "--pid", str(pid))
            assert "take_turns (<string>:" in text, text
    finally:
        own.unlink()


def test_perf_counts_and_records_from_the_host_as_natively(tools: Profile, place: Path) -> None:
    asked = tools.node.host.run(["perf", "--version"], check=False)
    if asked.returncode != 0:
        pytest.skip("this machine has no perf")
    found = re.search(rb"(\d+)\.(\d+)", asked.stdout)
    assert found is not None, asked.stdout
    version = (int(found[1]), int(found[2]))
    data = Path(tools.home) / "perf.data"
    try:
        for natively in (True, False):
            with _running(tools, natively=natively) as pid:
                record = ("perf", "record", "-q", "-e", "cpu-clock:u", "-o", str(data), "-p", str(pid), "sleep", "0.5")
                _host(tools, *record)
                symfs = [] if natively else ["--symfs", f"/proc/{pid}/root"]
                text = _host(tools, "perf", "report", "-i", str(data), "--stdio", "--sort", "dso,symbol", *symfs)
                assert "python3" in text, text
                named = re.search(r"\[\.\] (_Py|Py|list|long)\w+", text) is not None
                # perf 6.12 of Debian 13 shows addresses where it is told of another root (--symfs).
                assert natively or named or version >= (6, 12), text
    finally:
        data.unlink(missing_ok=True)


def test_proc_shows_the_program_to_its_user(tools: Profile) -> None:
    with _running(tools) as pid:
        assert _host(tools, "cat", f"/proc/{pid}/root/etc/os-release") == tools.output("cat", "/etc/os-release")
        assert "python3" in _host(tools, "cat", f"/proc/{pid}/maps")
        assert _host(tools, "readlink", f"/proc/{pid}/cwd") == "/tmp\n"
        assert _host(tools, "readlink", f"/proc/{pid}/exe").startswith("/usr/bin/python3")
        _host(tools, "ls", f"/proc/{pid}/fd", f"/proc/{pid}/map_files", f"/proc/{pid}/task/{pid}")
        # Dumpable, as a program without anything special is: its files in /proc are its user's.
        assert os.stat(f"/proc/{pid}/environ").st_uid == tools.uid


def test_another_user_cannot_attach(tools: Profile, bob: User) -> None:
    with _running(tools) as pid:
        for argv in (["strace", "-p", str(pid)], ["gdb", "-nx", "-batch", "-p", str(pid)]):
            done = tools.node.host.run(argv, user=bob, check=False)
            assert b"peration not permitted" in done.stderr + done.stdout, done


def test_a_core_is_written_where_the_program_stands(tools: Profile) -> None:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if "/" in pattern or pattern.startswith("|"):
        pytest.skip(f"the core_pattern of this machine is {pattern}")
    directory = Path(tools.home) / "crashes"
    directory.mkdir()
    os.chown(directory, tools.uid, tools.uid if tools.user is None else tools.user.gid)
    try:
        run = f"{HPCCTR} run {tools.image} --"
        script = f'{run} python3 -c "import os; os.abort()"; echo $?'
        for limit, cores in (("0", 0), ("unlimited", 1)):
            text = _host(tools, "bash", "-c", f"ulimit -c {limit}; {script}", cwd=directory)
            assert "134\n" in text
            assert len(list(directory.iterdir())) == cores
        (core,) = directory.iterdir()
        assert core.stat().st_uid == tools.uid
        argv = (str(HPCCTR), "run", tools.image, "--", *GDB, "-ex", "backtrace", "/usr/bin/python3", core.name)
        text = _host(tools, *argv, cwd=directory)
        assert "__libc_start" in text, text
    finally:
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()


def test_a_traced_launch_is_refused_with_the_remedy(shared_node: Node, alice: User, busybox: str) -> None:
    tools = Profile(name="gateway", node=shared_node, user=alice, image=busybox)
    for tracer in (["strace", "-o", "/dev/null"], ["strace", "-f", "-o", "/dev/null"]):
        text = _host(tools, *tracer, str(HPCCTR), "run", busybox, "--", "true", check=126)
        assert "error[traced]" in text
        assert "hint: trace the program instead: hpcctr run IMAGE -- strace CMD, or attach with strace -p" in text
    text = _host(
        tools, "gdb", "-nx", "-batch", "-ex", "run", "--args", "/usr/bin/env", str(HPCCTR), "run", busybox, "--", "true"
    )
    assert "error[traced]" in text


def test_root_may_trace_a_launch(shared_node: Node, busybox: str) -> None:
    direct = Profile(name="direct", node=shared_node, user=None, image=busybox)
    assert "hello" in _host(
        direct, "strace", "-f", "-o", "/dev/null", str(HPCCTR), "run", busybox, "--", "echo", "hello"
    )


def test_a_stopped_program_waits_for_its_tracer(tools: Profile) -> None:
    script = "kill -STOP $$; exec cat /etc/hostname"
    process = tools.node.popen(
        "run", tools.image, "--", "sh", "-c", script, user=tools.user, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )

    def stopped() -> int:
        for one in tools.node.host.processes():
            if one.command == f"sh -c {script}" and one.state == "T":
                return one.pid
        return 0

    wait_until(stopped)
    pid = stopped()
    tracer = tools.node.host.popen(
        ["strace", "-e", "trace=execve", "-p", str(pid)], user=tools.user, stderr=subprocess.PIPE
    )
    wait_until(lambda: f"TracerPid:\t{tracer.pid}\n" in Path(f"/proc/{pid}/status").read_text())
    tools.node.host.run(["kill", "-CONT", str(pid)], user=tools.user)
    process.communicate(timeout=20)
    assert b'execve("/usr/bin/cat"' in tracer.communicate(timeout=20)[1]
