"""Calls on a unix socket, against a gRPC server in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty

from hpcctr.containerd.channel import Channel
from hpcctr.errors import ContainerdUnavailable, ContainerExists, DeadlinePassed

METHOD = "/test.Service/Method"
Answer = Callable[[bytes, grpc.ServicerContext], bytes]


class OneMethod(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Answers every method in the same way, in bytes."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(self.answer)


def _serve(socket: Path, answer: Answer) -> grpc.Server:
    server = grpc.server(ThreadPoolExecutor(4), handlers=[OneMethod(answer)])
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    return server


@pytest.fixture
def channel(tmp_path: Path) -> Iterator[Channel]:
    made = Channel(str(tmp_path / "s"), namespace="hpcctr")
    yield made
    made.close()


def _call(channel: Channel, *, seconds: float = 5) -> Empty:
    return channel.call(METHOD, Empty(), Empty.FromString, seconds=seconds, what="answer")


def test_a_call_names_the_namespace_and_a_plain_authority(channel: Channel) -> None:
    seen: dict[str, object] = {}

    def answer(_: bytes, context: grpc.ServicerContext) -> bytes:
        seen.update(context.invocation_metadata())
        return b""

    server = _serve(Path(channel.socket), answer)
    _call(channel)
    server.stop(None).wait()
    assert seen["containerd-namespace"] == "hpcctr"


def test_nobody_on_the_socket_is_an_unavailable_containerd(channel: Channel) -> None:
    with pytest.raises(ContainerdUnavailable, match=channel.socket):
        _call(channel)


def test_the_next_call_reaches_a_server_that_has_just_come_back(channel: Channel) -> None:
    for _ in range(3):
        with pytest.raises(ContainerdUnavailable):
            _call(channel)
    server = _serve(Path(channel.socket), lambda _, __: b"")
    _call(channel)
    server.stop(None).wait()
    with pytest.raises(ContainerdUnavailable):
        _call(channel)
    server = _serve(Path(channel.socket), lambda _, __: b"")
    _call(channel)
    server.stop(None).wait()


def test_a_call_ends_at_its_deadline(channel: Channel) -> None:
    def slow(_: bytes, context: grpc.ServicerContext) -> bytes:
        while context.is_active():
            time.sleep(0.01)
        return b""

    server = _serve(Path(channel.socket), slow)
    before = time.monotonic()
    with pytest.raises(DeadlinePassed, match="did not answer in time"):
        _call(channel, seconds=0.2)
    assert time.monotonic() - before < 3
    server.stop(None).wait()


def test_a_refusal_is_an_error_of_ours(channel: Channel) -> None:
    def refuse(_: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.ALREADY_EXISTS, "container x exists")
        return b""

    server = _serve(Path(channel.socket), refuse)
    with pytest.raises(ContainerExists, match="containerd did not answer: container x exists"):
        _call(channel)
    server.stop(None).wait()


def test_a_proxy_of_the_environment_has_no_say(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    server = _serve(Path(channel.socket), lambda _, __: b"")
    _call(channel)
    server.stop(None).wait()
