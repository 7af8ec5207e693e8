"""Logins for registries, as docker and podman keep them: config files, and credential helpers.

Formats: docker's ``config.json`` (``auths``, ``credHelpers``, ``credsStore``), containers-auth.json(5), and the
protocol of ``docker-credential-NAME get``. The files are read here and not by ``oras``, which takes several of them in
no certain order and waits for a helper without end."""

from __future__ import annotations

import base64
import binascii
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from hpcctr.errors import RegistryFailed

#: What docker and podman call docker.io; the first is the key docker login writes, and asks a helper for.
_DOCKER_HUB_KEYS = ("index.docker.io", "docker.io", "registry-1.docker.io")
_DOCKER_HUB_SERVER = "https://index.docker.io/v1/"
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
#: Seconds for a helper: some ask a service elsewhere.
_HELPER_TIMEOUT = 30
#: The user name of a login that is an OAuth2 refresh token (docker-credential-helpers).
_TOKEN_USER = "<token>"  # noqa: S105 - a marker, no secret
#: How a helper says that it has no such login (docker-credential-helpers, ``credentials.errors``).
_NOT_FOUND = "credentials not found"


@dataclass(frozen=True, kw_only=True)
class Login:
    """A user name and password, and where they come from."""

    user: str
    password: str
    origin: str

    def __repr__(self) -> str:
        return f"Login(user={self.user!r}, origin={self.origin!r})"


class _Auth(msgspec.Struct, frozen=True, rename="lower"):
    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""


class _Config(msgspec.Struct, frozen=True, rename="camel"):
    auths: dict[str, _Auth] | None = None
    cred_helpers: dict[str, str] | None = None
    creds_store: str = ""


class _FromHelper(msgspec.Struct, frozen=True, rename="pascal"):
    username: str
    secret: str


def find_login(host: str, repository: str) -> Login | None:
    """The login for a repository of a registry, the most specific one of the first file that has any.

    Raises :class:`RegistryFailed` for a file or helper that is broken: without it a private image would only be
    "unknown"."""
    for path in _files():
        login = _login_of(path, host, repository)
        if login is not None:
            return login
    return None


def _files() -> Iterator[str]:
    """Where docker and podman keep logins, the one that was named explicitly first."""
    environment = os.environ  # noqa: TID251 - the places are defined by variables
    home = os.path.expanduser("~")
    if path := environment.get("REGISTRY_AUTH_FILE"):
        yield path
    yield os.path.join(environment.get("DOCKER_CONFIG") or os.path.join(home, ".docker"), "config.json")
    if directory := environment.get("XDG_RUNTIME_DIR"):
        yield os.path.join(directory, "containers/auth.json")
    yield os.path.join(environment.get("XDG_CONFIG_HOME") or os.path.join(home, ".config"), "containers/auth.json")


def _login_of(path: str, host: str, repository: str) -> Login | None:
    try:
        with open(path, "rb") as file:
            config = msgspec.json.decode(file.read(), type=_Config)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if isinstance(error, PermissionError):
            # Another account's, for instance under sudo.
            return None
        raise _broken(path, host, error.strerror or str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _broken(path, host, str(error)) from None
    keys = _keys(host, repository)
    helpers = {_normal(key): name for key, name in (config.cred_helpers or {}).items()}
    for key in keys:
        if key in helpers:
            return _ask(helpers[key], host, path)
    auths = {_normal(key): auth for key, auth in (config.auths or {}).items()}
    for key in keys:
        if key in auths and (login := _decoded(auths[key], host, path)):
            return login
    return _ask(config.creds_store, host, path) if config.creds_store else None


def _keys(host: str, repository: str) -> list[str]:
    """``host/a/b``, ``host/a``, ``host``: what a login may be for, most specific first (containers-auth.json(5))."""
    parts = repository.split("/")
    hosts = _DOCKER_HUB_KEYS if host in _DOCKER_HUB_KEYS else (host,)
    paths = ["/".join(parts[:length]) for length in range(len(parts), -1, -1)]
    return [f"{name}/{path}" if path else name for path in paths for name in hosts]


def _normal(key: str) -> str:
    """A key of a config file as :func:`_keys` writes it: docker keeps some as URLs."""
    bare = key.removeprefix("https://").removeprefix("http://").rstrip("/")
    return bare.removesuffix("/v1").removesuffix("/v2").rstrip("/") if key.startswith("http") else bare


def _decoded(auth: _Auth, host: str, path: str) -> Login | None:
    if auth.identitytoken:
        raise _identity_token(host, path)
    if auth.auth:
        try:
            user, colon, password = base64.b64decode(auth.auth, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError) as error:
            raise _broken(path, host, f"the login of {host}: {error}") from None
        if not colon:
            raise _broken(path, host, f"the login of {host} has no password")
        # docker pads what it writes with zeros.
        return Login(user=user, password=password.rstrip("\0"), origin=path)
    return Login(user=auth.username, password=auth.password, origin=path) if auth.username else None


def _ask(name: str, host: str, path: str) -> Login | None:
    program = f"docker-credential-{name}"
    if not _HELPER_NAME.fullmatch(name):
        raise _broken(path, host, f"{name[:100]!r} is no name of a credential helper")
    server = _DOCKER_HUB_SERVER if host in _DOCKER_HUB_KEYS else host
    try:
        run = subprocess.run(
            [program, "get"], input=server.encode(), capture_output=True, timeout=_HELPER_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise _broken(path, host, f"{program} does not answer within {_HELPER_TIMEOUT} s") from None
    except OSError as error:
        raise _broken(path, host, f"{program}: {(error.strerror or str(error)).lower()}") from None
    if run.returncode != 0:
        said = (run.stdout + run.stderr).decode(errors="replace").strip()
        if _NOT_FOUND in said.lower():
            return None
        raise _broken(path, host, f"{program} failed: {_printable(said) or f'status {run.returncode}'}")
    try:
        answer = msgspec.json.decode(run.stdout, type=_FromHelper)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise _broken(path, host, f"{program} answers with something that is no login") from None
    if answer.username == _TOKEN_USER:
        raise _identity_token(host, path)
    return Login(user=answer.username, password=answer.secret, origin=program)


def _broken(path: str, host: str, reason: str) -> RegistryFailed:
    return RegistryFailed(
        f"registry {host}: logging in failed: {path}: {reason}",
        hint=f"repair or remove {path}; docker login {host}, or podman login {host}, writes it anew",
    )


def _identity_token(host: str, path: str) -> RegistryFailed:
    return RegistryFailed(
        f"registry {host}: logging in failed: the login in {path} is an identity token, which hpcctr cannot use",
        hint=f"docker login {host} with a user name and a password or access token",
    )


def _printable(text: str) -> str:
    return "".join(character for character in text if character.isprintable())[:300]
