"""The client against a real containerd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hpcctr.containerd import Containerd as Client
from hpcctr.errors import ContainerdFailed, ContainerdUnavailable, ContainerExists, ContainerNotFound
from tests.support.containerd import Containerd

pytestmark = [pytest.mark.root, pytest.mark.containerd]


@pytest.fixture
def client(clean: Containerd) -> Iterator[Client]:
    made = Client(str(clean.socket))
    yield made
    made.close()


def test_a_daemon_tells_its_version(client: Client) -> None:
    assert client.version()[:1].isdigit()


def test_records_are_made_found_by_label_and_forgotten(client: Client, clean: Containerd) -> None:
    client.create_container("a1", labels={"hpcctr.owner": "x", "hpcctr.uid": "7"}, spec={})
    client.create_container("a2", labels={"hpcctr.owner": "direct-12"}, spec={})
    assert [entry.container_id for entry in client.list_containers(label="hpcctr.owner", value="direct-12")] == ["a2"]
    assert {entry.container_id for entry in client.list_containers(label="hpcctr.owner")} == {"a1", "a2"}
    (entry,) = client.list_containers(label="hpcctr.uid")
    assert entry.labels == {"hpcctr.owner": "x", "hpcctr.uid": "7"}
    assert entry.created > 1_700_000_000
    assert set(clean.containers()) == {"a1", "a2"}
    client.delete_container("a1")
    client.delete_container("a2")
    assert client.list_containers(label="hpcctr.owner") == []


def test_what_exists_and_what_does_not_are_told_apart(client: Client) -> None:
    client.create_container("b1", labels={}, spec={})
    with pytest.raises(ContainerExists):
        client.create_container("b1", labels={}, spec={})
    assert client.find_task("b1") is None
    with pytest.raises(ContainerNotFound):
        client.kill_task("b1")
    client.delete_container("b1")
    with pytest.raises(ContainerNotFound):
        client.delete_container("b1")


def test_a_spec_the_runtime_refuses_is_an_error_with_its_text(client: Client) -> None:
    client.create_container("c1", labels={}, spec={"ociVersion": "1.0.2", "process": {}})
    with pytest.raises(ContainerdFailed, match="containerd did not build the container: "):
        client.create_task("c1", rootfs=[])
    client.delete_container("c1")


def test_a_runtime_that_is_not_installed_is_named_with_a_remedy(client: Client) -> None:
    client.create_container("d1", labels={}, spec={"ociVersion": "1.0.2"}, binary_name="hpcctr-no-such-runtime")
    with pytest.raises(ContainerdFailed, match="hpcctr-no-such-runtime") as raised:
        client.create_task("d1", rootfs=[])
    assert "install that OCI runtime" in raised.value.hint
    client.delete_container("d1")


@pytest.mark.parametrize("kill", [False, True])
def test_calls_go_on_after_a_restart_of_containerd(client: Client, clean: Containerd, kill: bool) -> None:
    client.version()
    clean.process.kill() if kill else clean.process.terminate()
    clean.process.wait()
    with pytest.raises(ContainerdUnavailable, match=str(clean.socket)):
        client.version()
    clean.restart()
    client.version()
