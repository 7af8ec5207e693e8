"""A web server for tests that answers as it is told, also wrongly: registries, token servers, storage they lead to.

with answering() as server:
    server.serve_image(IMAGE)
    server.answers["/v2/app/manifests/1"] = (429, {"Retry-After": "1"}, b"")
    f"{server.address}/app:1"
"""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.support.oci import OCI_MANIFEST, Image, digest_of

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Server:
    """Answers by path, without its query; a function may look at the request. Remembers what it was asked."""

    port: int = 0
    answers: dict[str, Answer | Callable[[BaseHTTPRequestHandler], Answer]] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def serve_image(self, image: Image, repository: str = "app", tag: str = "1") -> str:
        """Have an image, by tag and by digest, which is returned."""
        manifest, blobs = image.blobs()
        for name in (tag, digest_of(manifest)):
            self.answers[f"/v2/{repository}/manifests/{name}"] = (200, {"Content-Type": OCI_MANIFEST}, manifest)
        for blob in blobs:
            self.answers[f"/v2/{repository}/blobs/{digest_of(blob)}"] = (200, {}, blob)
        return digest_of(manifest)

    def asked_for(self, part: str) -> list[dict[str, str]]:
        """The headers of every request for a path with that part."""
        return [headers for path, headers in self.asked if part in path]


@contextlib.contextmanager
def answering(*, certificate: Path | None = None, key: Path | None = None) -> Iterator[Server]:
    """A server on a loopback port; with a certificate, over TLS."""
    serving = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            serving.asked.append((self.path, dict(self.headers)))
            answer = serving.answers.get(
                self.path.partition("?")[0], (404, {}, b'{"errors": [{"code": "NAME_UNKNOWN", "message": "unknown"}]}')
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
        # A handler that waits for the test must not keep the test from ending.
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: object, client_address: object) -> None:
            """Clients that hang up are part of the tests."""

    with Http(("127.0.0.1", 0), Handler) as http:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, key)
            http.socket = context.wrap_socket(http.socket, server_side=True)
        serving.port = http.server_port
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield serving
        http.shutdown()
        thread.join()
