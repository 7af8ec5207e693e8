"""One host: logins, patience, deadlines. What a registry's answers mean in words is in test_refusal.py."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from hpcctr.errors import RegistryFailed
from hpcctr.image import endpoint as endpoint_module
from hpcctr.image import transport
from hpcctr.image.endpoint import Endpoint
from hpcctr.site import RegistrySettings
from tests.support.answers import Answer, Server, answering

BODY = b"what was asked for"


def ask(server: Server, path: str = "manifests/1") -> bytes:
    """The document at a path of the repository app."""
    endpoint = Endpoint(server.address, "app", RegistrySettings())
    try:
        return endpoint.document(f"{server.address}/v2/app/{path}", {}, "app", 1000)[0]
    finally:
        endpoint.close()


def log_in(tmp_path: Path, registry: str, user: str = "u", password: str = "p") -> None:
    word = base64.b64encode(f"{user}:{password}".encode()).decode()
    (tmp_path / ".docker").mkdir(exist_ok=True)
    (tmp_path / ".docker/config.json").write_text(json.dumps({"auths": {registry: {"auth": word}}}))


def guard(server: Server, token: str, **challenge: str) -> None:
    """Let the manifest be for who has a token of the server's own /token."""
    words = {"realm": f"http://{server.address}/token", "service": "here", "scope": "repository:app:pull", **challenge}
    said = "Bearer " + ",".join(f'{name}="{word}"' for name, word in words.items())
    server.answers["/v2/app/manifests/1"] = lambda request: (
        (200, {}, BODY)
        if request.headers.get("Authorization") == f"Bearer {token}"
        else (401, {"Www-Authenticate": said}, b"{}")
    )


# logins


def test_an_anonymous_token_is_fetched_and_used(server: Server) -> None:
    guard(server, "secret-token")
    server.answers["/token"] = (200, {}, b'{"token": "secret-token"}')
    assert ask(server) == BODY
    (asked,) = [path for path, _ in server.asked if path.startswith("/token")]
    assert "scope=repository%3Aapp%3Apull" in asked
    assert "service=here" in asked


def test_credentials_buy_a_token(server: Server, tmp_path: Path) -> None:
    guard(server, "t")
    word = base64.b64encode(b"u:p").decode()
    server.answers["/token"] = lambda request: (
        (200, {}, b'{"access_token": "t"}')
        if request.headers.get("Authorization") == f"Basic {word}"
        else (401, {}, b"{}")
    )
    with pytest.raises(RegistryFailed, match="wants credentials"):
        ask(server)
    log_in(tmp_path, server.address)
    assert ask(server) == BODY
    log_in(tmp_path, server.address, password="wrong")
    with pytest.raises(RegistryFailed, match="does not take the credentials"):
        ask(server)


def test_a_token_that_has_expired_is_fetched_anew(server: Server) -> None:
    tokens = iter(["one", "two"])
    valid: list[str] = []

    def token(_: BaseHTTPRequestHandler) -> Answer:
        valid.append(next(tokens))
        return 200, {}, json.dumps({"token": valid[-1]}).encode()

    challenge = {"Www-Authenticate": f'Bearer realm="http://{server.address}/token"'}
    server.answers["/token"] = token
    server.answers["/v2/app/manifests/1"] = lambda request: (
        (200, {}, BODY)
        if valid and request.headers.get("Authorization") == f"Bearer {valid[-1]}"
        else (401, challenge, b"")
    )
    endpoint = Endpoint(server.address, "app", RegistrySettings())
    url = endpoint.manifest_url("1")
    assert endpoint.document(url, {}, "app", 100)[0] == BODY
    valid.append("expired")
    assert endpoint.document(url, {}, "app", 100)[0] == BODY
    endpoint.close()
    assert valid == ["one", "expired", "two"]


def test_a_token_server_that_talks_nonsense_or_floods_is_named(server: Server) -> None:
    guard(server, "t")
    server.answers["/token"] = (200, {}, b"[]")
    with pytest.raises(RegistryFailed, match="logging in failed"):
        ask(server)
    server.answers["/token"] = (200, {}, b"x" * (2 << 20))
    with pytest.raises(RegistryFailed, match="more than .* bytes"):
        ask(server)


def test_a_redirect_is_followed_without_the_login(server: Server, tmp_path: Path) -> None:
    log_in(tmp_path, server.address)
    server.answers["/v2/app/manifests/1"] = lambda request: (
        (307, {"Location": f"http://localhost:{server.port}/storage"}, b"")
        if "Authorization" in request.headers
        else (401, {"Www-Authenticate": 'Basic realm="here"'}, b"")
    )
    server.answers["/storage"] = lambda request: (
        (200, {}, BODY) if "Authorization" not in request.headers else (400, {}, b"")
    )
    assert ask(server) == BODY


