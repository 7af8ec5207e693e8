"""What becomes of a gRPC status."""

from __future__ import annotations

import grpc
import pytest

from hpcctr.containerd import errors
from hpcctr.errors import ContainerdFailed, ContainerdUnavailable, ContainerExists, ContainerNotFound, DeadlinePassed


class Failure(grpc.RpcError):  # type: ignore[misc]
    """A failed call, as grpc raises it."""

    def __init__(self, code: grpc.StatusCode, details: str | None) -> None:
        super().__init__(details)
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._details


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_has_an_error_of_ours_with_a_remedy(code: grpc.StatusCode) -> None:
    assert code in errors._CLASSES
    error = errors.of_rpc_error(Failure(code, "why"), socket="/run/c.sock", what="build the container")
    assert type(error) is errors._CLASSES[code]
    assert error.hint


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (grpc.StatusCode.UNAVAILABLE, ContainerdUnavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlinePassed),
        (grpc.StatusCode.NOT_FOUND, ContainerNotFound),
        (grpc.StatusCode.ALREADY_EXISTS, ContainerExists),
        (grpc.StatusCode.UNKNOWN, ContainerdFailed),
    ],
)
def test_the_statuses_that_code_reacts_to_are_told_apart(code: grpc.StatusCode, cls: type[Exception]) -> None:
    assert type(errors.of_rpc_error(Failure(code, None), socket="/s", what="x")) is cls


def test_an_absent_containerd_is_named_by_its_socket_and_reason() -> None:
    details = "failed to connect to all addresses; last error: UNKNOWN: unix:/run/c.sock: No such file or directory"
    error = errors.of_rpc_error(Failure(grpc.StatusCode.UNAVAILABLE, details), socket="/run/c.sock", what="x")
    assert error.message.startswith("containerd does not answer on /run/c.sock: ")
    assert error.message.endswith("No such file or directory")
    assert "systemctl start containerd" in error.hint


def test_crun_on_a_hybrid_node_is_told_what_to_change() -> None:
    details = "OCI runtime create failed: cgroups in hybrid mode not supported, drop all controllers from cgroupv2"
    error = errors.of_rpc_error(Failure(grpc.StatusCode.UNKNOWN, details), socket="/s", what="build the container")
    assert 'runtime = "runc"' in error.hint


def test_texts_of_others_become_one_short_printable_line() -> None:
    assert errors.one_line("a\n\x1b[31mb\tc ") == "a [31mb c"
    assert len(errors.one_line("x" * 10_000)) == 600
