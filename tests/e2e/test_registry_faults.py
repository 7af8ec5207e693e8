"""Registries in trouble: every trouble ends in the image or in a named error, and never in half of it."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcctr.errors import HpcctrError, ImageBroken, RegistryFailed
from hpcctr.image import endpoint, transport
from hpcctr.image import registry as registry_module
from hpcctr.image.pull import PullResult, pull
from hpcctr.image.reference import ImageRef
from hpcctr.image.store import Store
from hpcctr.site import RegistrySettings, Site
from tests.support.faults import (
    Fault,
    FaultyRegistry,
    corrupted,
    dripping,
    endless,
    faulty,
    reset,
    silent,
    status,
    truncated,
    without_ranges,
)
from tests.support.oci import OCI_INDEX, OCI_MANIFEST, Image, descriptor, digest_of, file, tar
from tests.support.polling import wait_until
from tests.support.registry import Registry

LAYERS = tuple(tar(file(f"layer{number}", os.urandom(300_000))) for number in range(3))
IMAGE = Image(layers=LAYERS, compression="gzip")
MANIFEST, (CONFIG, *BLOBS) = IMAGE.blobs()
SIZES = sorted(len(blob) for blob in BLOBS)

MANIFEST_PATH = r"/manifests/"
CONFIG_PATH = f"/blobs/{digest_of(CONFIG)}"
LAYER_PATH = f"/blobs/{digest_of(BLOBS[1])}"
ANY_LAYER = f"/blobs/(?!{digest_of(CONFIG)})"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry.start(tmp_path_factory.mktemp("registry")) as running:
        running.push_image("app", "1", IMAGE)
        yield running


@pytest.fixture
def proxy(registry: Registry) -> Iterator[FaultyRegistry]:
    with faulty(registry) as running:
        yield running


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(store=str(tmp_path / "store"))


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Short waits, and nobody's credentials."""
    monkeypatch.setattr(endpoint, "_BACKOFF", 0.01)
    monkeypatch.setattr(endpoint, "READ_WITHIN", 1.0)
    monkeypatch.setattr(transport, "READ_WITHIN", 1.0)
    monkeypatch.setattr(registry_module, "_PACE", (10_000, 0.5))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)


def pulled(text: str, site: Site) -> PullResult:
    return pull(ImageRef.parse(text), site=site)


def require_nothing_half(site: Site) -> None:
    """No image, no name, no unfinished file; finished blobs stay for the next attempt."""
    top = Path(site.store)
    assert [name for name in ("images", "names", "tmp") if any((top / name).iterdir())] == []
    assert [path for path in (top / "blobs").glob("*/*") if path.name.endswith(".part")] == []
    for path in (top / "blobs").glob("*/*"):
        assert digest_of(path.read_bytes()) == path.name.replace("-", ":")


# troubles that pass


@pytest.mark.parametrize(
    "where", [MANIFEST_PATH, CONFIG_PATH, LAYER_PATH, ANY_LAYER], ids=["manifest", "config", "layer", "layers"]
)
@pytest.mark.parametrize(
    "fault",
    [
        truncated(0),
        truncated(100),
        reset(0),
        reset(100),
        status(500),
        status(502),
        status(503, Retry_After="0"),
        status(429, Retry_After="0"),
        status(504),
    ],
    ids=["empty", "cut", "reset", "reset-late", "500", "502", "503", "429", "504"],
)
def test_a_trouble_that_passes_costs_nothing_but_time(
    proxy: FaultyRegistry, site: Site, where: str, fault: Fault
) -> None:
    proxy.spoil(where, fault, times=2)
    assert pulled(f"{proxy.address}/app:1", site).image.record.digest == IMAGE.digest


@pytest.mark.parametrize("fault", [truncated(200_000), reset(200_000)], ids=["cut", "reset"])
def test_a_broken_download_goes_on_where_it_broke(proxy: FaultyRegistry, site: Site, fault: Fault) -> None:
    proxy.spoil(LAYER_PATH, fault, times=1)
    assert pulled(f"{proxy.address}/app:1", site).image.record.digest == IMAGE.digest
    (first, second) = [asked for path, asked in proxy.asked if LAYER_PATH in path]
    assert first == ""
    begin = int(second.removeprefix("bytes=").removesuffix("-"))
    # What a reset connection had still in its buffers is lost.
    assert 0 < begin <= 200_000


