"""One host that speaks the OCI distribution-spec: HTTP with deadlines, logins, patience and bounds.

``oras`` supplies the words of the protocol and the token handshake. What it has no means for is done here and in
:mod:`hpcctr.image.transport`: deadlines for every wait, answers of bounded size, no plain HTTP where a registry is
spoken to in HTTPS (a redirect or a token server's address included), several attempts, ranges, and the limits
registries set."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import oras.auth
import oras.auth.utils
import oras.container
import requests

from hpcctr.errors import RegistryFailed
from hpcctr.image import refusal
from hpcctr.image.credentials import find_login
from hpcctr.image.reference import DEFAULT_REGISTRY
from hpcctr.image.transport import CONNECT_WITHIN, READ_WITHIN, Session, is_loopback, trust_of, within
from hpcctr.site import RegistrySettings

#: Seconds to the end of a manifest or config, which has a few KiB.
_DOCUMENT_WITHIN = 60.0
#: Attempts at one request that a registry answers with a trouble of its own, or breaks off.
ATTEMPTS = 5
#: Seconds before the second attempt; each further one waits about twice as long.
_BACKOFF = 0.5
#: Seconds a registry may ask to wait at once (Retry-After); what asks for more is told to the user.
_RETRY_AFTER_MAX = 60.0
_DOCKER_HUB = "registry-1.docker.io"
#: RFC 9110: the server is in trouble, or says so on behalf of another; it may be over at the next attempt.
_PASSING = (408, 425, 429, 500, 502, 503, 504)


class Endpoint:
    """One repository at one host: the registry itself, or a mirror of it."""

    def __init__(self, place: str, repository: str, settings: RegistrySettings) -> None:
        """``place`` is ``host[:port]``, for a mirror perhaps with a path in which it keeps what it mirrors."""
        name, _, prefix = place.partition("/")
        self.name = name
        self._host = _DOCKER_HUB if name == DEFAULT_REGISTRY else name
        self._repository = f"{prefix}/{repository}" if prefix else repository
        self._container = oras.container.Container(f"{self._host}/{self._repository}:latest")
        self._scheme = "http" if settings.plain_http else "https"
        self._may_fall_back = is_loopback(name) and not settings.plain_http
        self._session = Session(trust_of(settings, name), plain=settings.plain_http or is_loopback(name))
        if is_loopback(self._host):
            self._session.trust_env = False
        self._lock = threading.Lock()
        self._auth: Any = None
        self._logged_in = False
        self._is_reachable = False
        self._stop = threading.Event()
        self._open: set[requests.Response] = set()

    def close(self) -> None:
        """Give the connections up."""
        self._session.close()

    def abort(self) -> None:
        """End every transfer, in whatever thread, and start none any more."""
        self._stop.set()
        for response in tuple(self._open):
            with contextlib.suppress(Exception):
                response.raw.shutdown()

    @property
    def is_aborted(self) -> bool:
        """Whether :meth:`abort` was called."""
        return self._stop.is_set()

    def pause(self, attempt: int) -> None:
        """Wait before the attempt after ``attempt`` (from 0): longer each time, and not all clients at one moment."""
        self._stop.wait(_BACKOFF * 2**attempt * random.uniform(0.5, 1.5))  # noqa: S311 - spreads load

    def manifest_url(self, tag_or_digest: str) -> str:
        """Without the scheme."""
        url: str = self._container.manifest_url(tag_or_digest)
        return url

    def blob_url(self, digest: str) -> str:
        """Without the scheme."""
        url: str = self._container.get_blob_url(digest)
        return url

    def document(self, url: str, headers: Mapping[str, str], what: str, limit: int) -> tuple[bytes, Mapping[str, str]]:
        """A whole small answer, at most one byte more than ``limit``, and its headers.

        Raises :class:`RegistryFailed`."""

        def read() -> tuple[bytes, Mapping[str, str]]:
            with self.answer(url, headers, what) as response:
                content = response.raw.read(limit + 1)
            promised = response.headers.get("Content-Length", "")
            if promised.isdigit() and len(content) < min(int(promised), limit):
                raise ConnectionError(f"{what} ends after {len(content)} of {promised} bytes")
            return content, response.headers

        for attempt in range(ATTEMPTS):
            try:
                return within(_DOCUMENT_WITHIN + _RETRY_AFTER_MAX, read)
            except refusal.BROKEN as error:
                if attempt == ATTEMPTS - 1 or self.is_aborted:
                    raise self.unreachable(error) from None
            self.pause(attempt)
        raise AssertionError

    @contextlib.contextmanager
    def answer(self, url: str, headers: Mapping[str, str], what: str) -> Iterator[requests.Response]:
        """An answer with status 200 or 206, its body yet to be read. Raises :class:`RegistryFailed`."""
        response = self._patiently(url, headers, what)
        self._open.add(response)
        try:
            with response:
                yield response
        finally:
            self._open.discard(response)

    def unreachable(self, error: Exception) -> RegistryFailed:
        """See :func:`hpcctr.image.refusal.unreachable`."""
        return refusal.unreachable(self._speaker(), error)

    def _speaker(self) -> refusal.Speaker:
        return refusal.Speaker(
            registry=self.name,
            host=self._host,
            proxy=self._proxy(),
            logged_in=self._auth is not None and self._logged_in,
        )

    def _proxy(self) -> str:
        if not self._session.trust_env:
            return ""
        proxy = requests.utils.select_proxy(
            f"{self._scheme}://{self._host}/", requests.utils.get_environ_proxies(f"{self._scheme}://{self._host}/")
        )
        # A proxy's address may carry a password.
        return proxy.rpartition("@")[2] if proxy else ""

    def _patiently(self, url: str, headers: Mapping[str, str], what: str) -> requests.Response:
        was_authenticated = False
        waited = 0.0
        for attempt in range(ATTEMPTS + 1):
            auth = self._auth
            response = self._send(url, headers, auth.get_auth_header() if auth else {})
            status = response.status_code
            if status in (200, 206):
                return response
            with response:
                if status == 401 and not was_authenticated:
                    was_authenticated = True
                    self._authenticate(response, auth)
                    continue
                wait = refusal.retry_after(response.headers)
                may_wait = wait is None or waited + wait <= _RETRY_AFTER_MAX
                if status not in _PASSING or not may_wait or attempt >= ATTEMPTS - 1 or self.is_aborted:
                    body = within(READ_WITHIN, lambda r=response: r.raw.read(refusal.WORDS_MAX))  # type: ignore[misc]
                    raise refusal.refused(self._speaker(), status, response.reason, response.headers, body, what)
            if wait is None:
                self.pause(attempt)
            else:
                waited += wait
                # All nodes of a cluster are told the same second.
                self._stop.wait(wait + random.uniform(0, min(wait, 1)))  # noqa: S311 - spreads load
        raise self._too_often_unauthorized(what)

    def _too_often_unauthorized(self, what: str) -> RegistryFailed:
        return refusal.refused(self._speaker(), 401, "Unauthorized", {}, b"", what)

    def _send(self, url: str, headers: Mapping[str, str], authorization: Mapping[str, str]) -> requests.Response:
        all_headers = {"Accept-Encoding": "identity", **headers, **authorization}
        self._require_reachable()
        for attempt in range(ATTEMPTS):
            full_url = f"{self._scheme}://{url}"
            try:
                return within(
                    CONNECT_WITHIN + READ_WITHIN,
                    lambda full_url=full_url: self._session.get(full_url, headers=all_headers, stream=True),  # type: ignore[misc]
                )
            except requests.exceptions.SSLError as error:
                # Perhaps not the first thread that finds it out.
                if not self._may_fall_back or full_url.startswith("http:"):
                    raise self.unreachable(error) from None
                self._scheme = "http"
            except requests.RequestException as error:
                failure = self.unreachable(error)
                # Only what was a connection and broke is worth another attempt.
                if "connection broke" not in failure.message or attempt == ATTEMPTS - 1 or self.is_aborted:
                    raise failure from None
                self.pause(attempt)
        raise AssertionError

    def _require_reachable(self) -> None:
        """Raise :class:`RegistryFailed` unless some address of the host takes a connection in time, all of them
        together: requests would wait in full for each."""
        if self._is_reachable or self._proxy():
            return
        host, _, port = self._host.rpartition(":") if not self._host.endswith("]") else (self._host, "", "")
        if not host or not port.isdigit():
            host, port = self._host, "443" if self._scheme == "https" else "80"
        try:
            addresses = within(
                CONNECT_WITHIN, lambda: socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
            )
        except requests.exceptions.ReadTimeout:
            raise self.unreachable(TimeoutError()) from None
        except OSError as error:
            raise self.unreachable(requests.ConnectionError(f"{error}: Name or service not known")) from None
        deadline, last = time.monotonic() + CONNECT_WITHIN, OSError("no address")
        for place, (family, kind, protocol, _, address) in enumerate(addresses):
            left = (deadline - time.monotonic()) / (len(addresses) - place)
            with socket.socket(family, kind, protocol) as probe:
                probe.settimeout(max(left, 0.1))
                try:
                    probe.connect(address)
                except OSError as error:
                    last = error
                    continue
            self._is_reachable = True
            return
        if isinstance(last, TimeoutError):
            raise self.unreachable(requests.exceptions.ConnectTimeout())
        raise self.unreachable(requests.ConnectionError(str(last)))

    def _authenticate(self, response: requests.Response, refused_auth: object) -> None:
        """Answer a 401: a token for a Bearer challenge, anonymous or with a login; Basic only with a login."""
        with self._lock:
            if self._auth is not refused_auth:
                # Another thread has just done it.
                return
            challenge = response.headers.get("Www-Authenticate", "")
            backend = "basic" if challenge.lower().startswith("basic") else "token"
            login = find_login(self.name, self._repository)
            if backend == "basic" and login is None:
                return
            auth = oras.auth.get_auth_backend(backend, self._session, self._scheme == "http")
            if login is not None:
                auth.set_basic_auth(login.user, login.password)
            try:
                auth.authenticate_request(response, {})
            except requests.RequestException as error:
                failure = self.unreachable(error)
                realm = oras.auth.utils.parse_auth_header(challenge).realm or "its token server"
                raise RegistryFailed(
                    f"{failure.message} (asking {realm[:200]} for a token)", hint=failure.hint
                ) from None
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise RegistryFailed(
                    f"registry {self.name}: logging in failed: {error}",
                    hint="the answer of its token server cannot be read; ask its administrator",
                ) from None
            self._auth, self._logged_in = auth, login is not None
