"""However many processes on however many hosts want an image: one downloads, one converts, and nothing is lost when the
one that does dies, stands still, or is told to end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpcctr.image import claims
from hpcctr.image.pull import pull
from hpcctr.image.reference import ImageRef
from hpcctr.image.store import Store
from hpcctr.site import Site
from tests.cluster.gluster import gluster
from tests.cluster.hosts import hosts as wired_hosts
from tests.support.host import Host
from tests.support.oci import Image, digest_of, file, tar
from tests.support.polling import wait_until
from tests.support.pullers import Crowd, Order, pulling
from tests.support.registry import Registry
from tests.support.scratch import scratch
from tests.support.users import User

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes hosts")

LAYERS = 6
IMAGE = Image(
    layers=tuple(tar(file(f"layer{number}", os.urandom(1 << 20))) for number in range(LAYERS)), compression="gzip"
)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry.start(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="module")
def four_hosts() -> Iterator[list[Host]]:
    """Hosts of one network, so that all reach the registry on loopback."""
    with scratch("once") as root, contextlib.ExitStack() as stack:
        started = []
        for number in range(1, 5):
            (root / f"n{number}").mkdir(mode=0o755)
            started.append(stack.enter_context(Host.start(root / f"n{number}", hostname=f"n{number}")))
        yield started


@pytest.fixture
def order(place: Path, registry: Registry, request: pytest.FixtureRequest, alice: User) -> Order:
    """A store that belongs to an ordinary user, and an image of a name of its own."""
    repository = f"once/{abs(hash(request.node.nodeid))}"
    registry.push_image(repository, "1", IMAGE)
    for name in ("store", "signs"):
        (place / name).mkdir(mode=0o755)
        os.chown(place / name, alice.uid, alice.gid)
    return Order(image=f"{registry.address}/{repository}:1", store=str(place / "store"), directory=str(place / "signs"))


def changed(order: Order, **changes: Any) -> Order:
    return Order(**{**order.__dict__, **changes})


def blob_requests(registry: Registry, order: Order) -> dict[str, int]:
    """Blob to how often it was asked for, by the registry's own log."""
    repository = order.image.partition("/")[2].rpartition(":")[0]
    return registry.requests(f"/v2/{repository}/blobs/")


def require_all_have_it(crowd: Crowd, store: str, *, missing: int = 0) -> None:
    done = crowd.happened("done")
    assert not crowd.happened("failed") + crowd.happened("crashed"), crowd.events()
    assert len(done) == len(crowd.happened("ready")) - missing
    assert {event["digest"] for event in done} == {IMAGE.digest}
    image = Store.open(store).find(crowd.order.image)
    assert image.record.digest == IMAGE.digest
    os.close(Store.open(store).open_image_file(image))
    assert os.listdir(f"{store}/claims") == []
    assert os.listdir(f"{store}/blobs") == []


# one works


def require_done_once(crowd: Crowd, registry: Registry) -> None:
    require_all_have_it(crowd, crowd.order.store)
    assert len(crowd.happened("write")) == 1, "one conversion"
    assert len([event for event in crowd.happened("done") if event["brought_here"]]) == 1
    requests = blob_requests(registry, crowd.order)
    assert set(requests) == {digest_of(blob) for blob in IMAGE.blobs()[1]}
    assert set(requests.values()) == {1}, "each blob crosses the network once"
    (worker,) = crowd.happened("claim")[:1]
    waited = crowd.happened("wait")
    assert len(waited) >= 16
    assert [worker["host"], worker["pid"]] in [event["worker"] for event in waited]
    assert crowd.happened("seen"), "how far it is was told"
    assert os.listdir(f"{crowd.order.store}/tmp") == []


def test_thirty_two_processes_on_four_hosts_download_and_convert_once(
    four_hosts: list[Host], order: Order, registry: Registry, alice: User
) -> None:
    with pulling(four_hosts, order, user=alice) as crowd:
        crowd.go()
        crowd.wait()
        require_done_once(crowd, registry)
    assert Path(Store.open(order.store).find(order.image).path).stat().st_uid == alice.uid


