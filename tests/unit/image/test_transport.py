"""HTTP with ends: whom it trusts, how long it waits."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import requests

from hpcctr.errors import RegistryFailed
from hpcctr.image.transport import Session, is_loopback, trust_of, within
from hpcctr.site import RegistrySettings
from tests.support.answers import answering


def get(url: str, settings: RegistrySettings) -> bytes:
    with Session(trust_of(settings, "r"), plain=False) as session:
        return session.get(url).content


def test_a_private_ca_is_trusted_where_the_site_names_it_and_nowhere_else(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = certificate
    with answering(certificate=cert, key=key) as server:
        server.answers["/"] = (200, {}, b"hello")
        url = f"https://{server.address}/"
        assert get(url, RegistrySettings(ca_file=str(cert))) == b"hello"
        # What the environment names is nobody's word but the caller's.
        for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
            monkeypatch.setenv(name, str(cert))
        with pytest.raises(requests.exceptions.SSLError):
            get(url, RegistrySettings())


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_ca_that_cannot_be_read_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RegistryFailed, match="ca.pem") as caught:
        trust_of(RegistrySettings(ca_file=str(path)), "r:5000")
    assert '[registry."r:5000"] ca-file' in caught.value.hint


def test_what_does_not_end_is_left_behind() -> None:
    ended = threading.Event()
    begun = time.monotonic()
    with pytest.raises(requests.exceptions.ReadTimeout):
        within(0.1, lambda: ended.wait(20))
    assert time.monotonic() - begun < 5
    ended.set()
    assert within(5, lambda: 7) == 7
    with pytest.raises(TimeoutError, match="its own"):
        within(5, lambda: (_ for _ in ()).throw(TimeoutError("its own")))


def test_loopback_is_told_by_the_name_alone() -> None:
    for name in ("localhost", "127.0.0.1", "127.5.5.5:80", "[::1]:5000", "localhost:5000"):
        assert is_loopback(name)
    for name in ("localhost.example.org", "10.0.0.1:5000", "registry:5000", "[fe80::1]", "docker.io"):
        assert not is_loopback(name)
