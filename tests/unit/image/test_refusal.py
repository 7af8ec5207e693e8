"""A registry's refusals in words, with a remedy."""

from __future__ import annotations

import pytest
import requests
import urllib3.exceptions

from hpcctr.image.refusal import Speaker, limit_of, refused, retry_after, unreachable, words_of

WHO = Speaker(registry="r:5000", host="r:5000")


@pytest.mark.parametrize(
    ("status", "body", "says", "hint"),
    [
        (401, b"", "registry r:5000 wants credentials for app", "docker login r:5000"),
        (403, b'{"errors": [{"code": "DENIED", "message": "no access"}]}', "denies app (no access)", "access"),
        (404, b"<html>", "has no app", "typing error"),
        (429, b'{"errors": [{"message": "toomanyrequests"}]}', "limits how often", "mirrors"),
        (500, b"", "answers app with status 500 Why", "later"),
        (503, b'{"errors": "odd"}', "status 503", "later"),
    ],
)
def test_every_refusal_has_its_words(status: int, body: bytes, says: str, hint: str) -> None:
    error = refused(WHO, status, "Why", {}, body, "app")
    assert says in error.message
    assert hint in error.hint


def test_who_is_logged_in_is_not_told_to_log_in() -> None:
    who = Speaker(registry="r", host="r", logged_in=True)
    assert "does not take the credentials" in refused(who, 401, "", {}, b"", "app").message
    assert "log in" not in refused(who, 429, "", {}, b"", "app").hint


@pytest.mark.parametrize(
    ("error", "says", "hint"),
    [
        (requests.exceptions.SSLError("x [SSL: BAD] certificate verify failed"), "TLS", "ca-file"),
        (requests.exceptions.ConnectTimeout(), "no connection", "login node"),
        (requests.exceptions.ReadTimeout(), "does not answer", "again"),
        (TimeoutError(), "does not answer", "again"),
        (requests.exceptions.ProxyError("407"), "cannot be reached through the proxy p:1", "https_proxy"),
        (requests.ConnectionError("Name or service not known"), "no host r", "typing error"),
        (requests.ConnectionError("Connection refused"), "refuses connections", "running"),
        (requests.ConnectionError("Network is unreachable"), "no route", "login node"),
        (requests.ConnectionError("No route to host"), "no route", "login node"),
        (urllib3.exceptions.ProtocolError("reset by peer"), "the connection broke", "again"),
    ],
)
def test_every_silence_has_its_words(error: Exception, says: str, hint: str) -> None:
    failed = unreachable(Speaker(registry="r:5000", host="r:5000", proxy="p:1"), error)
    assert says in failed.message
    assert hint in failed.hint


@pytest.mark.parametrize("body", [b"", b"\xff", b"[]", b'{"errors": 3}', b'{"errors": [3]}', b"[" * 10000])
def test_words_that_are_none_are_left_out(body: bytes) -> None:
    assert words_of(body) == ""


def test_a_registrys_words_are_short_and_printable() -> None:
    said = words_of(b'{"errors": [{"message": "a\\u001b[31mb' + b"c" * 10000 + b'"}]}')
    assert said.startswith(" (a[31mbcc")
    assert len(said) < 400


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-1"}, None),
        # By the registry's own clock, whatever ours is.
        ({"Retry-After": "Wed, 01 Jan 2020 00:00:30 GMT", "Date": "Wed, 01 Jan 2020 00:00:00 GMT"}, 30),
        ({"Retry-After": "Wed, 01 Jan 2020 00:00:00 GMT", "Date": "Wed, 01 Jan 2020 00:00:09 GMT"}, 0),
        ({"Retry-After": "Wed, 01 Jan 2020 00:00:30 GMT"}, None),
    ],
)
def test_the_wait_a_registry_asks_for(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


def test_what_remains_is_told() -> None:
    headers = {"RateLimit-Limit": "200;w=21600", "RateLimit-Remaining": "3;w=21600", "Retry-After": "60"}
    assert limit_of(headers) == ": 3 of 200 requests remain in 6 h, it asks to wait 60 s"
    assert limit_of({"RateLimit-Limit": "evil", "RateLimit-Remaining": "3"}) == ""