def test_a_registry_without_ranges_gives_all_again(proxy: FaultyRegistry, site: Site) -> None:
    proxy.spoil(LAYER_PATH, truncated(200_000), times=1)
    proxy.spoil(LAYER_PATH, without_ranges)
    assert pulled(f"{proxy.address}/app:1", site).image.record.digest == IMAGE.digest


def test_a_line_that_drips_once_is_left_for_another(proxy: FaultyRegistry, site: Site) -> None:
    ended = threading.Event()
    try:
        proxy.spoil(LAYER_PATH, dripping(ended), times=1)
        assert pulled(f"{proxy.address}/app:1", site).image.record.digest == IMAGE.digest
    finally:
        ended.set()


# troubles that stay


@pytest.mark.parametrize("where", [MANIFEST_PATH, CONFIG_PATH, LAYER_PATH], ids=["manifest", "config", "layer"])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (truncated(10), "broke|ends"),
        (reset(10), "broke|ends"),
        (status(500), "status 500"),
        (status(403), "denies"),
        (status(404), "has no"),
        (status(429, Retry_After="600", RateLimit_Limit="100;w=21600", RateLimit_Remaining="0"), "0 of 100 .*600 s"),
        (corrupted, "digest|promised|cannot be read|announces"),
        (endless, "larger|digest|promises|announces|broke"),
    ],
    ids=["cut", "reset", "500", "403", "404", "429", "corrupted", "endless"],
)
def test_a_trouble_that_stays_is_named_and_publishes_nothing(
    proxy: FaultyRegistry, site: Site, where: str, fault: Fault, says: str
) -> None:
    proxy.spoil(where, fault)
    with pytest.raises(HpcctrError) as caught:
        pulled(f"{proxy.address}/app:1", site)
    assert re.search(says, str(caught.value)), str(caught.value)
    require_nothing_half(site)


@pytest.mark.parametrize("where", [MANIFEST_PATH, CONFIG_PATH, LAYER_PATH], ids=["manifest", "config", "layer"])
@pytest.mark.parametrize("trouble", ["silent", "dripping headers", "dripping body"])
def test_a_registry_that_plays_dead_is_given_up(
    proxy: FaultyRegistry, site: Site, where: str, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "CONNECT_WITHIN", 0.5)
    monkeypatch.setattr(endpoint, "ATTEMPTS", 2)
    monkeypatch.setattr(registry_module, "ATTEMPTS", 2)
    monkeypatch.setattr(endpoint, "_DOCUMENT_WITHIN", 1.0)
    monkeypatch.setattr(endpoint, "_RETRY_AFTER_MAX", 1.0)
    ended = threading.Event()
    faults = {
        "silent": silent(ended),
        "dripping headers": dripping(ended, headers_too=True),
        "dripping body": dripping(ended),
    }
    proxy.spoil(where, faults[trouble])
    begun = time.monotonic()
    try:
        with pytest.raises((RegistryFailed, ImageBroken)):
            pulled(f"{proxy.address}/app:1", site)
    finally:
        ended.set()
    assert time.monotonic() - begun < 20
    require_nothing_half(site)


def test_what_was_finished_before_the_trouble_is_not_fetched_again(proxy: FaultyRegistry, site: Site) -> None:
    proxy.spoil(LAYER_PATH, status(403), times=1)
    with pytest.raises(RegistryFailed):
        pulled(f"{proxy.address}/app:1", site)
    finished = {path.name.replace("-", ":") for path in Path(site.store, "blobs").glob("*/*")}
    assert finished
    before = len(proxy.asked)
    assert pulled(f"{proxy.address}/app:1", site).image.record.digest == IMAGE.digest
    asked_again = {path.rpartition("/")[2] for path, _ in proxy.asked[before:]}
    assert not finished & asked_again
    assert os.listdir(f"{site.store}/blobs") == []


