"""Images of a registry: OCI distribution-spec, pull only. Protocol words and credentials come from the ``oras``
library.

HTTPS, except for loopback addresses and registries the site allows plain HTTP for. Every wait has an end; every
refusal is one :class:`hpcctr.errors.RegistryFailed` that says who refused what and why, in the registry's words."""

from __future__ import annotations

import io
import ipaddress
import os
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

import msgspec
import oras.auth
import oras.container
import requests
import requests.adapters
import urllib3.exceptions

from hpcctr.errors import ImageBroken, RegistryFailed
from hpcctr.image.compression import CHUNK
from hpcctr.image.imagefile import store_unusable
from hpcctr.image.record import Platform
from hpcctr.image.reference import DEFAULT_REGISTRY, ImageRef
from hpcctr.image.source import (
    DOCUMENT_MAX,
    INDEX_TYPES,
    MANIFEST_TYPES,
    Descriptor,
    LayerBlob,
    SourceImage,
    resolve,
)
from hpcctr.image.verification import Verification, sha256_of
from hpcctr.site import RegistrySettings

#: Seconds to connect, and between two bytes.
_TIMEOUT = (10, 60)
_ATTEMPTS = 4
_DOCKER_HUB = "registry-1.docker.io"
#: The key under which docker login keeps the credentials of docker.io.
_DOCKER_HUB_KEY = "https://index.docker.io/v1/"
_ACCEPT = {"Accept": ", ".join((*INDEX_TYPES, *MANIFEST_TYPES))}

_PLAIN_HTTP = '[registry."{}"] plain-http = true in /etc/hpcctr/site.toml'
_LOGIN_HINT = "docker login {host}, or podman login {host}; the credentials are read from ~/.docker/config.json"