def test_the_same_on_a_shared_filesystem(place: Path) -> None:
    with Registry.start(place / "registry") as registry:
        registry.push_image("once/gluster", "1", IMAGE)
    with (
        wired_hosts(place, count=4, prefix="p") as hosts,
        gluster(place / "gluster", place / "shared", hosts) as shared,
    ):
        first = next(iter(hosts.values()))
        (place / "signs").mkdir(mode=0o755)
        with Registry.start(place / "registry", host=first, address="192.0.2.1") as registry:
            order = Order(
                image=f"{registry.address}/once/gluster:1",
                store=str(shared.mount_point / "store"),
                directory=str(place / "signs"),
                plain_http=(registry.address,),
            )
            with pulling(list(hosts.values()), order) as crowd:
                crowd.go()
                crowd.wait()
                for host in hosts.values():
                    listing = host.run(["ls", f"{order.store}/claims", f"{order.store}/images"]).stdout.decode()
                    assert IMAGE.digest.replace(":", "-") in listing.partition("images:")[2]
                    assert IMAGE.digest.replace(":", "-") not in listing.partition("images:")[0]
                assert {event["message"] for event in crowd.happened("failed") + crowd.happened("crashed")} == set()
                assert len(crowd.happened("done")) == 32
                assert len(crowd.happened("write")) == 1
                assert set(blob_requests(registry, order).values()) == {1}
                assert len({event["host"] for event in crowd.happened("wait")}) == 4


# one dies


@pytest.mark.parametrize(
    ("at", "after"),
    [("claim", 0), ("download", 2 << 20), ("read", 0), ("write", 1 << 20)],
    ids=lambda value: str(value),
)
def test_a_killed_worker_is_followed_and_what_it_finished_is_used(
    four_hosts: list[Host], order: Order, registry: Registry, alice: User, at: str, after: int
) -> None:
    order = changed(order, at=at, after=after, processes=2)
    with pulling(four_hosts, order, user=alice) as crowd:
        crowd.go()
        victim = crowd.victim()
        killed_at = time.monotonic()
        # Downloads end with their process: what is finished now stays so.
        wait_until(lambda: not Path(f"/proc/{victim}").exists() or is_zombie(victim), what="its end")
        finished = {
            path.name.replace("-", ":")
            for path in Path(order.store, "blobs").glob("*/*")
            if not path.name.endswith(".part")
        }
        crowd.wait()
        require_all_have_it(crowd, order.store, missing=1)
        follower = crowd.happened("claim")[1]
        assert follower["pid"] != victim
        # A tenth of the real times; the rest is a busy machine.
        assert follower["at"] - killed_at < claims.STALE_AFTER / 10 + 5
        requests = blob_requests(registry, order)
        if at == "write":
            assert len(finished) == LAYERS
        assert {requests[blob] for blob in finished} <= {1}
        assert max(requests.values()) <= 2


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_dead_worker_is_followed_within_the_stated_time(order: Order, four_hosts: list[Host], alice: User) -> None:
    order = changed(order, at="claim", processes=1, quick=False)
    with pulling(four_hosts[:2], order, user=alice) as crowd:
        crowd.go()
        crowd.victim()
        begun = time.monotonic()
        crowd.wait()
        (_, follower) = crowd.happened("claim")
        assert follower["at"] - begun + 2 >= claims.STALE_AFTER
        assert follower["at"] - begun < claims.STALE_AFTER + 10
        require_all_have_it(crowd, order.store, missing=1)


# one stands still


@pytest.mark.parametrize("at", ["claim", "write"])
def test_a_worker_that_stood_still_finds_the_work_done_and_does_no_harm(
    four_hosts: list[Host], order: Order, alice: User, at: str
) -> None:
    order = changed(order, at=at, signal=signal.SIGSTOP, processes=2)
    with pulling(four_hosts, order, user=alice) as crowd:
        crowd.go()
        victim = crowd.victim()
        try:
            wait_until(lambda: len(crowd.happened("done")) == 7, seconds=60, what=lambda: f"seven; {crowd.events()}")
            before = os.stat(Store.open(order.store).find(order.image).path)
        finally:
            os.kill(victim, signal.SIGCONT)
        crowd.wait()
        require_all_have_it(crowd, order.store)
        assert os.stat(Store.open(order.store).find(order.image).path).st_ino == before.st_ino
        assert os.listdir(f"{order.store}/tmp") == []
        (late,) = [event for event in crowd.happened("done") if event["pid"] == victim]
        assert not late["brought_here"]


