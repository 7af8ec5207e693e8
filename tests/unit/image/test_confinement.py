"""A confined program gets its socket and ends with it. What it cannot do, tests/attacks/test_converter.py shows."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from hpcctr.image import confinement
from hpcctr.image.confinement import LIMITS, spawn, start
from tests.support.polling import wait_until

ECHO = "import socket, sys; peer = socket.socket(fileno=int(sys.argv[1])); peer.send(peer.recv(99))"


@pytest.fixture
def echo() -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    peer, process = start(code=ECHO)
    with peer:
        yield peer, process
    process.wait(20)


def test_the_program_has_the_socket(echo: tuple[socket.socket, subprocess.Popen[bytes]]) -> None:
    peer, process = echo
    peer.send(b"hello")
    assert peer.recv(99) == b"hello"
    assert peer.recv(99) == b""
    assert process.wait(20) == 0


@pytest.mark.parametrize("how", [socket.SHUT_WR, socket.SHUT_RDWR, None])
def test_the_program_ends_with_the_socket(echo: tuple[socket.socket, subprocess.Popen[bytes]], how: int | None) -> None:
    peer, process = echo
    if how is None:
        peer.close()
    else:
        peer.shutdown(how)
    process.wait(20)


def test_a_program_that_fails_is_told() -> None:
    for code, says in (("import sys; sys.exit(3)", "ended with status 3"), ("no python", "ended with status 1")):
        peer, process = start(code=code)
        with peer:
            untrusted = peer.recv(9999)
        assert untrusted[:1] == b"E"
        assert says in json.loads(untrusted[1:])["message"]
        assert process.wait(20) == 1


@pytest.mark.parametrize(("uid", "gid"), [(0, None), (None, 0), (-1, None), (2**31 - 1, None), (None, 2**32)])
def test_no_odd_account_is_taken(uid: int | None, gid: int | None) -> None:
    peer, process = start(uid=uid, gid=gid, code=ECHO)
    with peer:
        untrusted = peer.recv(9999)
    assert untrusted[:1] == b"E"
    words = json.loads(untrusted[1:])
    assert words["slug"] == "conversion"
    assert "account" in words["message"]
    assert process.wait(20) == 1


def test_spawn_starts_a_converter_and_waits_for_its_end() -> None:
    threads = threading.active_count()
    peer = spawn()
    children = f"/proc/self/task/{os.getpid()}/children"
    with open(children) as file:
        assert file.read()
    peer.close()
    wait_until(lambda: threading.active_count() <= threads, what="the end of the supervisor")


def test_every_limit_is_one_the_kernel_takes() -> None:
    for limit, value in LIMITS.items():
        assert value >= 0
        hard = resource.getrlimit(limit)[1]
        assert hard == resource.RLIM_INFINITY or hard >= 0


def test_importing_it_loads_no_parser() -> None:
    code = "import sys, hpcctr.image.confinement; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True
    )
    loaded = set(run.stdout.split())
    assert confinement.__name__ in loaded
    assert not loaded & {"hpcctr.image.layers", "hpcctr.image.convert", "hpcctr.image.tarstream", "msgspec", "isal"}
