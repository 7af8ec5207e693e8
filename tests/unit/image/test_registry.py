"""Images of registries: what is found, how blobs arrive, from which mirror. docker-registry itself is in tests/e2e."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from hpcctr.errors import ImageBroken, NotAnImage, PlatformMissing, RegistryFailed, StoreUnusable
from hpcctr.image import registry as registry_module
from hpcctr.image.platform import of_this_node
from hpcctr.image.reference import ImageRef
from hpcctr.image.registry import RegistrySource
from hpcctr.image.source import LayerBlob
from hpcctr.image.verification import sha256_of
from hpcctr.site import RegistrySettings
from tests.support.answers import Answer, Server, answering
from tests.support.oci import OCI_INDEX, Image, descriptor, digest_of, file, tar

IMAGE = Image(layers=(tar(file("a", b"content" * 1000)),))
MANIFEST, (CONFIG, LAYER) = IMAGE.blobs()
LAYER_PATH = f"/v2/app/blobs/{digest_of(LAYER)}"


def source_of(server: Server, tag: str = ":1", *mirrors: Server) -> RegistrySource:
    settings = RegistrySettings(mirrors=tuple(mirror.address for mirror in mirrors))
    return RegistrySource(ImageRef.parse(f"{server.address}/app{tag}"), {server.address: settings})


def download(source: RegistrySource, path: Path, blob: bytes = LAYER, *, said: bytes | None = None) -> bytes:
    layer = LayerBlob(digest=digest_of(said or blob), size=len(said or blob), diff_id="")
    source.download(layer, str(path), progress=lambda _: None)
    return path.read_bytes()


def ranged(request: BaseHTTPRequestHandler, blob: bytes = LAYER) -> Answer:
    """The whole blob or the range that was asked for."""
    if "Range" not in request.headers:
        return 200, {}, blob
    begin = int(request.headers["Range"].removeprefix("bytes=").removesuffix("-"))
    return 206, {"Content-Range": f"bytes {begin}-{len(blob) - 1}/{len(blob)}"}, blob[begin:]


def cut(blob: bytes, length: int) -> Answer:
    """An answer that ends before its time."""
    return 200, {"Content-Length": str(len(blob))}, blob[:length]


def test_an_image_is_found_and_its_layer_downloaded(server: Server, tmp_path: Path) -> None:
    server.serve_image(IMAGE)
    with source_of(server) as source:
        found = source.locate(of_this_node())
        assert found.digest == sha256_of(MANIFEST)
        # No blob crosses the network to learn which image it is.
        assert not server.asked_for("/blobs/")
        assert source.image(found, of_this_node()).layers[0].digest == digest_of(LAYER)
        assert download(source, tmp_path / "layer") == LAYER
    assert "application/vnd.oci.image.index.v1+json" in server.asked[0][1]["Accept"]


def test_an_image_is_found_by_its_digest_and_through_indexes_in_indexes(server: Server) -> None:
    digest = server.serve_image(IMAGE)
    inner = json.dumps({"schemaVersion": 2, "manifests": [descriptor(MANIFEST, "", platform=IMAGE.platform)]}).encode()
    outer = json.dumps({"schemaVersion": 2, "manifests": [descriptor(inner, OCI_INDEX)]}).encode()
    server.answers[f"/v2/app/manifests/{digest_of(inner)}"] = (200, {}, inner)
    server.answers["/v2/app/manifests/multi"] = (200, {"Content-Type": OCI_INDEX}, outer)
    server.answers[f"/v2/app/blobs/{digest_of(inner)}"] = (200, {}, inner)
    manifest = next(iter(json.loads(inner)["manifests"]))
    assert manifest["digest"] == digest
    server.answers[f"/v2/app/blobs/{digest}"] = (200, {}, MANIFEST)
    for tag in (f"@{digest}", ":multi"):
        with source_of(server, tag) as source:
            assert source.locate(of_this_node()).digest == digest


def test_an_image_for_another_processor_is_refused_once_its_config_is_read(server: Server) -> None:
    other = Image(layers=(), architecture="s390x")
    server.serve_image(other)
    with source_of(server) as source, pytest.raises(PlatformMissing, match="is for linux/s390x"):
        source.image(source.locate(of_this_node()), of_this_node())


def test_a_manifest_that_is_not_the_announced_or_asked_one_is_refused(server: Server) -> None:
    server.answers["/v2/app/manifests/1"] = (200, {"Docker-Content-Digest": "sha256:" + "0" * 64}, MANIFEST)
    with pytest.raises(ImageBroken, match="announces"), source_of(server) as source:
        source.locate(of_this_node())
    wanted = "sha256:" + "1" * 64
    server.answers[f"/v2/app/manifests/{wanted}"] = (200, {}, MANIFEST)
    with pytest.raises(ImageBroken, match="answers"), source_of(server, f"@{wanted}") as source:
        source.locate(of_this_node())


@pytest.mark.parametrize("page", [b"<html>log in here</html>", b"[]", b"{}", b'{"schemaVersion": 1, "fsLayers": []}'])
def test_a_page_that_is_no_manifest_is_refused(server: Server, page: bytes) -> None:
    server.answers["/v2/app/manifests/1"] = (200, {}, page)
    with pytest.raises(NotAnImage), source_of(server) as source:
        source.locate(of_this_node())


# blobs


def test_a_download_that_breaks_is_taken_up_where_it_broke(server: Server, tmp_path: Path) -> None:
    half = len(LAYER) // 2
    broken = iter([cut(LAYER, half)])
    server.answers[LAYER_PATH] = lambda request: next(broken, None) or ranged(request)
    with source_of(server) as source:
        assert download(source, tmp_path / "layer") == LAYER
    assert [headers.get("Range") for headers in server.asked_for(LAYER_PATH)] == [None, f"bytes={half}-"]


def test_a_registry_that_knows_no_ranges_is_asked_for_all_again(server: Server, tmp_path: Path) -> None:
    broken = iter([cut(LAYER, 20)])
    server.answers[LAYER_PATH] = lambda _: next(broken, (200, {}, LAYER))
    with source_of(server) as source:
        assert download(source, tmp_path / "layer") == LAYER


def test_a_range_that_is_another_one_is_not_taken(server: Server, tmp_path: Path) -> None:
    answers = iter([cut(LAYER, 20), (206, {"Content-Range": "bytes 30-40/50"}, b"x" * 11)])
    server.answers[LAYER_PATH] = lambda request: next(answers, None) or ranged(request)
    with source_of(server) as source:
        assert download(source, tmp_path / "layer") == LAYER


def test_pieces_that_do_not_fit_together_are_fetched_again_as_a_whole(server: Server, tmp_path: Path) -> None:
    answers = iter([cut(b"y" * len(LAYER), 20)])
    counted: list[int] = []
    server.answers[LAYER_PATH] = lambda request: next(answers, None) or ranged(request)
    layer = LayerBlob(digest=digest_of(LAYER), size=len(LAYER), diff_id="")
    with source_of(server) as source:
        source.download(layer, str(tmp_path / "layer"), progress=counted.append)
    assert (tmp_path / "layer").read_bytes() == LAYER
    assert sum(counted) == len(LAYER)


def test_a_download_that_breaks_again_and_again_is_given_up(server: Server, tmp_path: Path) -> None:
    server.answers[LAYER_PATH] = cut(LAYER, 0)
    with pytest.raises(RegistryFailed, match="again and again|broke"), source_of(server) as source:
        download(source, tmp_path / "layer")
    assert len(server.asked_for(LAYER_PATH)) == 5


def test_a_line_that_breaks_often_is_borne_while_there_is_progress(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "_PROGRESS", 10)
    step = max(len(LAYER) // 12, 10)

    def serve(request: BaseHTTPRequestHandler) -> Answer:
        status, headers, body = ranged(request)
        return status, {**headers, "Content-Length": str(len(body))}, body[:step]

    server.answers[LAYER_PATH] = serve
    with source_of(server) as source:
        assert download(source, tmp_path / "layer") == LAYER
    assert len(server.asked_for(LAYER_PATH)) >= 12


def test_a_server_that_only_keeps_the_line_busy_is_left(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "_PACE", (1 << 20, 0.2))
    ended = threading.Event()

    def drip(request: BaseHTTPRequestHandler) -> Answer:
        request.send_response(200)
        request.send_header("Content-Length", str(len(LAYER)))
        request.end_headers()
        while not ended.wait(0.05):
            request.wfile.write(b"x")
        return 200, {}, b""

    server.answers[LAYER_PATH] = drip
    try:
        with pytest.raises((RegistryFailed, ImageBroken)), source_of(server) as source:
            download(source, tmp_path / "layer")
    finally:
        ended.set()


def test_a_blob_of_another_content_or_size_is_refused(server: Server, tmp_path: Path) -> None:
    for number, wrong in enumerate((LAYER[:-1] + b"X", LAYER + b"more")):
        server.answers[LAYER_PATH] = (200, {}, wrong)
        with pytest.raises(ImageBroken), source_of(server) as source:
            download(source, tmp_path / str(number), wrong, said=LAYER)


def test_a_download_ends_when_it_is_told_to(server: Server, tmp_path: Path) -> None:
    begun, ended = threading.Event(), threading.Event()

    def stall(request: BaseHTTPRequestHandler) -> Answer:
        request.send_response(200)
        request.send_header("Content-Length", str(len(LAYER)))
        request.end_headers()
        request.wfile.write(LAYER[:10])
        begun.set()
        ended.wait(20)
        return 200, {}, b""

    server.answers[LAYER_PATH] = stall
    with source_of(server) as source:
        thread = threading.Thread(target=lambda: download(source, tmp_path / "layer"))
        thread.start()
        assert begun.wait(20)
        source.abort()
        thread.join(20)
        assert not thread.is_alive()
        assert not ended.is_set()
    ended.set()
    assert (tmp_path / "layer").stat().st_size < len(LAYER)


def test_a_place_that_cannot_be_written_is_named(server: Server, tmp_path: Path) -> None:
    server.serve_image(IMAGE)
    with pytest.raises(StoreUnusable, match="no such file"), source_of(server) as source:
        download(source, tmp_path / "none/layer")


# mirrors


def test_a_mirror_is_asked_first_and_the_registry_not_at_all(server: Server, tmp_path: Path) -> None:
    with answering() as mirror:
        digest = mirror.serve_image(IMAGE)
        with source_of(server, ":1", mirror) as source:
            found = source.locate(of_this_node())
            assert found.digest == digest
            source.image(found, of_this_node())
            assert download(source, tmp_path / "layer") == LAYER
    assert server.asked == []


def test_a_mirror_may_keep_a_registry_under_a_path(server: Server) -> None:
    digest = server.serve_image(IMAGE, "proxied/hub/library/app")
    ref = ImageRef.parse("app:1")
    settings = {"docker.io": RegistrySettings(mirrors=(f"{server.address}/proxied/hub",))}
    with RegistrySource(ref, settings) as source:
        assert source.locate(of_this_node()).digest == digest


@pytest.mark.parametrize(
    "trouble", ["gone", "lacks the blob", "wrong blob", "half a blob", "refuses", "wrong manifest"]
)
def test_what_a_mirror_has_not_or_has_wrong_comes_from_the_registry(
    server: Server, tmp_path: Path, trouble: str
) -> None:
    digest = server.serve_image(IMAGE)
    with answering() as mirror:
        mirror.serve_image(IMAGE)
        if trouble == "lacks the blob":
            del mirror.answers[LAYER_PATH]
        elif trouble == "wrong blob":
            mirror.answers[LAYER_PATH] = (200, {}, b"x" * len(LAYER))
        elif trouble == "half a blob":
            halves = iter([cut(b"y" * len(LAYER), 10)])
            mirror.answers[LAYER_PATH] = lambda _: next(halves, (500, {}, b""))
        elif trouble == "refuses":
            mirror.answers = dict.fromkeys(mirror.answers, (403, {}, b"{}"))
        elif trouble == "wrong manifest":
            mirror.answers[f"/v2/app/manifests/{digest}"] = (200, {}, CONFIG)
        server.answers[LAYER_PATH] = ranged
        tag = f"@{digest}" if trouble == "wrong manifest" else ":1"
        source = source_of(server, tag, mirror)
        if trouble != "gone":
            assert source.locate(of_this_node()).digest == digest
            assert download(source, tmp_path / "layer") == LAYER
    if trouble == "gone":
        assert source.locate(of_this_node()).digest == digest
        assert download(source, tmp_path / "layer") == LAYER
    assert server.asked


def test_when_nobody_has_it_everybodys_reason_is_told(server: Server) -> None:
    with answering() as mirror, pytest.raises(RegistryFailed) as caught, source_of(server, ":1", mirror) as source:
        source.locate(of_this_node())
    assert f"registry {server.address} has no" in str(caught.value)
    assert f"mirror {mirror.address} has no" in str(caught.value)
