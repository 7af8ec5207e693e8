"""Why a registry did not give what was asked: its answers and the network's errors as :class:`RegistryFailed`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import msgspec
import requests
import urllib3.exceptions

from hpcctr.errors import RegistryFailed, RegistryWantsLogin

#: Bytes of an error document that are read.
WORDS_MAX = 65536

#: What a broken connection looks like, whichever layer noticed.
BROKEN = (urllib3.exceptions.HTTPError, requests.RequestException, ConnectionError, TimeoutError)

_PLAIN_HTTP = '[registry."{}"] plain-http = true in /etc/hpcctr/site.toml'
_CA_FILE = '[registry."{}"] ca-file = "/path/ca.pem" in /etc/hpcctr/site.toml'
_LOGIN = "docker login {0}, or podman login {0}; the credentials are read from ~/.docker/config.json"
_LOGIN_NODE = "compute nodes often have no way out: hpcctr pull it on a login node; or set https_proxy"


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """Who refuses: the registry's name, its host, the proxy between (or empty), and whether a login was sent."""

    registry: str
    host: str
    proxy: str = ""
    logged_in: bool = False


def refused(
    who: Speaker, status: int, reason: str, headers: Mapping[str, str], body: bytes, what: str
) -> RegistryFailed:
    """An answer that is not the document asked for."""
    registry, said = f"registry {who.registry}", words_of(body)
    login = _LOGIN.format(who.registry)
    if status == 401:
        problem = "does not take the credentials for" if who.logged_in else "wants credentials for"
        return RegistryWantsLogin(f"{registry} {problem} {what}, or has no such image{said}", hint=login)
    if status == 403:
        return RegistryFailed(f"{registry} denies {what}{said}", hint=f"ask its owner for access; {login}")
    if status == 404:
        return RegistryFailed(f"{registry} has no {what}{said}", hint="look for a typing error in repository and tag")
    if status == 429:
        remedy = "" if who.logged_in else f"log in, which raises the limit: {login}; or "
        return RegistryFailed(
            f"{registry} limits how often it may be asked{limit_of(headers)}{said}",
            hint=f'{remedy}wait; or let the site name a mirror: [registry."{who.registry}"] mirrors in site.toml',
        )
    return RegistryFailed(f"{registry} answers {what} with status {status} {reason}{said}", hint="try again later")


def unreachable(who: Speaker, error: Exception) -> RegistryFailed:
    """No answer at all."""
    registry, text = f"registry {who.registry}", str(error)
    through = f" through the proxy {who.proxy}" if who.proxy else ""
    if isinstance(error, requests.exceptions.SSLError):
        reason = text.rpartition("[SSL")[2].strip("()' ").rpartition("] ")[2] or text
        return RegistryFailed(
            f"{registry}: the TLS connection failed: {reason[:200]}",
            hint=f"name the registry's CA: {_CA_FILE.format(who.registry)}; or install it on this node; "
            "or allow plain HTTP: " + _PLAIN_HTTP.format(who.registry),
        )
    if isinstance(error, requests.exceptions.ProxyError):
        return RegistryFailed(f"{registry} cannot be reached{through}: {text[-200:]}", hint="is https_proxy right?")
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return RegistryFailed(f"{registry} does not answer{through}: no connection", hint=_LOGIN_NODE)
    if isinstance(error, (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError, TimeoutError)):
        return RegistryFailed(f"{registry} does not answer{through}", hint=f"try again; {_LOGIN_NODE}")
    if "NameResolutionError" in text or "Name or service not known" in text or "name resolution" in text:
        return RegistryFailed(
            f"{registry}: there is no host {who.host.partition(':')[0]}",
            hint=f"look for a typing error; is DNS there? {_LOGIN_NODE}",
        )
    if "refused" in text:
        return RegistryFailed(f"{registry} refuses connections{through}", hint="is it running, and the port right?")
    if "unreachable" in text or "No route" in text:
        return RegistryFailed(f"{registry} cannot be reached{through}: no route", hint=_LOGIN_NODE)
    return RegistryFailed(f"{registry}: the connection broke: {text[:300]}", hint="try again")


def words_of(body: bytes) -> str:
    """What the registry says in its error document, in brackets; empty when it says nothing readable."""
    try:
        errors = msgspec.json.decode(body).get("errors", [])
        words = "; ".join(str(error.get("message") or error.get("code")) for error in errors[:3])
    except Exception:  # noqa: BLE001 - the body of a refusal may be anything
        return ""
    words = "".join(character for character in words if character.isprintable())
    return f" ({words[:300]})" if words else ""


def limit_of(headers: Mapping[str, str]) -> str:
    """What is left of the registry's rate limit, as it says with ``RateLimit-Limit: 100;w=21600`` (Docker Hub's manual
    on pull limits; draft-polli-ratelimit-headers-03); empty when it says nothing."""
    limit, _, window = headers.get("RateLimit-Limit", "").partition(";w=")
    remaining = headers.get("RateLimit-Remaining", "").partition(";")[0]
    text = f": {remaining} of {limit} requests remain" if limit.isdigit() and remaining.isdigit() else ""
    if text and window.isdigit():
        text += f" in {int(window) / 3600:g} h"
    wait = retry_after(headers)
    return f"{text}, it asks to wait {wait:.0f} s" if wait is not None else text


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds the registry asks to wait (RFC 9110, 10.2.3); a date is compared with the registry's own clock."""
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        moment, its_now = parsedate_to_datetime(text), parsedate_to_datetime(headers.get("Date", ""))
        return max(0.0, (moment - its_now).total_seconds())
    except (ValueError, TypeError):
        return None
