"""A real registry for tests: Debian's docker-registry on a loopback port, with a storage directory of its own.

with Registry.start(tmp_path / "registry") as registry:
    registry.push_image("app", "1.0", busybox())
    f"{registry.address}/app:1.0"                       # what hpcctr is asked to pull
"""

from __future__ import annotations

import base64
import http.client
import json
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.host import Host
from tests.support.oci import DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, Image, descriptor, digest_of
from tests.support.polling import wait_until


@dataclass(kw_only=True)
class Registry:
    """A running registry. `user` and `password` are empty where everybody may read and write."""

    root: Path
    port: int
    process: subprocess.Popen[bytes]
    user: str = ""
    password: str = ""
    host: Host | None = None
    listens_on: str = "127.0.0.1"

    @classmethod
    def start(
        cls,
        root: Path,
        *,
        user: str = "",
        password: str = "",
        certificate: Path | None = None,
        key: Path | None = None,
        host: Host | None = None,
        address: str = "127.0.0.1",
    ) -> Self:
        """Start it and wait until it answers; with `user`, only to those who log in; with `certificate`, over TLS; with
        `host`, there, where nothing can be pushed from here."""
        root.mkdir(parents=True, exist_ok=True)
        for _ in range(5):
            port = _free_port()
            config = {
                "version": 0.1,
                "log": {"level": "warn"},
                "storage": {"filesystem": {"rootdirectory": str(root / "storage")}, "delete": {"enabled": True}},
                "http": {"addr": f"{address}:{port}"},
            }
            if user:
                (root / "htpasswd").write_text(f"{user}:{_bcrypt(password)}\n")
                config["auth"] = {"htpasswd": {"realm": "hpcctr test", "path": str(root / "htpasswd")}}
            if certificate is not None:
                config["http"] = {
                    "addr": f"{address}:{port}",
                    "tls": {"certificate": str(certificate), "key": str(key)},
                }
            # JSON is YAML.
            (root / "config.yml").write_text(json.dumps(config))
            with (root / "log").open("wb") as log:
                command = ["docker-registry", "serve", str(root / "config.yml")]
                process = subprocess.Popen(
                    command if host is None else host.argv(command),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            registry = cls(
                root=root, port=port, process=process, user=user, password=password, host=host, listens_on=address
            )
            wait_until(lambda r=registry: r.process.poll() is not None or r._answers(), what=registry._log)  # type: ignore[misc]
            if process.poll() is None:
                return registry
        raise AssertionError(f"docker-registry does not start: {registry._log()}")

    @property
    def address(self) -> str:
        return f"{self.listens_on}:{self.port}"

    def requests(self, path: str) -> dict[str, int]:
        """What is below a path to how often it was asked for with success, by the registry's own access log."""
        found = re.findall(rf'"GET {re.escape(path)}(\S+) HTTP/[\d.]+" 20[06] ', (self.root / "log").read_text())
        return dict(Counter(found))

    def push_image(self, repository: str, tag: str, image: Image | Sequence[Image]) -> str:
        """Put an image, or an index of several by platform, under a tag. Its digest."""
        images = [image] if isinstance(image, Image) else list(image)
        entries = []
        for one in images:
            manifest, blobs = one.blobs()
            for blob in blobs:
                self.push_blob(repository, blob)
            media_type = DOCKER_MANIFEST if one.docker else OCI_MANIFEST
            self.push_manifest(repository, tag if len(images) == 1 else digest_of(manifest), manifest, media_type)
            entries.append(descriptor(manifest, media_type, platform=one.platform))
        if len(images) == 1:
            return digest_of(manifest)
        index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()
        return self.push_manifest(repository, tag, index, OCI_INDEX)

    def push_blob(self, repository: str, blob: bytes) -> str:
        _, headers = self._request("POST", f"/v2/{repository}/blobs/uploads/", expect=202)
        location = headers["Location"].partition(self.address)[2] or headers["Location"]
        separator = "&" if "?" in location else "?"
        self._request("PUT", f"{location}{separator}digest={digest_of(blob)}", body=blob, expect=201)
        return digest_of(blob)

    def push_manifest(self, repository: str, tag: str, manifest: bytes, media_type: str) -> str:
        self._request("PUT", f"/v2/{repository}/manifests/{tag}", body=manifest, media_type=media_type, expect=201)
        return digest_of(manifest)

    def blob_file(self, digest: str) -> Path:
        """Where the registry keeps a blob: tests damage it there."""
        algorithm, _, hexadecimal = digest.partition(":")
        return self.root / "storage/docker/registry/v2/blobs" / algorithm / hexadecimal[:2] / hexadecimal / "data"

    def docker_config(self) -> str:
        """The content of a ~/.docker/config.json that is logged in here."""
        word = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        return json.dumps({"auths": {self.address: {"auth": word}}})

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=20)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _request(
        self, verb: str, path: str, *, body: bytes = b"", media_type: str = "application/octet-stream", expect: int
    ) -> tuple[bytes, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        headers = {"Content-Type": media_type}
        if self.user:
            headers["Authorization"] = "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        try:
            connection.request(verb, path, body=body, headers=headers)
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        assert response.status == expect, f"{verb} {path}: {response.status} {content!r}"
        return content, response.headers

    def _answers(self) -> bool:
        if self.host is not None:
            code = f"import socket; socket.create_connection(({self.listens_on!r}, {self.port}))"
            return self.host.run([sys.executable, "-c", code], check=False).returncode == 0
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def _log(self) -> str:
        return (self.root / "log").read_text(errors="replace")[-2000:]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _bcrypt(password: str) -> str:
    """docker-registry takes no other hash in htpasswd; libxcrypt's tool of the package whois, or perl's crypt, makes
    it."""
    salt = "$2y$05$" + "abcdefghijklmnopqrstuu"
    made = subprocess.run(
        ["perl", "-e", "print crypt($ARGV[0], $ARGV[1])", password, salt], capture_output=True, text=True, check=True
    ).stdout
    assert made.startswith("$2y$05$"), made
    return made
