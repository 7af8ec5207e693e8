"""A registry with troubles: a server in front of a real one that passes requests on and spoils some of the answers.

with faulty(registry) as proxy:
    proxy.spoil("/blobs/", truncated(1000), times=2)
    f"{proxy.address}/app:1"
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.support.registry import Registry


@dataclass
class Response:
    """What the registry answered."""

    status: int
    headers: dict[str, str]
    body: bytes


#: Answers in the place of the proxy.
Fault = Callable[["Proxied", Response], None]


class Proxied(BaseHTTPRequestHandler):
    """One request on its way."""

    protocol_version = "HTTP/1.1"

    def answer(self, response: Response, *, body: bytes | None = None) -> None:
        """Send a response, perhaps with another body than its headers promise."""
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(response.body if body is None else body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def truncated(length: int) -> Fault:
    """The connection is closed in good order after so many bytes of the body."""

    def spoil(request: Proxied, response: Response) -> None:
        request.answer(response, body=response.body[:length])
        request.close_connection = True

    return spoil


def reset(length: int) -> Fault:
    """The connection is reset (RST) after so many bytes of the body."""

    def spoil(request: Proxied, response: Response) -> None:
        if length:
            request.answer(response, body=response.body[:length])
            request.wfile.flush()
        request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.connection.close()
        request.close_connection = True

    return spoil


def status(code: int, **headers: str) -> Fault:
    """Another answer; headers with ``_`` for ``-``."""

    def spoil(request: Proxied, response: Response) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request.answer(Response(status=code, headers={"Content-Length": "0", **named}, body=b""))

    return spoil


def corrupted(request: Proxied, response: Response) -> None:
    """One bit is another one."""
    content = bytearray(response.body)
    content[len(content) // 2] ^= 1
    request.answer(response, body=bytes(content))


def without_ranges(request: Proxied, response: Response) -> None:
    """As of a server that never heard of Range; the body is whole anyway."""
    response.headers.pop("Content-Range", None)
    request.answer(response)


def endless(request: Proxied, response: Response) -> None:
    """More than was promised, without end."""
    response.headers.pop("Content-Length", None)
    request.answer(Response(status=response.status, headers={**response.headers, "Connection": "close"}, body=b""))
    with contextlib.suppress(OSError):
        while True:
            request.wfile.write(b"x" * 65536)


def dripping(ended: threading.Event, *, headers_too: bool = False) -> Fault:
    """A byte now and then, until ``ended``."""

    def spoil(request: Proxied, response: Response) -> None:
        with contextlib.suppress(OSError):
            if not headers_too:
                request.answer(response, body=b"")
            while not ended.wait(0.05):
                request.wfile.write(b"x")
        request.close_connection = True

    return spoil


def silent(ended: threading.Event) -> Fault:
    """Nothing at all, until ``ended``."""

    def spoil(request: Proxied, response: Response) -> None:
        ended.wait(60)
        request.close_connection = True

    return spoil


@dataclass
class FaultyRegistry:
    """The proxy. Counts what it was asked for."""

    registry: Registry
    port: int = 0
    asked: list[tuple[str, str]] = field(default_factory=list)
    _plans: list[list[object]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def spoil(self, path: str, fault: Fault, *, times: int = 1 << 30) -> None:
        """Let the next answers to paths that match be spoilt."""
        self._plans.append([re.compile(path), fault, times])

    def fault_for(self, path: str) -> Fault | None:
        with self._lock:
            for plan in self._plans:
                pattern, fault, times = plan
                assert isinstance(pattern, re.Pattern)
                assert isinstance(times, int)
                if times > 0 and pattern.search(path):
                    plan[2] = times - 1
                    return fault  # type: ignore[return-value] # of a plan
        return None


@contextlib.contextmanager
def faulty(registry: Registry) -> Iterator[FaultyRegistry]:
    """Start the proxy on a loopback port."""
    proxy = FaultyRegistry(registry=registry)

    class Handler(Proxied):
        def do_GET(self) -> None:
            proxy.asked.append((self.path, self.headers.get("Range", "")))
            fault = proxy.fault_for(self.path)
            connection = http.client.HTTPConnection("127.0.0.1", registry.port, timeout=30)
            headers = {
                name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")
            }
            if fault is without_ranges:
                headers.pop("Range", None)
            try:
                connection.request("GET", self.path, headers=headers)
                answer = connection.getresponse()
                body = answer.read()
            finally:
                connection.close()
            kept = ("Content-Type", "Content-Range", "Docker-Content-Digest", "Www-Authenticate", "Location")
            response = Response(
                status=answer.status,
                headers={name: value for name in kept if (value := answer.headers.get(name))}
                | {"Content-Length": str(len(body))},
                body=body,
            )
            if fault is None:
                self.answer(response)
            else:
                fault(self, response)

    class Http(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: object, client_address: object) -> None:
            """Clients that hang up are part of the tests."""

    with Http(("127.0.0.1", 0), Handler) as http_server:
        proxy.port = http_server.server_port
        thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield proxy
        http_server.shutdown()
        thread.join()
