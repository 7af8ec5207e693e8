"""The filter denies what it lists and nothing that programs need; its numbers are the kernel's."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hpcctr.image import seccomp

pytestmark = pytest.mark.skipif(os.uname().machine not in ("x86_64", "aarch64"), reason="a processor without a list")


def filtered(code: str) -> subprocess.CompletedProcess[str]:
    """Run after the first filter is installed; ``denied(f, …)`` is whether a call fails with EPERM."""
    before = """
        import ctypes, errno, os, socket, subprocess, sys, threading
        from hpcctr.image import seccomp
        def denied(call, *arguments):
            try:
                call(*arguments)
            except OSError as error:
                return error.errno == errno.EPERM
            return False
        ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
        assert seccomp.deny_dangerous_calls()
    """
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"]}
    argv = [sys.executable, "-c", textwrap.dedent(before) + textwrap.dedent(code)]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "call",
    [
        "socket.socket",
        "socket.socketpair",
        "os.kill, os.getpid(), 0",
        "os.kill, 1, 9",
        "os.mkdir, '/tmp/no'",
        "os.chmod, '/tmp', 0o777",
        "os.unlink, '/tmp/none'",
        "os.rename, '/tmp/none', '/tmp/none2'",
        "os.symlink, '/', '/tmp/none'",
        "os.link, '/etc/passwd', '/tmp/none'",
        "os.truncate, '/tmp/none', 0",
        "os.chroot, '/'",
        "os.setxattr, '/tmp', 'user.x', b''",
        "os.mknod, '/tmp/none'",
    ],
)
def test_a_listed_call_is_denied(call: str) -> None:
    assert filtered(f"print(denied({call}))").stdout == "True\n"


def test_what_a_converter_and_its_writer_do_is_not_denied(tmp_path: Path) -> None:
    done = filtered(
        f"""
        done = []
        thread = threading.Thread(target=lambda: done.append(1))
        thread.start()
        thread.join()
        subprocess.run(["true"], check=True)
        with open({str(tmp_path / "f")!r}, "wb") as file:
            file.write(b"x")
            file.truncate(5)
        print(done, os.pread(os.open({str(tmp_path / "f")!r}, os.O_RDWR), 9, 0))
        """
    )
    assert done.stdout == "[1] b'x\\x00\\x00\\x00\\x00'\n", done.stderr


def test_after_the_second_filter_there_are_threads_and_no_new_processes_or_files() -> None:
    done = filtered(
        """
        child = os.fork()
        if not child:
            os._exit(7)
        descriptor = os.open("/etc/hostname", os.O_RDONLY)
        assert seccomp.deny_all_but_descriptors()
        thread = threading.Thread(target=lambda: print("thread", flush=True))
        thread.start()
        thread.join()
        print(denied(os.fork), denied(os.execv, "/bin/true", ["true"]), os.waitpid(child, 0)[1] >> 8)
        print(denied(os.open, "/etc/hostname", os.O_RDONLY), len(os.pread(descriptor, 1, 0)))
        print(denied(os.posix_spawn, "/bin/true", ["true"], {}))
        """
    )
    assert done.stdout == "thread\nTrue True 7\nTrue 1\nTrue\n", done.stderr


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x32 is of x86_64")
def test_calls_of_another_abi_end_the_program() -> None:
    assert filtered("ctypes.CDLL(None).syscall(0x40000000 | 41, 1, 1, 0)").returncode == -signal.SIGSYS


def test_children_are_filtered_as_well() -> None:
    assert (
        "denied"
        in filtered(
            """
        code = "import socket\\ntry: socket.socket()\\nexcept PermissionError: print('denied')"
        print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
        """
        ).stdout
    )


def test_without_no_new_privs_a_filter_is_an_error_for_ordinary_users() -> None:
    code = "from hpcctr.image import seccomp; seccomp.deny_dangerous_calls()"
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    user = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, cwd="/", **user)  # type: ignore[call-overload]
    assert "PR_SET_SECCOMP" in done.stderr


@pytest.mark.parametrize(("column", "header"), [(0, "x86_64-linux-gnu/asm/unistd_64.h"), (1, "asm-generic/unistd.h")])
def test_numbers_are_those_of_the_kernels_headers(column: int, header: str) -> None:
    path = Path("/usr/include") / header
    if not path.exists():
        pytest.skip(f"no {path}")
    known = {
        name: int(number)
        for name, number in re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)$", path.read_text(), re.MULTILINE)
    }
    # Newer than the headers of Debian 12.
    expected = known | {"fchmodat2": 452}
    calls = {**seccomp._DENIED, **seccomp._DENIED_LATER, "clone": seccomp._CLONE, "clone3": (seccomp._CLONE3,) * 2}
    found = {name: numbers[column] for name, numbers in calls.items() if numbers[column] is not None}
    assert found == {name: expected[name] for name in found}
    missing = {name for name, numbers in calls.items() if numbers[column] is None}
    assert not missing & known.keys()
