"""Images of a registry: OCI distribution-spec, pull only, from the site's mirrors first.

HTTPS, except for loopback addresses and registries the site allows plain HTTP for. Every wait has an end; every
refusal is one :class:`hpcctr.errors.RegistryFailed` that says who refused what and why, in the registry's words. A
mirror is trusted with what a tag means, as the site wants it; whatever has a digest is checked against it, and what a
mirror has not, or has wrong, comes from the next one and at last from the registry itself."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Mapping
from typing import Self, TypeVar

import requests

from hpcctr.errors import ImageBroken, RegistryFailed
from hpcctr.image import refusal
from hpcctr.image.compression import CHUNK
from hpcctr.image.endpoint import ATTEMPTS, Endpoint
from hpcctr.image.imagefile import store_unusable
from hpcctr.image.record import Platform
from hpcctr.image.reference import ImageRef
from hpcctr.image.source import (
    DOCUMENT_MAX,
    INDEX_TYPES,
    MANIFEST_TYPES,
    Descriptor,
    Found,
    LayerBlob,
    SourceImage,
    image_at,
    locate,
)
from hpcctr.image.verification import Verification, sha256_of
from hpcctr.site import RegistrySettings

T = TypeVar("T")

_ACCEPT = {"Accept": ", ".join((*INDEX_TYPES, *MANIFEST_TYPES))}
#: Bytes that must come within so many seconds: a server that only keeps the line busy is left and asked again.
_PACE = (30 * 1024, 30.0)
#: Bytes after which a transfer that broke counts as a new first attempt.
_PROGRESS = 1 << 20
_CONTENT_RANGE = re.compile(r"bytes (\d+)-")


class RegistrySource:
    """One repository of a registry."""

    def __init__(self, ref: ImageRef, settings: Mapping[str, RegistrySettings]) -> None:
        """``settings`` are the site's, by registry. Raises :class:`RegistryFailed` for a CA that cannot be read."""
        self._ref = ref
        self._name = ref.familiar
        mine = settings.get(ref.registry, RegistrySettings())
        self._endpoints = [
            Endpoint(place, ref.repository, settings.get(place.partition("/")[0], RegistrySettings()))
            for place in mine.mirrors
        ] + [Endpoint(ref.registry, ref.repository, mine)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for endpoint in self._endpoints:
            endpoint.close()

    def abort(self) -> None:
        """End every download, in whatever thread it is."""
        for endpoint in self._endpoints:
            endpoint.abort()

    def locate(self, wanted: Platform) -> Found:
        """Which image ``wanted`` gets. No blob is read for that, unless an index does not say what is for whom.

        Raises :class:`RegistryFailed`, :class:`NotAnImage`, :class:`PlatformMissing`, :class:`ImageBroken`."""
        content, digest = self._first(self._top)
        return locate(self, content, digest, wanted, self._name)

    def image(self, found: Found, wanted: Platform) -> SourceImage:
        """What the located image consists of. Raises as :meth:`locate` does."""
        return image_at(self, found, wanted, self._name)

    def document(self, descriptor: Descriptor) -> bytes:
        """See :class:`hpcctr.image.source.BlobSource`."""

        def fetch(endpoint: Endpoint) -> bytes:
            if descriptor.media_type in (*INDEX_TYPES, *MANIFEST_TYPES):
                url, headers, what = endpoint.manifest_url(descriptor.digest), _ACCEPT, self._name
            else:
                url, headers, what = endpoint.blob_url(descriptor.digest), {}, f"blob {descriptor.digest}"
            content = endpoint.document(url, headers, what, DOCUMENT_MAX)[0]
            check = Verification(descriptor.digest, descriptor.size, f"{what} of {endpoint.name}")
            check.add(content)
            check.require_agreement()
            return content

        return self._first(fetch)

    def download(self, layer: LayerBlob, path: str, *, progress: Callable[[int], None]) -> None:
        """Write a layer's compressed bytes to the new file ``path``, verified. A connection that breaks is taken up
        again where it broke.

        Raises :class:`RegistryFailed`, :class:`ImageBroken`, :class:`StoreUnusable`; returns early after
        :meth:`abort`."""
        try:
            file = io.FileIO(path, "x")
        except OSError as error:
            raise store_unusable(path, error) from None
        with file:
            transfer = _Transfer(layer, file, path, self._name, progress)
            self._first(transfer.run)

    def _top(self, endpoint: Endpoint) -> tuple[bytes, str]:
        """The manifest or index the reference names, and its digest."""
        url = endpoint.manifest_url(self._ref.digest or self._ref.tag)
        content, headers = endpoint.document(url, _ACCEPT, self._name, DOCUMENT_MAX)
        said, digest = headers.get("Docker-Content-Digest", ""), sha256_of(content)
        if self._ref.digest and digest != self._ref.digest:
            raise ImageBroken(f"registry {endpoint.name} answers {self._name} with a manifest of digest {digest}")
        if said.startswith("sha256:") and said != digest:
            raise ImageBroken(f"registry {endpoint.name} announces {said}, its manifest has the digest {digest}")
        return content, digest

    def _first(self, ask: Callable[[Endpoint], T]) -> T:
        """What the first endpoint gives that has it. The registry's own refusal counts when nobody has."""
        refusals: list[str] = []
        *mirrors, registry = self._endpoints
        for endpoint in mirrors:
            try:
                return ask(endpoint)
            except (RegistryFailed, ImageBroken) as error:
                refusals.append(f"mirror {error.message.removeprefix('registry ')}")
        try:
            return ask(registry)
        except (RegistryFailed, ImageBroken) as error:
            if refusals:
                raise type(error)(f"{error.message}; {'; '.join(refusals)}", hint=error.hint) from None
            raise


class _Transfer:
    """One blob on its way into a file, over as many connections and endpoints as it takes."""

    def __init__(
        self, layer: LayerBlob, file: io.FileIO, path: str, name: str, progress: Callable[[int], None]
    ) -> None:
        self._layer = layer
        self._file = file
        self._path = path
        self._name = name
        self._progress = progress
        self._check = self._new_check()
        self._pieces = 0

    def run(self, endpoint: Endpoint) -> None:
        """Bring the rest. Raises :class:`RegistryFailed`, :class:`ImageBroken`, :class:`StoreUnusable`."""
        while True:
            try:
                self._bring(endpoint)
                if not endpoint.is_aborted:
                    self._check.require_agreement()
                return
            except ImageBroken:
                pieces = self._pieces
                self._restart()
                # Pieces of several answers may not belong together; one whole answer that is wrong stays wrong.
                if pieces <= 1:
                    raise

    def _bring(self, endpoint: Endpoint) -> None:
        attempt, begun_at = 0, self._check.count
        while not endpoint.is_aborted:
            error: Exception = ConnectionError(f"blob {self._layer.digest} ends early, again and again")
            try:
                self._receive(endpoint)
                if self._check.count >= self._layer.size:
                    return
            except refusal.BROKEN as broken:
                error = broken
            if endpoint.is_aborted:
                return
            if self._check.count - begun_at >= _PROGRESS:
                attempt, begun_at = 0, self._check.count
            attempt += 1
            if attempt >= ATTEMPTS:
                raise endpoint.unreachable(error) from None
            endpoint.pause(attempt - 1)

    def _receive(self, endpoint: Endpoint) -> None:
        begin = self._check.count
        headers = {"Range": f"bytes={begin}-"} if begin else {}
        url = endpoint.blob_url(self._layer.digest)
        with endpoint.answer(url, headers, f"blob {self._layer.digest}") as response:
            pace = _Pace()
            self._pieces += 1
            if begin and not _begins_at(response, begin):
                # Everything comes from the beginning once more: what was received so far is passed over.
                self._pieces -= 1
                while begin and (chunk := response.raw.read1(min(CHUNK, begin))):
                    begin -= len(chunk)
                    pace.require(len(chunk))
            while not endpoint.is_aborted and (chunk := response.raw.read1(CHUNK)):
                self._check.add(chunk)
                _write(self._file, chunk, self._path)
                self._progress(len(chunk))
                pace.require(len(chunk))

    def _restart(self) -> None:
        self._progress(-self._check.count)
        self._check, self._pieces = self._new_check(), 0
        try:
            self._file.seek(0)
            self._file.truncate()
        except OSError as error:
            raise store_unusable(self._path, error) from None

    def _new_check(self) -> Verification:
        layer = self._layer
        return Verification(layer.digest, layer.size, f"blob {layer.digest} of {self._name}")


class _Pace:
    """Tells a slow line from one that only pretends to be alive."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._bytes = 0

    def require(self, count: int) -> None:
        """Count bytes. Raises requests' ReadTimeout when too few came."""
        self._bytes += count
        least, window = _PACE
        if time.monotonic() - self._since > window:
            if self._bytes < least:
                raise requests.exceptions.ReadTimeout(f"{self._bytes} bytes in {window:g} s")
            self._since, self._bytes = time.monotonic(), 0


def _begins_at(response: requests.Response, begin: int) -> bool:
    """Whether an answer to a Range request is that range (RFC 9110, 14.4) and not everything."""
    if response.status_code != 206:
        return False
    said = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
    if said is None or int(said[1]) != begin:
        raise requests.exceptions.ContentDecodingError(
            f"asked for bytes from {begin}, answered {response.headers.get('Content-Range', 'without a range')[:100]!r}"
        )
    return True


def _write(file: io.FileIO, chunk: bytes, path: str) -> None:
    view = memoryview(chunk)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError as error:
        raise store_unusable(path, error) from None
