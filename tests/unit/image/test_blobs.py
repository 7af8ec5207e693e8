"""Blobs on their way: in parallel, kept finished, never half."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcctr.errors import RegistryFailed, StoreUnusable
from hpcctr.image.blobs import directory_of, downloaded, drop
from hpcctr.image.source import LayerBlob
from hpcctr.image.verification import sha256_of

CONTENTS = [f"layer {number}".encode() * 1000 for number in range(6)]
LAYERS = tuple(LayerBlob(digest=sha256_of(content), size=len(content), diff_id="") for content in CONTENTS)


class Source:
    """Gives blobs at once; what `hooks` says happens before."""

    def __init__(self, hooks: dict[str, Callable[[], object]] | None = None) -> None:
        self.hooks = hooks or {}
        self.asked: list[str] = []
        self.aborted = threading.Event()

    def download(self, layer: LayerBlob, path: str, *, progress: Callable[[int], None]) -> None:
        self.asked.append(layer.digest)
        with open(path, "xb") as file:
            self.hooks.get(layer.digest, lambda: None)()
            file.write(CONTENTS[[one.digest for one in LAYERS].index(layer.digest)])
        progress(layer.size)

    def abort(self) -> None:
        self.aborted.set()


@pytest.fixture
def directory(tmp_path: Path) -> str:
    return directory_of(str(tmp_path), "sha256:" + "a" * 64)


def read(
    source: Source,
    directory: str,
    layers: tuple[LayerBlob, ...] = LAYERS,
    count: Callable[[int], None] = lambda _: None,
) -> list[bytes]:
    with downloaded(source, layers, directory, "token", count) as open_blob:
        contents = []
        for layer in layers:
            blob = open_blob(layer)
            contents.append(blob.read(1 << 20))
            blob.close()
        return contents


def test_every_blob_arrives_once_and_is_counted(directory: str) -> None:
    source, counted = Source(), list[int]()
    assert read(source, directory, (*LAYERS, LAYERS[0]), counted.append) == [*CONTENTS, CONTENTS[0]]
    assert sorted(source.asked) == sorted(layer.digest for layer in LAYERS)
    assert sum(counted) == sum(layer.size for layer in LAYERS)
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
    drop(directory)
    assert not os.path.exists(directory)
    drop(directory)


def test_what_a_predecessor_finished_is_used_again_unless_it_is_damaged(directory: str) -> None:
    read(Source(), directory)
    damaged = f"{directory}/{LAYERS[2].digest.replace(':', '-')}"
    Path(damaged).write_bytes(b"x" * LAYERS[2].size)
    source = Source()
    assert read(source, directory) == CONTENTS
    assert source.asked == [LAYERS[2].digest]


def test_a_layer_opens_while_others_are_on_their_way(directory: str) -> None:
    opened = threading.Event()
    source = Source({LAYERS[1].digest: lambda: opened.wait(20)})
    with downloaded(source, LAYERS, directory, "token", lambda _: None) as open_blob:
        open_blob(LAYERS[0]).close()
        open_blob(LAYERS[5]).close()
        opened.set()
        open_blob(LAYERS[1]).close()


def test_four_at_once(directory: str) -> None:
    together = threading.Barrier(4)
    assert read(Source({layer.digest: lambda: together.wait(20) for layer in LAYERS[:4]}), directory) == CONTENTS


def test_a_failure_is_raised_where_the_layer_is_opened_and_leaves_what_was_finished(directory: str) -> None:
    def fail() -> None:
        raise RegistryFailed("broken")

    with pytest.raises(RegistryFailed, match="broken"):
        read(Source({LAYERS[5].digest: fail}), directory)
    assert len(os.listdir(directory)) == 5
    assert not [name for name in os.listdir(directory) if name.endswith(".part")]


def test_an_interrupted_download_goes_at_once_and_leaves_nothing_half(directory: str) -> None:
    source = Source()
    source.hooks = {layer.digest: lambda: source.aborted.wait(20) for layer in LAYERS[1:]}
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), downloaded(source, LAYERS, directory, "t", lambda _: None) as open_blob:
        open_blob(LAYERS[0]).close()
        raise KeyboardInterrupt
    assert time.monotonic() - begun < 10
    assert os.listdir(directory) == [LAYERS[0].digest.replace(":", "-")]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "blobs").write_text("")
    with pytest.raises(StoreUnusable, match="blobs"):
        read(Source(), directory_of(str(tmp_path), "sha256:x"))
