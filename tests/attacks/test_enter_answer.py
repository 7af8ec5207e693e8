"""What enter accepts from the engine: one byte with one mount namespace, or a status with a text, and nothing else."""

from __future__ import annotations

import os
import resource
import socket

import pytest

from tests.support import enter
from tests.support.enter import World

pytestmark = pytest.mark.root


def _answered(
    world: World, *descriptors: int, data: bytes = b"\0", extra: list[tuple[int, int, bytes]] | None = None
) -> enter.Ended:
    launch = world.start(world.plan(["sh", "-c", "id"]))
    world.answer(*descriptors, data=data, extra=extra or [])
    return launch.finish()


def test_two_descriptors_are_not_accepted(world: World) -> None:
    _answered(world, world.container, world.container).require_refusal("protocol", "not one descriptor")


def test_more_descriptors_than_fit_are_not_accepted(world: World) -> None:
    _answered(world, *[world.container] * 100).require_refusal("protocol", "too long")


def test_an_answer_without_a_descriptor_is_not_accepted(world: World) -> None:
    _answered(world).require_refusal("protocol", "not one descriptor")


def test_an_error_that_carries_a_descriptor_is_not_accepted(world: World) -> None:
    _answered(world, world.container, data=b"\x7etext").require_refusal("protocol", "not one descriptor")


def test_a_descriptor_with_more_than_one_byte_is_not_accepted(world: World) -> None:
    _answered(world, world.container, data=b"\0\0").require_refusal("protocol", "not one descriptor")


def test_an_answer_that_does_not_fit_is_not_accepted(world: World) -> None:
    _answered(world, data=b"\x7e" + b"x" * 5000).require_refusal("protocol", "too long")
    _answered(world, world.container, data=b"\0" * 5000).require_refusal("protocol", "too long")


@pytest.mark.parametrize("option", [socket.SO_PASSCRED, 76], ids=["SO_PASSCRED", "SO_PASSPIDFD"])
def test_another_control_message_beside_the_descriptor_is_not_accepted(world: World, option: int) -> None:
    """A caller can ask for one on its end; the kernel puts credentials before the descriptor, a pidfd behind it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, option, 1)
        except OSError:
            pytest.skip("this kernel does not know the option")

    def ask_for_more() -> None:
        with socket.socket(fileno=os.dup(enter.DESCRIPTOR)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, option, 1)

    launch = world.start(world.plan(["sh", "-c", "id"]), before=ask_for_more)
    world.answer(world.container)
    launch.finish().require_refusal("protocol", "not one descriptor")


@pytest.mark.parametrize("kind", ["user", "pid", "net", "uts", "ipc", "cgroup"])
def test_a_namespace_of_another_kind_is_not_accepted(world: World, kind: str) -> None:
    namespace = os.open(f"/proc/self/ns/{kind}", os.O_RDONLY)
    ended = _answered(world, namespace)
    os.close(namespace)
    ended.require_refusal("protocol", "not a mount namespace")


@pytest.mark.parametrize("path", ["/etc/passwd", "/", "/proc/self/status", "/dev/null"])
def test_a_file_is_not_accepted_as_a_namespace(world: World, path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    ended = _answered(world, descriptor)
    os.close(descriptor)
    ended.require_refusal("view", "namespace from the engine")


def test_a_mount_namespace_of_the_users_own_user_namespace_changes_nothing_on_the_host(world: World) -> None:
    """Even if the engine were led to send one: it has no read-only root, and the launch ends there."""
    namespace, end = enter.namespace_of_a_child(world, enter.CLONE_NEWNS)
    ended = _answered(world, namespace)
    end()
    ended.require_refusal("view")


def test_the_answer_is_too_much_when_no_descriptor_is_free(world: World) -> None:
    def limit() -> None:
        # 0 to 2 are taken, enter opens /proc as 3, and the answer would be 4.
        resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4))

    argv = world.plan(["id"])
    argv[5:9] = ["0"]
    launch = world.start(argv, before=limit)
    world.answer(world.container)
    launch.finish().require_refusal("protocol", "limit of open files", "ulimit -n")