def test_a_netrc_file_is_not_asked(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # For loopback the environment is not asked for anything.
    monkeypatch.setattr(endpoint_module, "is_loopback", lambda _: False)
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login u password p\n")
    server.answers["/v2/app/manifests/1"] = (200, {}, BODY)
    endpoint = Endpoint(server.address, "app", RegistrySettings(plain_http=True))
    assert endpoint.document(endpoint.manifest_url("1"), {}, "app", 100)[0] == BODY
    endpoint.close()
    assert not [headers for _, headers in server.asked if "Authorization" in headers]


# patience


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_trouble_that_passes_is_waited_for(server: Server, status: int) -> None:
    answers = iter([(status, {}, b""), (status, {"Retry-After": "0"}, b"")])
    server.answers["/v2/app/manifests/1"] = lambda _: next(answers, (200, {}, BODY))
    assert ask(server) == BODY
    assert len(server.asked) == 3


@pytest.mark.parametrize("status", [400, 403, 404, 410])
def test_a_refusal_is_not_asked_again(server: Server, status: int) -> None:
    server.answers["/v2/app/manifests/1"] = (status, {}, b"")
    with pytest.raises(RegistryFailed):
        ask(server)
    assert len(server.asked) == 1


def test_a_wait_that_a_registry_asks_for_is_waited(server: Server) -> None:
    answers = iter([(429, {"Retry-After": "1"}, b"")])
    server.answers["/v2/app/manifests/1"] = lambda _: next(answers, (200, {}, BODY))
    begun = time.monotonic()
    assert ask(server) == BODY
    assert 1 <= time.monotonic() - begun < 5


def test_a_wait_nobody_sits_through_is_told_at_once_with_what_remains(server: Server) -> None:
    headers = {"Retry-After": "3600", "RateLimit-Limit": "100;w=21600", "RateLimit-Remaining": "0;w=21600"}
    server.answers["/v2/app/manifests/1"] = (429, headers, b'{"errors": [{"message": "toomanyrequests"}]}')
    with pytest.raises(RegistryFailed, match=r"0 of 100 requests remain in 6 h, it asks to wait 3600 s") as caught:
        ask(server)
    assert "docker login" in caught.value.hint
    assert "mirrors" in caught.value.hint
    assert len(server.asked) == 1


def test_a_trouble_that_stays_is_told_after_some_attempts(server: Server) -> None:
    server.answers["/v2/app/manifests/1"] = (500, {}, b"")
    with pytest.raises(RegistryFailed, match="status 500"):
        ask(server)
    assert 2 <= len(server.asked) <= 6


def test_a_connection_that_is_cut_is_tried_again(server: Server) -> None:
    cut = iter([True, True])

    def serve(request: BaseHTTPRequestHandler) -> Answer:
        if next(cut, False):
            request.connection.shutdown(socket.SHUT_RDWR)
        return 200, {}, BODY

    server.answers["/v2/app/manifests/1"] = serve
    assert ask(server) == BODY


# deadlines


@pytest.fixture
def full_host() -> Iterator[str]:
    """An address where connections are neither taken nor refused: its queue of them is full."""
    with socket.socket() as listener, socket.socket() as filler:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        filler.connect(listener.getsockname())
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_host_that_cannot_be_reached_is_given_up_soon_with_a_hint(
    full_host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert transport.CONNECT_WITHIN == 5
    monkeypatch.setattr(endpoint_module, "CONNECT_WITHIN", 0.5)
    endpoint = Endpoint(full_host, "app", RegistrySettings())
    begun = time.monotonic()
    with pytest.raises(RegistryFailed, match="does not answer: no connection") as caught:
        endpoint.document(endpoint.manifest_url("1"), {}, "app", 100)
    endpoint.close()
    assert time.monotonic() - begun < 4
    assert "login node" in caught.value.hint


@pytest.mark.parametrize("drips", [False, True])
def test_a_registry_that_does_not_answer_is_named(server: Server, monkeypatch: pytest.MonkeyPatch, drips: bool) -> None:
    ended = threading.Event()

    def late(request: BaseHTTPRequestHandler) -> Answer:
        while not ended.wait(0.1):
            if drips:
                request.wfile.write(b"H")
        return 200, {}, b""

    server.answers["/v2/app/manifests/1"] = late
    monkeypatch.setattr(transport, "READ_WITHIN", 0.5)
    monkeypatch.setattr(endpoint_module, "READ_WITHIN", 0.5)
    monkeypatch.setattr(endpoint_module, "CONNECT_WITHIN", 0.5)
    try:
        with pytest.raises(RegistryFailed, match="does not answer"):
            ask(server)
    finally:
        ended.set()


def test_a_document_is_read_no_further_than_its_limit(server: Server) -> None:
    server.answers["/v2/app/manifests/1"] = (200, {}, b"x" * 100_000)
    assert len(ask(server)) == 1001


# plain HTTP


def test_plain_http_is_for_loopback_or_by_permission_only(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers["/v2/app/manifests/1"] = (200, {}, BODY)
    assert ask(server) == BODY
    before = len(server.asked)
    monkeypatch.setattr(endpoint_module, "is_loopback", lambda _: False)
    with pytest.raises(RegistryFailed, match="TLS") as caught:
        ask(server)
    assert f'[registry."{server.address}"] plain-http = true' in caught.value.hint
    assert len(server.asked) == before


def test_a_registry_in_https_cannot_lead_to_plain_http(
    tmp_path: Path, server: Server, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answers["/storage"] = server.answers["/token"] = (200, {}, b'{"token": "x"}')
    monkeypatch.setattr(endpoint_module, "is_loopback", lambda _: False)
    log_in(tmp_path, "127.0.0.1")
    with answering(certificate=certificate[0], key=certificate[1]) as secure:
        settings = RegistrySettings(ca_file=str(certificate[0]))
        for answer in (
            (307, {"Location": f"http://{server.address}/storage"}, b""),
            (401, {"Www-Authenticate": f'Bearer realm="http://{server.address}/token"'}, b""),
        ):
            secure.answers["/v2/app/manifests/1"] = answer
            endpoint = Endpoint(secure.address, "app", settings)
            with pytest.raises(RegistryFailed, match="not HTTPS"):
                endpoint.document(endpoint.manifest_url("1"), {}, "app", 100)
            endpoint.close()
    assert server.asked == []
