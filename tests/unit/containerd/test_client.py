"""The bytes the client sends, read back without the messages it used: by field numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from hpcctr.containerd.client import Containerd, RootfsMount
from hpcctr.errors import ContainerNotFound


class Recorder(grpc.GenericRpcHandler):  # type: ignore[misc]
    """A server that keeps what it is sent and answers with prepared bytes, or NOT_FOUND."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes]] = []
        self.answers: dict[str, bytes] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        method: str = handler_call_details.method

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            self.sent.append((method, request))
            if method not in self.answers:
                context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")
            return self.answers[method]

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    made = Recorder()
    server = grpc.server(ThreadPoolExecutor(2), handlers=[made])
    server.add_insecure_port(f"unix:{tmp_path / 's'}")
    server.start()
    yield made
    server.stop(None).wait()


@pytest.fixture
def client(recorder: Recorder, tmp_path: Path) -> Iterator[Containerd]:
    made = Containerd(str(tmp_path / "s"))
    yield made
    made.close()


def fields(message: bytes) -> dict[int, list[bytes | int]]:
    """The fields of a protobuf message by number (protobuf.dev/programming-guides/encoding)."""
    found: dict[int, list[bytes | int]] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        tag = varint()
        value: bytes | int
        if tag & 7 == 0:
            value = varint()
        else:
            assert tag & 7 == 2
            length = varint()
            value = message[at : at + length]
            at += length
        found.setdefault(tag >> 3, []).append(value)
    return found


CREATE_CONTAINER = "/containerd.services.containers.v1.Containers/Create"
CREATE_TASK = "/containerd.services.tasks.v1.Tasks/Create"


def _created(client: Containerd, recorder: Recorder, *, binary_name: str = "") -> dict[int, list[bytes | int]]:
    recorder.answers[CREATE_CONTAINER] = b""
    client.create_container("c1", labels={"hpcctr.uid": "7"}, spec={"ociVersion": "1.0.2"}, binary_name=binary_name)
    (method, request), *_ = recorder.sent
    assert method == CREATE_CONTAINER
    container = fields(request)[1][0]
    assert isinstance(container, bytes)
    return fields(container)


def test_a_record_is_id_labels_runtime_and_spec_and_no_more(client: Containerd, recorder: Recorder) -> None:
    container = _created(client, recorder)
    assert container.keys() == {1, 2, 4, 5}
    assert container[1] == [b"c1"]
    assert container[2] == [b"\x0a\x0ahpcctr.uid\x12\x017"]
    assert container[4] == [b"\x0a\x15io.containerd.runc.v2"]


def test_the_spec_is_json_under_containerds_name_for_it(client: Containerd, recorder: Recorder) -> None:
    spec = _created(client, recorder)[5][0]
    assert isinstance(spec, bytes)
    named = fields(spec)
    assert named[1] == [b"types.containerd.io/opencontainers/runtime-spec/1/Spec"]
    assert isinstance(named[2][0], bytes)
    assert json.loads(named[2][0]) == {"ociVersion": "1.0.2"}


def test_another_runtime_is_an_option_under_containerds_name_for_it(client: Containerd, recorder: Recorder) -> None:
    runtime = _created(client, recorder, binary_name="crun")[4][0]
    assert isinstance(runtime, bytes)
    options = fields(runtime)[2][0]
    assert isinstance(options, bytes)
    assert fields(options) == {1: [b"containerd.runc.v1.Options"], 2: [b"\x32\x04crun"]}


def test_a_task_is_created_with_its_mounts_and_without_stdio_or_options(client: Containerd, recorder: Recorder) -> None:
    recorder.answers[CREATE_TASK] = b"\x0a\x02c1\x10\xd2\x09"
    mount = RootfsMount(kind="overlay", source="overlay", options=("lowerdir=/a", "upperdir=/b"))
    assert client.create_task("c1", rootfs=[mount]) == 1234
    (_, request), *_ = recorder.sent
    task = fields(request)
    assert task.keys() == {1, 3}
    assert isinstance(task[3][0], bytes)
    assert fields(task[3][0]) == {1: [b"overlay"], 2: [b"overlay"], 4: [b"lowerdir=/a", b"upperdir=/b"]}


def test_the_client_has_no_way_to_start_a_task(client: Containerd) -> None:
    assert [name for name in dir(client) if "start" in name or "exec" in name] == []


def test_records_are_asked_for_by_label(client: Containerd, recorder: Recorder) -> None:
    recorder.answers["/containerd.services.containers.v1.Containers/List"] = bytes.fromhex("0a0f0a0263311209") + (
        b"\x0a\x01a\x12\x04bbbb"
    )
    (entry,) = client.list_containers(label="a", value="bbbb")
    assert (entry.container_id, entry.labels) == ("c1", {"a": "bbbb"})
    client.list_containers(label="a")
    assert [request for _, request in recorder.sent] == [b'\x0a\x12labels."a"=="bbbb"', b'\x0a\x0alabels."a"']


def test_a_task_that_does_not_exist_is_none(client: Containerd) -> None:
    assert client.find_task("c1") is None


def test_what_does_not_exist_cannot_be_deleted(client: Containerd) -> None:
    with pytest.raises(ContainerNotFound):
        client.delete_task("c1")
    with pytest.raises(ContainerNotFound):
        client.delete_container("c1")
