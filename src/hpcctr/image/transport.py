"""HTTP as a pull speaks it: every wait has an end, every answer a bound, and trust is the administrator's word.

Every request passes :class:`Session`, those of ``oras`` and every hop of a redirect included."""

# ruff: noqa: ANN401 - what is overridden here takes anything
from __future__ import annotations

import ipaddress
import os
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import requests
import requests.adapters

from hpcctr.errors import RegistryFailed
from hpcctr.site import RegistrySettings

T = TypeVar("T")

#: Seconds to connect. A compute node without a way out mostly meets a firewall that drops: people should read so soon.
CONNECT_WITHIN = 5.0
#: Seconds between two bytes, and to the end of an answer's headers.
READ_WITHIN = 30.0
#: Bytes of a token server's answer.
_TOKEN_MAX = 1 << 20
#: Where distributions keep the CAs administrators trust. Variables (REQUESTS_CA_BUNDLE, SSL_CERT_FILE) are not asked:
#: a service's trust is its administrator's word, in these files and in the site file's ca-file.
_CA_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem")


def is_loopback(registry: str) -> bool:
    """Whether ``host[:port]`` is this machine itself by its text; no name is looked up."""
    host = registry[1:].partition("]")[0] if registry.startswith("[") else registry.partition(":")[0]
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _NoOtherCredentials(requests.auth.AuthBase):
    """Keeps requests from putting ~/.netrc in the place of the registry's token."""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        return request


class Session(requests.Session):
    """With what :func:`trust_of` gave; with ``plain``, HTTP without TLS as well."""

    def __init__(self, trust: ssl.SSLContext, *, plain: bool) -> None:
        super().__init__()
        self._plain = plain
        self.auth = _NoOtherCredentials()
        self.headers["User-Agent"] = "hpcctr"
        self.mount("https://", _Trusting(trust))

    def merge_environment_settings(self, *arguments: Any, **more: Any) -> Any:
        """The proxies of the environment, never its CAs: the adapter's context decides about those."""
        return {**super().merge_environment_settings(*arguments, **more), "verify": True, "cert": None}

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """With deadlines, with a bound for what is read at once, and in plain HTTP only where it is allowed."""
        if str(request.url).startswith("http://") and not self._plain:
            raise requests.exceptions.SSLError(f"it leads to {str(request.url)[:200]}, which is not HTTPS")
        options["timeout"] = (CONNECT_WITHIN, READ_WITHIN)
        at_once = not options.get("stream", False)
        response = super().send(request, **{**options, "stream": True})
        if at_once:
            with response:
                content = response.raw.read(_TOKEN_MAX + 1, decode_content=True)
            if len(content) > _TOKEN_MAX:
                raise requests.exceptions.ContentDecodingError(f"an answer of more than {_TOKEN_MAX} bytes")
            response._content = content  # noqa: SLF001 - where requests keeps what was read
            response._content_consumed = True  # noqa: SLF001
        return response


class _Trusting(requests.adapters.HTTPAdapter):
    """Verifies with one given context and nothing else."""

    def __init__(self, trust: ssl.SSLContext) -> None:
        self._trust = trust
        super().__init__()

    def init_poolmanager(self, *arguments: Any, **more: Any) -> Any:
        return super().init_poolmanager(*arguments, **more, ssl_context=self._trust)

    def proxy_manager_for(self, proxy: str, **more: Any) -> Any:
        return super().proxy_manager_for(proxy, **more, ssl_context=self._trust)

    def cert_verify(self, *_: Any) -> None:
        """requests would add the CAs of certifi here."""


def trust_of(settings: RegistrySettings, name: str) -> ssl.SSLContext:
    bundle = next((path for path in _CA_BUNDLES if os.path.exists(path)), None)
    context = ssl.create_default_context(cafile=bundle)
    if settings.ca_file:
        try:
            context.load_verify_locations(cafile=settings.ca_file)
        except (OSError, ssl.SSLError) as error:
            reason = error.strerror or str(error)
            raise RegistryFailed(
                f"registry {name}: ca-file {settings.ca_file}: {reason.lower()}",
                hint=f'[registry."{name}"] ca-file in site.toml names a file of PEM certificates',
            ) from None
    return context


def within(seconds: float, call: Callable[[], T]) -> T:
    """What ``call`` returns, or requests' ReadTimeout. A peer that sends a byte now and then passes every timeout of a
    socket; its thread is left behind and ends with the connection."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is taken
            future.set_exception(error)

    threading.Thread(target=work, name="request", daemon=True).start()
    try:
        return future.result(timeout=seconds)
    except TimeoutError:
        if future.done():
            raise
        future.add_done_callback(_close_late)
        raise requests.exceptions.ReadTimeout(f"no whole answer within {seconds:g} s") from None


def _close_late(future: Future[Any]) -> None:
    if future.exception() is None and isinstance(future.result(), requests.Response):
        future.result().close()