def test_a_pull_that_hangs_on_its_registry_ends_at_once_when_it_is_told_to(proxy: FaultyRegistry, site: Site) -> None:
    ended = threading.Event()
    proxy.spoil(LAYER_PATH, silent(ended))
    code = (
        "import sys\n"
        "from hpcctr.image.pull import pull\n"
        "from hpcctr.image.reference import ImageRef\n"
        "from hpcctr.site import Site\n"
        "pull(ImageRef.parse(sys.argv[1]), site=Site(store=sys.argv[2]))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, f"{proxy.address}/app:1", site.store],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        wait_until(lambda: [path for path, _ in proxy.asked if LAYER_PATH in path], what="the download")
        begun = time.monotonic()
        child.terminate()
        assert child.wait(20) == 128 + signal.SIGTERM
        assert time.monotonic() - begun < 10
        require_nothing_half(site)
        beats = [
            json.loads(path.read_text()) for path in Path(site.store, "claims").glob("*/*") if len(path.name) == 16
        ]
        assert [beat["released"] for beat in beats] == [True]
    finally:
        ended.set()
        child.kill()
        child.wait()


# mirrors


def mirrored(site: Site, origin: str, *mirrors: str, **settings: RegistrySettings) -> Site:
    return Site(store=site.store, registry={origin: RegistrySettings(mirrors=mirrors), **settings})


@pytest.mark.parametrize("trouble", ["none", "gone", "500", "corrupted", "cut"])
def test_a_mirror_in_trouble_costs_nobody_the_image(
    tmp_path: Path, registry: Registry, proxy: FaultyRegistry, site: Site, trouble: str
) -> None:
    with Registry.start(tmp_path / "mirror") as second:
        second.push_image("app", "1", IMAGE)
        with faulty(second) as mirror:
            faults = {"500": status(500), "corrupted": corrupted, "cut": truncated(50_000)}
            if trouble in faults:
                mirror.spoil(ANY_LAYER, faults[trouble])
            address = "127.0.0.1:1" if trouble == "gone" else mirror.address
            result = pulled(f"{proxy.address}/app:1", mirrored(site, proxy.address, address))
            # It has the name that was asked for, wherever it came from.
            assert result.name == f"{proxy.address}/app:1"
            assert result.image.record.digest == IMAGE.digest
            if trouble == "none":
                assert proxy.asked == []
            else:
                assert proxy.asked


# who may


@pytest.fixture
def private(tmp_path: Path) -> Iterator[Registry]:
    with Registry.start(tmp_path / "private", user="alice", password="secret") as running:
        running.push_image("app", "1", IMAGE)
        yield running


@pytest.mark.parametrize("way", ["auths", "DOCKER_CONFIG", "credHelpers", "credsStore", "podman"])
def test_a_login_is_found_in_every_place_docker_and_podman_keep_it(
    tmp_path: Path, site: Site, private: Registry, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    with pytest.raises(RegistryFailed, match="wants credentials"):
        pulled(f"{private.address}/app:1", site)
    words: dict[str, object] = json.loads(private.docker_config())
    path = tmp_path / ".docker/config.json"
    if way == "DOCKER_CONFIG":
        path = tmp_path / "elsewhere/config.json"
        monkeypatch.setenv("DOCKER_CONFIG", str(path.parent))
    elif way == "podman":
        path = tmp_path / "run/containers/auth.json"
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    elif way != "auths":
        helper = tmp_path / "bin/docker-credential-test"
        helper.parent.mkdir()
        helper.write_text(
            "#!/bin/sh\n"
            f'read server; [ "$1 $server" = "get {private.address}" ] || exit 1\n'
            'echo \'{"ServerURL": "x", "Username": "alice", "Secret": "secret"}\'\n'
        )
        helper.chmod(0o755)
        monkeypatch.setenv("PATH", f"{helper.parent}:{os.environ['PATH']}")
        words = {"credsStore": "test"} if way == "credsStore" else {"credHelpers": {private.address: "test"}}
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(words))
    assert pulled(f"{private.address}/app:1", site).image.record.digest == IMAGE.digest


@pytest.mark.parametrize("login", ["", "alice:secret", "alice:wrong"])
def test_a_registry_with_a_token_server_gives_to_whom_it_gives_a_token(
    tmp_path: Path, site: Site, proxy: FaultyRegistry, login: str
) -> None:
    def token(request: object, response: object) -> None:
        sent = request.headers.get("Authorization", "")  # type: ignore[attr-defined]
        wanted = f"Basic {base64.b64encode(b'alice:secret').decode()}"
        body = b'{"token": "good"}' if sent == wanted else b"{}"
        code = 200 if sent == wanted else 401
        fault_answer(request, code, {}, body)

    def guard(request: object, response: object) -> None:
        if request.headers.get("Authorization") == "Bearer good":  # type: ignore[attr-defined]
            request.answer(response)  # type: ignore[attr-defined]
            return
        challenge = f'Bearer realm="http://{proxy.address}/token",service="s",scope="repository:app:pull"'
        fault_answer(request, 401, {"Www-Authenticate": challenge}, b"")

    proxy.spoil("^/token", token)
    proxy.spoil("/v2/", guard)
    if login:
        word = base64.b64encode(login.encode()).decode()
        (tmp_path / ".docker").mkdir()
        (tmp_path / ".docker/config.json").write_text(json.dumps({"auths": {proxy.address: {"auth": word}}}))
    if login == "alice:secret":
        assert pulled(f"{proxy.address}/app:1", site).image.record.digest == IMAGE.digest
        # One token serves the whole pull.
        assert len([path for path, _ in proxy.asked if path.startswith("/token")]) == 1
    else:
        with pytest.raises(RegistryFailed, match="does not take" if login else "wants credentials"):
            pulled(f"{proxy.address}/app:1", site)


def fault_answer(request: object, code: int, headers: dict[str, str], body: bytes) -> None:
    from tests.support.faults import Response

    answer = Response(status=code, headers={"Content-Length": str(len(body)), **headers}, body=body)
    request.answer(answer)  # type: ignore[attr-defined]


def test_a_registry_with_a_private_ca_is_trusted_where_the_site_says_so(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=hpcctr"]
    command += [
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-keyout",
        str(tmp_path / "key"),
        "-out",
        str(tmp_path / "ca"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    # For a loopback address plain HTTP would be tried.
    monkeypatch.setattr(endpoint, "is_loopback", lambda _: False)
    with Registry.start(tmp_path / "tls", certificate=tmp_path / "ca", key=tmp_path / "key") as secure:
        subprocess.run(
            ["skopeo", "copy", "--insecure-policy", "--dest-tls-verify=false", f"oci:{layout(tmp_path)}"]
            + [f"docker://{secure.address}/app:1"],
            check=True,
            capture_output=True,
        )
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca"))
        with pytest.raises(RegistryFailed, match="TLS") as caught:
            pulled(f"{secure.address}/app:1", site)
        assert f'[registry."{secure.address}"] ca-file' in caught.value.hint
        trusting = Site(store=site.store, registry={secure.address: RegistrySettings(ca_file=str(tmp_path / "ca"))})
        assert pulled(f"{secure.address}/app:1", trusting).image.record.config.cmd == ("/bin/sh",)


def layout(tmp_path: Path) -> Path:
    from tests.support.oci import busybox, write_layout

    return write_layout(tmp_path / "layout", busybox())


# shapes


def test_an_index_in_an_index_is_followed_in_a_registry(registry: Registry, site: Site) -> None:
    registry.push_image("nested", "inner", IMAGE)
    inner = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": [descriptor(MANIFEST, OCI_MANIFEST, platform=IMAGE.platform)],
        }
    ).encode()
    registry.push_manifest("nested", digest_of(inner), inner, OCI_INDEX)
    outer = json.dumps(
        {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [descriptor(inner, OCI_INDEX)]}
    ).encode()
    registry.push_manifest("nested", "outer", outer, OCI_INDEX)
    assert pulled(f"{registry.address}/nested:outer", site).image.record.digest == IMAGE.digest
    assert pulled(f"{registry.address}/nested@{digest_of(outer)}", site).image.record.digest == IMAGE.digest


def test_a_stored_image_costs_its_manifest_and_no_blob(proxy: FaultyRegistry, site: Site) -> None:
    pulled(f"{proxy.address}/app:1", site)
    before = len(proxy.asked)
    assert pulled(f"{proxy.address}/app:1", site).was_stored
    assert [path for path, _ in proxy.asked[before:]] == ["/v2/app/manifests/1"]


def test_memory_stays_bounded_whatever_the_size_of_an_image(tmp_path: Path, registry: Registry, site: Site) -> None:
    large = Image(layers=tuple(tar(file(f"{n}", os.urandom(64 << 20))) for n in range(4)), compression="none")
    registry.push_image("large", "1", large)
    code = (
        "import sys\n"
        "from hpcctr.image.pull import pull\n"
        "from hpcctr.image.reference import ImageRef\n"
        "from hpcctr.site import Site\n"
        "pull(ImageRef.parse(sys.argv[1]), site=Site(store=sys.argv[2]))\n"
        # Of this program alone: ru_maxrss (getrusage(2)) remembers what the process was before execve.
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, f"{registry.address}/large:1", site.store],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert int(run.stdout) / 1024 < 200, f"{int(run.stdout) / 1024:.0f} MiB"
    assert len(Store.open(site.store).digests()) == 1
