"""Callers whom root has confined without no_new_privs: they stay confined, or the launch says why it cannot be."""

from __future__ import annotations

import ctypes
import os
import struct

import pytest

from tests.support import enter, fidelity, odd_caller
from tests.support.enter import World

pytestmark = pytest.mark.root

_MOVE_MOUNT = 429


def _forbid_move_mount() -> None:
    """A seccomp filter that answers EPERM."""
    load_number, jump_if_equal, give = 0x20, 0x15, 0x06
    steps = (
        (load_number, 0, 0, 0),
        (jump_if_equal, 0, 1, _MOVE_MOUNT),
        (give, 0, 0, 0x00050001),
        (give, 0, 0, 0x7FFF0000),
    )
    program = b"".join(struct.pack("HBBI", *step) for step in steps)
    buffer = ctypes.create_string_buffer(program, len(program))
    filter_program = struct.pack("HxxxxxxQ", 4, ctypes.addressof(buffer))
    enter.require(enter.libc.prctl(22, 2, filter_program, 0, 0))


def test_a_seccomp_filter_against_mounts_ends_the_launch_and_is_named(world: World) -> None:
    ended = world.run(world.plan(["id"]), as_root=_forbid_move_mount)
    ended.require_refusal("caller-refused", "/proc", "Landlock domain or a seccomp filter", "forbids mounts")
    assert ended.out == b""


@pytest.mark.skipif(fidelity.landlock_version() < 6, reason="a kernel whose Landlock knows no signals")
def test_a_landlock_domain_for_signals_confines_the_command_as_well(world: World) -> None:
    outside = os.fork()
    if outside == 0:
        os.setresuid(*[enter.ALICE.uid] * 3)
        os.read(os.eventfd(0), 8)
        os._exit(0)
    try:
        signal_it = world.plan(["sh", "-c", f"kill -0 {outside} && echo reached"])
        assert world.run(signal_it).out == b"reached\n"
        ended = world.run(signal_it, as_root=lambda: odd_caller.landlock(files=False)([]))
        assert (ended.status, ended.out) == (1, b"")
        assert b"not permitted" in ended.err
    finally:
        os.kill(outside, 9)
        os.waitpid(outside, 0)