class RegistrySource:
    """One repository of a registry."""

    def __init__(self, ref: ImageRef, settings: RegistrySettings) -> None:
        self._ref = ref
        self._host = _DOCKER_HUB if ref.registry == DEFAULT_REGISTRY else ref.registry
        self._name = ref.familiar
        self._session = _session(self._host)
        self._auth: Any = None
        self._auth_lock = threading.Lock()
        self._scheme = "http" if settings.plain_http else "https"
        self._may_fall_back = is_loopback(ref.registry) and not settings.plain_http
        self._container = oras.container.Container(f"{self._host}/{ref.repository}:{ref.tag or 'latest'}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._session.close()

    def find(self, wanted: Platform) -> SourceImage:
        """The image for ``wanted``. Raises :class:`RegistryFailed`, :class:`NotAnImage`, :class:`PlatformMissing`,
        :class:`ImageBroken`."""
        content, said = self._manifest(self._ref.digest or self._ref.tag)
        digest = sha256_of(content)
        if self._ref.digest and digest != self._ref.digest:
            raise ImageBroken(f"registry {self._ref.registry} answers {self._name} with a manifest of digest {digest}")
        if said.startswith("sha256:") and said != digest:
            raise ImageBroken(f"registry {self._ref.registry} announces {said}, its manifest has the digest {digest}")
        return resolve(self, content, digest, wanted, self._name)

    def document(self, descriptor: Descriptor) -> bytes:
        """See :class:`hpcctr.image.source.BlobSource`."""
        if descriptor.media_type in (*INDEX_TYPES, *MANIFEST_TYPES):
            return self._manifest(descriptor.digest)[0]
        return self._small(self._container.get_blob_url(descriptor.digest), {}, f"blob {descriptor.digest}")[0]

    def download(self, layer: LayerBlob, path: str, *, stop: threading.Event, progress: Callable[[int], None]) -> None:
        """Write a layer's compressed bytes to ``path``, verified. A connection that breaks is taken up again where it
        broke.

        Raises :class:`RegistryFailed`, :class:`ImageBroken`, :class:`StoreUnusable`; returns early once ``stop`` is
        set."""
        check = Verification(layer.digest, layer.size, f"blob {layer.digest} of {self._name}")
        what = f"blob {layer.digest}"
        url = self._container.get_blob_url(layer.digest)
        try:
            file = io.FileIO(path, "x")
        except OSError as error:
            raise store_unusable(path, error) from None
        with file:
            for attempt in range(_ATTEMPTS):
                try:
                    with self._get(url, {"Range": f"bytes={check.count}-"} if check.count else {}, what) as response:
                        if check.count and response.status_code != 206:
                            # Everything comes from the beginning once more: what was verified so far is passed over.
                            _discard(response, check.count)
                        while not stop.is_set() and (chunk := response.raw.read(CHUNK)):
                            check.add(chunk)
                            _write(file, chunk, path)
                            progress(len(chunk))
                    if stop.is_set():
                        return
                    if layer.size < 0 or check.count >= layer.size:
                        break
                except (
                    urllib3.exceptions.HTTPError,
                    requests.RequestException,
                    ConnectionError,
                    TimeoutError,
                ) as error:
                    if attempt == _ATTEMPTS - 1:
                        raise self._unreachable(error) from None
                # The server ended early: a short breath, then the rest.
                stop.wait(2**attempt / 4)
        check.require_agreement()

    def _manifest(self, tag_or_digest: str) -> tuple[bytes, str]:
        """A manifest or index, and the digest the registry announces for it."""
        content, headers = self._small(self._container.manifest_url(tag_or_digest), _ACCEPT, self._name)
        return content, headers.get("Docker-Content-Digest", "")

    def _small(self, url: str, headers: Mapping[str, str], what: str) -> tuple[bytes, Mapping[str, str]]:
        try:
            with self._get(url, headers, what) as response:
                content = response.raw.read(DOCUMENT_MAX + 1)
        except (urllib3.exceptions.HTTPError, requests.RequestException) as error:
            raise self._unreachable(error) from None
        return content, response.headers

    def _get(self, url: str, headers: Mapping[str, str], what: str) -> requests.Response:
        response = self._send(url, headers)
        if response.status_code == 401:
            with response:
                self._authenticate(response)
            response = self._send(url, headers)
        if response.status_code == 429 and (wait := _seconds(response.headers.get("Retry-After", ""))) is not None:
            response.close()
            time.sleep(wait)
            response = self._send(url, headers)
        if response.status_code not in (200, 206):
            with response:
                raise self._refused(response, what)
        return response

    def _send(self, url: str, headers: Mapping[str, str]) -> requests.Response:
        all_headers = {"Accept-Encoding": "identity", **headers, **(self._auth.get_auth_header() if self._auth else {})}
        while True:
            try:
                return self._session.get(f"{self._scheme}://{url}", headers=all_headers, stream=True, timeout=_TIMEOUT)
            except requests.exceptions.SSLError as error:
                if not self._may_fall_back:
                    raise self._unreachable(error) from None
                self._scheme, self._may_fall_back = "http", False
            except requests.RequestException as error:
                raise self._unreachable(error) from None

    def _authenticate(self, response: requests.Response) -> None:
        """Answer a 401: a token for a Bearer challenge, anonymous or with credentials; Basic only with credentials."""
        with self._auth_lock:
            challenge = response.headers.get("Www-Authenticate", "")
            backend = "basic" if challenge.lower().startswith("basic") else "token"
            auth = oras.auth.get_auth_backend(backend, self._session, self._scheme == "http")
            auth.hostname = self._host
            try:
                auth.load_configs(self._container, configs=_credential_files())
                if self._host == _DOCKER_HUB:
                    auth._load_auth(_DOCKER_HUB_KEY)  # noqa: SLF001 - oras looks only for the host's own name
                if backend == "basic" and not getattr(auth, "_basic_auth", None):
                    return
                auth.authenticate_request(response, {})
            except requests.RequestException as error:
                raise self._unreachable(error) from None
            except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
                raise RegistryFailed(
                    f"registry {self._ref.registry}: logging in failed: {error}",
                    hint="the credentials in ~/.docker/config.json may be damaged: "
                    + _LOGIN_HINT.format(host=self._ref.registry),
                ) from None
            self._auth = auth

    def _refused(self, response: requests.Response, what: str) -> RegistryFailed:
        registry = f"registry {self._ref.registry}"
        said = _words_of(response)
        status = response.status_code
        login = _LOGIN_HINT.format(host=self._ref.registry)
        if status == 401:
            sent = self._auth is not None and getattr(self._auth, "_basic_auth", None)
            problem = "does not take the credentials for" if sent else "wants credentials for"
            return RegistryFailed(f"{registry} {problem} {what}, or has no such image{said}", hint=login)
        if status == 403:
            return RegistryFailed(f"{registry} denies {what}{said}", hint=f"ask its owner for access; {login}")
        if status == 404:
            return RegistryFailed(
                f"{registry} has no {what}{said}", hint="look for a typing error in repository and tag"
            )
        if status == 429:
            return RegistryFailed(
                f"{registry} limits how often it may be asked{said}", hint=f"wait, or log in: {login}"
            )
        return RegistryFailed(
            f"{registry} answers {what} with status {status} {response.reason}{said}", hint="try again later"
        )

    def _unreachable(self, error: Exception) -> RegistryFailed:
        registry = f"registry {self._ref.registry}"
        text = str(error)
        proxy = next((value for key, value in self._session.proxies.items() if key == self._scheme), "")
        through = f" through the proxy {proxy}" if proxy else ""
        if isinstance(error, requests.exceptions.SSLError):
            reason = text.rpartition("[SSL")[2].strip("()' ").rpartition("] ")[2] or text
            return RegistryFailed(
                f"{registry}: the TLS connection failed: {reason[:200]}",
                hint="install the registry's CA on this node, or allow plain HTTP: "
                + _PLAIN_HTTP.format(self._ref.registry),
            )
        if isinstance(error, (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError, TimeoutError)):
            return RegistryFailed(
                f"{registry} does not answer{through}",
                hint="is the node connected to it? a proxy is set with https_proxy",
            )
        if "NameResolutionError" in text or "Name or service not known" in text or "name resolution" in text:
            return RegistryFailed(
                f"{registry}: there is no host {self._host.partition(':')[0]}",
                hint="look for a typing error; is DNS there?",
            )
        if "refused" in text:
            return RegistryFailed(f"{registry} refuses connections{through}", hint="is it running, and the port right?")
        if "unreachable" in text:
            return RegistryFailed(
                f"{registry} cannot be reached{through}: no route",
                hint="pull on a node with a network route, or set https_proxy",
            )
        return RegistryFailed(f"{registry}: the connection broke: {text[:300]}", hint="try again")


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


def _session(host: str) -> requests.Session:
    session = requests.Session()
    session.auth = _NoOtherCredentials()
    session.headers["User-Agent"] = "hpcctr"
    if is_loopback(host):
        session.trust_env = False
    # The machine's own certificates, where administrators add those of their registries; requests would take certifi's.
    bundle = ssl.get_default_verify_paths().cafile or "/etc/ssl/certs/ca-certificates.crt"
    if os.path.exists(bundle):
        session.verify = bundle
    return session


def _credential_files() -> list[str]:
    """Where docker and podman keep logins, as far as they exist."""
    places = [
        os.path.join(directory, name)
        for variable, name in (
            ("XDG_RUNTIME_DIR", "containers/auth.json"),
            ("DOCKER_CONFIG", "config.json"),
            ("REGISTRY_AUTH_FILE", ""),
        )
        if (directory := os.environ.get(variable))
    ]
    return [path.rstrip("/") for path in places if os.path.isfile(path.rstrip("/"))]


def _write(file: io.FileIO, chunk: bytes, path: str) -> None:
    view = memoryview(chunk)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError as error:
        raise store_unusable(path, error) from None


def _discard(response: requests.Response, count: int) -> None:
    while count and (chunk := response.raw.read(min(CHUNK, count))):
        count -= len(chunk)


def _words_of(response: requests.Response) -> str:
    """What the registry says in its error document, in brackets; empty when it says nothing readable."""
    try:
        errors = msgspec.json.decode(response.raw.read(65536)).get("errors", [])
        words = "; ".join(str(error.get("message") or error.get("code")) for error in errors[:3])
    except Exception:  # noqa: BLE001 - the body of a refusal may be anything
        return ""
    words = "".join(character for character in words if character.isprintable())
    return f" ({words[:300]})" if words else ""


def _seconds(text: str) -> int | None:
    """A wait a person would sit through, or None."""
    return int(text) if text.isascii() and text.isdigit() and int(text) <= 30 else None
