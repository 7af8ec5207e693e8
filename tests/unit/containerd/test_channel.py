"""Calls on a unix socket, against a gRPC server in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty

from hpcctr.containerd import channel as module
from hpcctr.containerd.channel import Channel
from hpcctr.errors import ContainerdUnavailable, ContainerExists, DeadlinePassed
from tests.support.polling import wait_until

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


def _wait_until_closed(channel: Channel) -> None:
    wait_until(lambda: channel._channel is None and not channel._is_watched)


def test_a_connection_nobody_uses_is_closed_and_the_next_call_makes_another(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.05)
    server = _serve(Path(channel.socket), lambda _, __: b"")
    for _ in range(3):
        _call(channel)
        _wait_until_closed(channel)
    server.stop(None).wait()


def test_a_call_that_takes_long_is_never_cut_off_by_a_rest(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.02)

    def slow(_: bytes, __: grpc.ServicerContext) -> bytes:
        time.sleep(0.3)
        return b""

    server = _serve(Path(channel.socket), slow)
    with ThreadPoolExecutor(8) as pool:
        for one in [pool.submit(_call, channel) for _ in range(24)]:
            one.result(20)
    _wait_until_closed(channel)
    server.stop(None).wait()


def test_calls_from_many_threads_survive_any_number_of_rests(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.001)
    server = _serve(Path(channel.socket), lambda _, __: b"")
    with ThreadPoolExecutor(4) as pool:
        for one in [pool.submit(_call, channel) for _ in range(300)]:
            one.result(20)
    _wait_until_closed(channel)
    server.stop(None).wait()
