"""Speaking to registries: a server that answers as those of the world do. docker-registry itself is in tests/e2e."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hpcctr.errors import ImageBroken, NotAnImage, RegistryFailed, StoreUnusable
from hpcctr.image import registry as registry_module
from hpcctr.image.platform import of_this_node
from hpcctr.image.reference import ImageRef
from hpcctr.image.registry import RegistrySource, is_loopback
from hpcctr.image.source import LayerBlob
from hpcctr.image.verification import sha256_of
from hpcctr.site import RegistrySettings
from tests.support.oci import OCI_MANIFEST, Image, digest_of, file, tar

Answer = tuple[int, dict[str, str], bytes]

IMAGE = Image(layers=(tar(file("a", b"content" * 1000)),))
MANIFEST, (CONFIG, LAYER) = IMAGE.blobs()


@dataclass
class Server:
    """Answers by path; a function may look at the request. Remembers what it was asked."""

    port: int = 0
    answers: dict[str, Answer | Callable[[BaseHTTPRequestHandler], Answer]] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def serve_image(self, repository: str = "app") -> None:
        self.answers[f"/v2/{repository}/manifests/1"] = (200, {"Content-Type": OCI_MANIFEST}, MANIFEST)
        for blob in (CONFIG, LAYER):
            self.answers[f"/v2/{repository}/blobs/{digest_of(blob)}"] = (200, {}, blob)

    def source(self, repository: str = "app") -> RegistrySource:
        return RegistrySource(ImageRef.parse(f"{self.address}/{repository}:1"), RegistrySettings(plain_http=True))


@pytest.fixture
def server() -> Iterator[Server]:
    serving = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            serving.asked.append((self.path, dict(self.headers)))
            answer = serving.answers.get(
                path, (404, {}, b'{"errors": [{"code": "NAME_UNKNOWN", "message": "unknown"}]}')
            )
            status, headers, body = answer if isinstance(answer, tuple) else answer(self)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            if int(headers.get("Content-Length", len(body))) != len(body):
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Http(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            """Clients that hang up are part of the tests."""

    with Http(("127.0.0.1", 0), Handler) as http:
        serving.port = http.server_port
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield serving
        http.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)


def log_in(tmp_path: Path, registry: str, user: str = "u", password: str = "p") -> None:
    word = base64.b64encode(f"{user}:{password}".encode()).decode()
    (tmp_path / ".docker").mkdir(exist_ok=True)
    (tmp_path / ".docker/config.json").write_text(json.dumps({"auths": {registry: {"auth": word}}}))


def download(source: RegistrySource, path: Path, blob: bytes = LAYER, *, said: bytes | None = None) -> bytes:
    layer = LayerBlob(digest=digest_of(said or blob), size=len(said or blob), diff_id="")
    source.download(layer, str(path), stop=threading.Event(), progress=lambda _: None)
    return path.read_bytes()


def test_an_image_is_found_and_its_layer_downloaded(server: Server, tmp_path: Path) -> None:
    server.serve_image()
    with server.source() as source:
        image = source.find(of_this_node())
        assert image.digest == sha256_of(MANIFEST)
        assert download(source, tmp_path / "layer") == LAYER
    assert "application/vnd.oci.image.index.v1+json" in server.asked[0][1]["Accept"]


def test_an_anonymous_token_is_fetched_and_used(server: Server, tmp_path: Path) -> None:
    server.serve_image()
    manifest = server.answers["/v2/app/manifests/1"]
    challenge = f'Bearer realm="http://{server.address}/token",service="here",scope="repository:app:pull"'

    def guarded(request: BaseHTTPRequestHandler) -> Answer:
        if request.headers.get("Authorization") != "Bearer secret-token":
            return 401, {"Www-Authenticate": challenge}, b"{}"
        assert isinstance(manifest, tuple)
        return manifest

    server.answers["/v2/app/manifests/1"] = guarded
    server.answers["/token"] = (200, {}, b'{"token": "secret-token"}')
    with server.source() as source:
        assert source.find(of_this_node()).digest == sha256_of(MANIFEST)
    (asked,) = [path for path, _ in server.asked if path.startswith("/token")]
    assert "scope=repository%3Aapp%3Apull" in asked
    assert "service=here" in asked


def test_credentials_buy_a_token(server: Server, tmp_path: Path) -> None:
    server.serve_image()
    manifest = server.answers["/v2/app/manifests/1"]
    assert isinstance(manifest, tuple)
    challenge = f'Bearer realm="http://{server.address}/token",service="here",scope="repository:app:pull"'
    server.answers["/v2/app/manifests/1"] = lambda request: (
        manifest
        if request.headers.get("Authorization") == "Bearer t"
        else (401, {"Www-Authenticate": challenge}, b"{}")
    )
    word = base64.b64encode(b"u:p").decode()
    server.answers["/token"] = lambda request: (
        (200, {}, b'{"access_token": "t"}')
        if request.headers.get("Authorization") == f"Basic {word}"
        else (401, {}, b"{}")
    )
    with pytest.raises(RegistryFailed, match="wants credentials"), server.source() as source:
        source.find(of_this_node())
    log_in(tmp_path, server.address)
    with server.source() as source:
        assert source.find(of_this_node()).digest == sha256_of(MANIFEST)


def test_a_netrc_file_is_not_asked(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # For loopback the environment is not asked for anything.
    monkeypatch.setattr(registry_module, "is_loopback", lambda _: False)
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login u password p\n")
    server.serve_image()
    with server.source() as source:
        source.find(of_this_node())
    assert not [headers for _, headers in server.asked if "Authorization" in headers]


@pytest.mark.parametrize(
    ("status", "body", "says", "hint"),
    [
        (403, b'{"errors": [{"code": "DENIED", "message": "no access"}]}', r"denies .*\(no access\)", "access"),
        (404, b"<html>", "has no 127", "typing error"),
        (429, b'{"errors": [{"message": "toomanyrequests"}]}', r"limits how often .*toomanyrequests", "log in"),
        (500, b"", "status 500", "later"),
        (503, b'{"errors": "odd"}', "status 503", "later"),
    ],
)
def test_every_refusal_has_its_words(server: Server, status: int, body: bytes, says: str, hint: str) -> None:
    server.answers["/v2/app/manifests/1"] = (status, {}, body)
    with pytest.raises(RegistryFailed, match=says) as caught, server.source() as source:
        source.find(of_this_node())
    assert hint in caught.value.hint


def test_a_short_wait_that_a_registry_asks_for_is_waited(server: Server) -> None:
    server.serve_image()
    manifest = server.answers["/v2/app/manifests/1"]
    assert isinstance(manifest, tuple)
    limited = iter([(429, {"Retry-After": "0"}, b"{}")])
    server.answers["/v2/app/manifests/1"] = lambda _: next(limited, manifest)
    with server.source() as source:
        assert source.find(of_this_node()).digest == sha256_of(MANIFEST)


def test_a_manifest_that_is_not_the_announced_or_asked_one_is_refused(server: Server) -> None:
    server.answers["/v2/app/manifests/1"] = (200, {"Docker-Content-Digest": "sha256:" + "0" * 64}, MANIFEST)
    with pytest.raises(ImageBroken, match="announces"), server.source() as source:
        source.find(of_this_node())
    wanted = "sha256:" + "1" * 64
    server.answers[f"/v2/app/manifests/{wanted}"] = (200, {}, MANIFEST)
    ref = ImageRef.parse(f"{server.address}/app@{wanted}")
    with pytest.raises(ImageBroken, match="answers"), RegistrySource(ref, RegistrySettings(plain_http=True)) as source:
        source.find(of_this_node())


def test_a_page_that_is_no_manifest_is_refused(server: Server) -> None:
    server.answers["/v2/app/manifests/1"] = (200, {}, b"<html>log in here</html>")
    with pytest.raises(NotAnImage), server.source() as source:
        source.find(of_this_node())


def test_a_download_that_breaks_is_taken_up_where_it_broke(server: Server, tmp_path: Path) -> None:
    path = f"/v2/app/blobs/{digest_of(LAYER)}"
    half = len(LAYER) // 2
    broken = iter([True])

    def serve(request: BaseHTTPRequestHandler) -> Answer:
        if next(broken, False):
            return 200, {"Content-Length": str(len(LAYER))}, LAYER[:half]
        begin = int(request.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        return 206, {"Content-Range": f"bytes {begin}-{len(LAYER) - 1}/{len(LAYER)}"}, LAYER[begin:]

    server.answers[path] = serve
    with server.source() as source:
        assert download(source, tmp_path / "layer") == LAYER
    assert server.asked[-1][1]["Range"] == f"bytes={half}-"


def test_a_registry_that_knows_no_ranges_is_asked_for_all_again(server: Server, tmp_path: Path) -> None:
    broken = iter([True])
    server.answers[f"/v2/app/blobs/{digest_of(LAYER)}"] = lambda _: (
        (200, {"Content-Length": str(len(LAYER))}, LAYER[:20]) if next(broken, False) else (200, {}, LAYER)
    )
    with server.source() as source:
        assert download(source, tmp_path / "layer") == LAYER


def test_a_download_that_breaks_again_and_again_is_given_up(server: Server, tmp_path: Path) -> None:
    server.answers[f"/v2/app/blobs/{digest_of(LAYER)}"] = lambda request: (
        206 if "Range" in request.headers else 200,
        {"Content-Length": str(len(LAYER))},
        b"",
    )
    with pytest.raises((RegistryFailed, ImageBroken)), server.source() as source:
        download(source, tmp_path / "layer")


def test_a_blob_of_another_content_or_size_is_refused(server: Server, tmp_path: Path) -> None:
    for number, wrong in enumerate((LAYER[:-1] + b"X", LAYER + b"more")):
        server.answers[f"/v2/app/blobs/{digest_of(LAYER)}"] = (200, {}, wrong)
        with pytest.raises(ImageBroken), server.source() as source:
            download(source, tmp_path / str(number), wrong, said=LAYER)


def test_a_redirect_is_followed_without_the_token(server: Server, tmp_path: Path) -> None:
    log_in(tmp_path, server.address)
    challenge = {"Www-Authenticate": 'Basic realm="here"'}
    server.answers[f"/v2/app/blobs/{digest_of(LAYER)}"] = lambda request: (
        (307, {"Location": f"http://localhost:{server.port}/storage"}, b"")
        if "Authorization" in request.headers
        else (401, challenge, b"")
    )
    server.answers["/storage"] = lambda request: (
        (200, {}, LAYER) if "Authorization" not in request.headers else (400, {}, b"")
    )
    with server.source() as source:
        assert download(source, tmp_path / "layer") == LAYER


def test_a_download_ends_when_it_is_told_to(server: Server, tmp_path: Path) -> None:
    server.serve_image()
    stop = threading.Event()
    stop.set()
    layer = LayerBlob(digest=digest_of(LAYER), size=len(LAYER), diff_id="")
    with server.source() as source:
        source.download(layer, str(tmp_path / "layer"), stop=stop, progress=lambda _: None)
    assert (tmp_path / "layer").stat().st_size < len(LAYER)


def test_a_place_that_cannot_be_written_is_named(server: Server, tmp_path: Path) -> None:
    server.serve_image()
    with pytest.raises(StoreUnusable, match="no such file"), server.source() as source:
        download(source, tmp_path / "none/layer")


def test_a_registry_that_does_not_answer_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    def late(_: BaseHTTPRequestHandler) -> Answer:
        answered.wait(20)
        return 200, {}, b""

    server.answers["/v2/app/manifests/1"] = late
    monkeypatch.setattr(registry_module, "_TIMEOUT", (0.5, 0.5))
    try:
        with pytest.raises(RegistryFailed, match="does not answer"), server.source() as source:
            source.find(of_this_node())
    finally:
        answered.set()


def test_plain_http_is_for_loopback_or_by_permission_only(server: Server) -> None:
    server.serve_image()
    ref = ImageRef.parse(f"{server.address}/app:1")
    with RegistrySource(ref, RegistrySettings()) as source:
        assert source.find(of_this_node()).digest == sha256_of(MANIFEST)
    for name in ("localhost", "127.0.0.1", "127.5.5.5:80", "[::1]:5000", "localhost:5000"):
        assert is_loopback(name)
    for name in ("localhost.example.org", "10.0.0.1:5000", "registry:5000", "[fe80::1]", "docker.io"):
        assert not is_loopback(name)


def test_a_registry_elsewhere_is_never_spoken_to_in_plain_text(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "is_loopback", lambda _: False)
    server.serve_image()
    ref = ImageRef.parse(f"{server.address}/app:1")
    with pytest.raises(RegistryFailed, match="TLS") as caught, RegistrySource(ref, RegistrySettings()) as source:
        source.find(of_this_node())
    assert f'[registry."{server.address}"] plain-http = true' in caught.value.hint
    assert server.asked == []