# one is told to end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_is_told_to_end_is_followed_at_once(
    four_hosts: list[Host], order: Order, alice: User, number: signal.Signals
) -> None:
    order = changed(order, at="read", signal=number, processes=1, quick=False)
    with pulling(four_hosts[:3], order, user=alice) as crowd:
        crowd.go()
        crowd.victim()
        begun = time.monotonic()
        crowd.wait()
        (_, follower) = crowd.happened("claim")
        assert follower["at"] - begun < 10 < claims.STALE_AFTER
        assert len(crowd.happened("done")) == 2
        assert not crowd.happened("failed")
        assert os.listdir(f"{order.store}/tmp") == []


# all fail


def test_a_broken_image_is_fetched_once_and_everybody_is_told(
    four_hosts: list[Host], order: Order, registry: Registry, alice: User
) -> None:
    content = os.urandom(1 << 20)
    config = json.loads(IMAGE.blobs()[1][0])
    config["rootfs"]["diff_ids"] = [digest_of(b"something else")]
    repository = order.image.partition("/")[2].rpartition(":")[0]
    broken = json.dumps(config).encode()
    manifest = json.loads(IMAGE.blobs()[0])
    manifest["layers"] = [{**manifest["layers"][0], "digest": digest_of(content), "size": len(content)}]
    manifest["config"] = {**manifest["config"], "digest": digest_of(broken), "size": len(broken)}
    for blob in (content, broken):
        registry.push_blob(repository, blob)
    registry.push_manifest(repository, "broken", json.dumps(manifest).encode(), manifest["mediaType"])
    order = changed(order, image=order.image.rpartition(":")[0] + ":broken", processes=4)
    with pulling(four_hosts, order, user=alice) as crowd:
        crowd.go()
        crowd.wait()
        failed = crowd.happened("failed")
        assert len(failed) == 16
        assert {event["slug"] for event in failed} == {"image-broken"}
        assert [event for event in failed if "tried by n" in event["message"]]
        assert max(blob_requests(registry, order).values()) <= 3
    assert os.listdir(f"{order.store}/images") == []
    assert os.listdir(f"{order.store}/tmp") == []


# repair


def test_a_damaged_file_is_found_and_brought_anew(registry: Registry, place: Path, four_hosts: list[Host]) -> None:
    registry.push_image("once/repair", "1", IMAGE)
    site = Site(store=str(place / "store"))
    ref = ImageRef.parse(f"{registry.address}/once/repair:1")
    image = pull(ref, site=site).image
    content = bytearray(Path(image.path).read_bytes())
    content[len(content) // 2] ^= 1
    Path(image.path).chmod(0o644)
    Path(image.path).write_bytes(content)
    environment = {"HPCCTR_SITE": str(place / "site.toml")}
    (place / "site.toml").write_text(f'store = "{site.store}"\n')
    (place / "site.toml").chmod(0o644)
    host, program = four_hosts[0], str(Path(os.sys.executable).with_name("hpcctr"))  # type: ignore[attr-defined]

    def hpcctr(*words: str, check: int = 0) -> subprocess.CompletedProcess[bytes]:
        return host.run([program, *words, str(ref)], env=environment, check=check if check else True)

    said = hpcctr("inspect", "--verify", check=125).stderr.decode()
    assert "error[image-damaged]" in said
    assert f"hint: hpcctr pull --verify {ref}" in said
    assert b"up to date" in hpcctr("pull").stderr
    assert b"up to date" not in hpcctr("pull", "--verify").stderr
    hpcctr("inspect", "--verify")
    assert b"up to date" in hpcctr("pull", "--verify").stderr
