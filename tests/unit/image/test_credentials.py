"""Logins in the files and helpers of docker and podman."""

from __future__ import annotations

import base64
import json
import os
import re
from pathlib import Path

import pytest

from hpcctr.errors import RegistryFailed
from hpcctr.image import credentials
from hpcctr.image.credentials import find_login


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path


def auth(user: str, password: str = "p") -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def write(path: Path, **content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def helper(home: Path, name: str, script: str) -> None:
    path = home / "bin" / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def user_of(host: str, repository: str = "a/b") -> str | None:
    login = find_login(host, repository)
    return login.user if login else None


def test_nobody_is_logged_in_where_there_is_no_file(home: Path) -> None:
    assert user_of("r") is None


@pytest.mark.parametrize(
    "key", ["r:5000", "https://r:5000", "https://r:5000/v1/", "https://r:5000/v2/", "http://r:5000"]
)
def test_a_login_is_found_under_every_spelling_of_its_registry(home: Path, key: str) -> None:
    write(home / ".docker/config.json", auths={key: auth("u", "a:b\0"), "other": auth("x")})
    login = find_login("r:5000", "app")
    assert login is not None
    assert (login.user, login.password) == ("u", "a:b")
    assert "a:b" not in repr(login)
    assert user_of("r") is None


@pytest.mark.parametrize("key", ["https://index.docker.io/v1/", "docker.io", "index.docker.io", "registry-1.docker.io"])
def test_docker_hub_has_several_names(home: Path, key: str) -> None:
    write(home / ".docker/config.json", auths={key: auth("hub")})
    assert user_of("docker.io", "library/python") == "hub"


def test_the_most_specific_login_counts(home: Path) -> None:
    write(home / ".docker/config.json", auths={"r": auth("all"), "r/team": auth("team"), "r/team/app": auth("app")})
    assert [user_of("r", name) for name in ("x", "team/x", "team/app", "teams/app")] == ["all", "team", "app", "all"]


def test_the_places_have_an_order(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(home / ".config/containers/auth.json", auths={"r": auth("config")})
    assert user_of("r") == "config"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home / "run"))
    write(home / "run/containers/auth.json", auths={"r": auth("podman")})
    assert user_of("r") == "podman"
    write(home / ".docker/config.json", auths={"r": auth("docker")})
    assert user_of("r") == "docker"
    monkeypatch.setenv("DOCKER_CONFIG", str(home / "other"))
    assert user_of("r") == "podman"
    write(home / "other/config.json", auths={"r": auth("other")})
    assert user_of("r") == "other"
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(home / "named.json"))
    write(home / "named.json", auths={"r": auth("named")})
    assert user_of("r") == "named"
    write(home / "named.json", auths={"elsewhere": auth("named")})
    assert user_of("r") == "other"


def test_a_helper_is_asked_for_its_registry(home: Path) -> None:
    helper(
        home,
        "mine",
        'read server; printf \'{"ServerURL": "%s", "Username": "%s", "Secret": "s"}\' "$server" "$1-$server"',
    )
    write(home / ".docker/config.json", auths={"r": {}, "s": auth("plain")}, credHelpers={"r": "mine"})
    assert user_of("r") == "get-r"
    assert user_of("s") == "plain"


def test_a_credentials_store_is_asked_for_what_the_file_has_not(home: Path) -> None:
    helper(home, "store", 'read server; printf \'{"ServerURL": "", "Username": "%s", "Secret": "s"}\' "$server"')
    write(home / ".docker/config.json", auths={"r": {}, "s": auth("plain")}, credsStore="store")
    assert user_of("r") == "r"
    assert user_of("s") == "plain"
    assert user_of("docker.io", "library/x") == "https://index.docker.io/v1/"


def test_a_helper_that_knows_nobody_is_no_error(home: Path) -> None:
    helper(home, "empty", "echo credentials not found in native keychain; exit 1")
    write(home / ".docker/config.json", credsStore="empty")
    assert user_of("r") is None


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo locked >&2; exit 1", "failed: locked"),
        ("echo garbage", "no login"),
        ('echo \'{"Username": "<token>", "Secret": "x"}\'', "identity token"),
        ("exec sleep 60", "does not answer within"),
        (None, "no such file"),
    ],
)
def test_a_helper_that_does_not_help_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, says: str
) -> None:
    monkeypatch.setattr(credentials, "_HELPER_TIMEOUT", 0.5)
    if script is not None:
        helper(home, "bad", script)
    write(home / ".docker/config.json", credsStore="bad")
    with pytest.raises(RegistryFailed, match=re.escape(says)):
        find_login("r", "app")


@pytest.mark.parametrize("name", ["../../bin/sh", "a b", "-x", "a;b"])
def test_a_helpers_name_is_a_name(home: Path, name: str) -> None:
    write(home / ".docker/config.json", credsStore=name)
    with pytest.raises(RegistryFailed, match="no name of a credential helper"):
        find_login("r", "app")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"auths": {"r": {"auth": "?"}}}',
        '{"auths": {"r": {"auth": "dXNlcg=="}}}',
        '{"auths": {"r": {"identitytoken": "x"}}}',
    ],
)
def test_a_broken_file_is_named_and_not_passed_over(home: Path, text: str) -> None:
    (home / ".docker").mkdir()
    (home / ".docker/config.json").write_text(text)
    with pytest.raises(RegistryFailed, match="logging in failed: .*config.json") as caught:
        find_login("r", "app")
    assert "docker login r" in caught.value.hint
