"""What the puller makes of a converter: of an honest one an image file, of any other an error and nothing left.

What the confinement holds back is shown in tests/attacks/test_converter.py."""

from __future__ import annotations

import gzip
import io
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from hpcctr.errors import ConversionFailed, HpcctrError, ImageBroken, RegistryFailed, StoreUnusable
from hpcctr.image import conversion, exchange
from hpcctr.image.archive import Slice, open_regular
from hpcctr.image.compression import Blob
from hpcctr.image.conversion import Converter, convert, place_of
from hpcctr.image.convert import ImageFile
from hpcctr.image.exchange import Job, Layer
from hpcctr.image.output import Output
from hpcctr.image.progress import Progress, ProgressReport
from hpcctr.image.record import ImageConfig, Platform
from hpcctr.image.source import LayerBlob, SourceImage
from hpcctr.image.treestream import MergeFacts
from tests.support.oci import digest_of, file, tar
from tests.support.polling import wait_until

LAYERS = (tar(file("etc/passwd", b"root\n"), file("a", b"1" * 5000)), tar(file("b", b"2")))
QUIET = ProgressReport(lambda _: None)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    (tmp_path / "workspace").mkdir(mode=0o700)
    return tmp_path / "workspace"


class Blobs:
    """An image whose layers lie in files."""

    def __init__(self, place: Path, *layers: bytes) -> None:
        self.paths: dict[str, Path] = {}
        described = []
        for number, layer in enumerate(layers):
            blob = gzip.compress(layer, mtime=0)
            path = place / f"blob{number}"
            path.write_bytes(blob)
            self.paths[digest_of(blob)] = path
            described.append(LayerBlob(digest=digest_of(blob), size=len(blob), diff_id=digest_of(layer)))
        self.image = SourceImage(
            digest=digest_of(b""),
            platform=Platform(os="linux", architecture="amd64"),
            config=ImageConfig(),
            layers=tuple(described),
        )

    def open(self, layer: LayerBlob) -> Blob:
        return io.FileIO(self.paths[layer.digest])


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path, *LAYERS)


Behaviour = Callable[[socket.socket, int], object]


@pytest.fixture
def played(workspace: Path, blobs: Blobs) -> Iterator[Callable[..., ImageFile]]:
    """Converts with a converter that behaves as it is told."""
    threads: list[threading.Thread] = []

    def play(behave: Behaviour, *, open_blob: Callable[[LayerBlob], Blob] = blobs.open, **limits: float) -> ImageFile:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def run() -> None:
            with theirs:
                job, output = exchange.receive_with_descriptor(theirs, b"J", Job)
                assert job.layers == 2
                try:
                    behave(theirs, output)
                except (OSError, EOFError):
                    # The puller has had enough.
                    return
                finally:
                    os.close(output)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        with Converter.of(ours) as converter, Output(str(workspace)) as output:
            facts = converter.run(blobs.image, open_blob, output, QUIET, **limits)  # type: ignore[arg-type]
            converter.end()
            return output.keep(facts.inodes)

    yield play
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert not os.listdir(workspace)


def take_layers(peer: socket.socket) -> None:
    for _ in range(2):
        os.close(exchange.receive_with_descriptor(peer, b"L", Layer)[1])


def answer(peer: socket.socket, content: bytes) -> None:
    for at in range(0, len(content), 60_000):
        exchange.send(peer, b"R", content[at : at + 60_000])
    exchange.send(peer, b"R", b"")


# an honest one


def test_an_image_is_converted_with_its_facts_and_progress(workspace: Path, blobs: Blobs) -> None:
    seen: list[Progress] = []
    made, facts = convert(blobs.image, blobs.open, str(workspace), ProgressReport(seen.append))
    assert (facts.entries, facts.inodes, facts.content_size, facts.passwd) == (5, 5, 5006, b"root\n")
    assert made.digest == digest_of(Path(made.path).read_bytes())
    stages = [step.stage for step in seen]
    assert stages == sorted(stages, key=["read", "write"].index)
    assert (seen[-1].stage, seen[-1].done) == ("write", 5006)
    assert os.listdir(workspace) == ["root.squashfs"]


def test_the_first_layer_is_given_before_the_second_is_there(played: Callable[..., ImageFile], blobs: Blobs) -> None:
    first_is_given = threading.Event()

    def open_blob(layer: LayerBlob) -> Blob:
        if layer is blobs.image.layers[1]:
            assert first_is_given.wait(20)
        return blobs.open(layer)

    def take(peer: socket.socket, output: int) -> None:
        os.close(exchange.receive_with_descriptor(peer, b"L", Layer)[1])
        first_is_given.set()
        os.close(exchange.receive_with_descriptor(peer, b"L", Layer)[1])
        exchange.send(peer, b"E", exchange.Failure(slug="conversion", message="got both"))

    with pytest.raises(ConversionFailed, match="got both"):
        played(take, open_blob=open_blob)


def test_one_layer_that_lies_within_another_file_is_enough(tmp_path: Path, workspace: Path, blobs: Blobs) -> None:
    archive = tmp_path / "archive"
    archive.write_bytes(b"".join(path.read_bytes().join([b"#" * 777, b"#" * 99]) for path in blobs.paths.values()))
    places = {}
    at = 0
    for layer in blobs.image.layers:
        places[layer.digest] = at + 777
        at += 777 + layer.size + 99

    def open_blob(layer: LayerBlob) -> Blob:
        whole = open_regular(str(archive))
        assert whole is not None
        return io.BufferedReader(Slice(whole, places[layer.digest], layer.size))

    assert convert(blobs.image, open_blob, str(workspace), QUIET)[1].entries == 5


def test_two_conversions_make_the_same_file(tmp_path: Path, blobs: Blobs) -> None:
    digests = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir(mode=0o700)
        digests.add(convert(blobs.image, blobs.open, str(tmp_path / name), QUIET)[0].digest)
    assert len(digests) == 1


def test_no_thread_process_or_descriptor_is_left(workspace: Path, blobs: Blobs) -> None:
    def left() -> tuple[int, int, str]:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
        return len(os.listdir("/proc/self/fd")), threading.active_count(), children

    before = left()
    convert(blobs.image, blobs.open, str(workspace), QUIET)
    assert left() == before


# layers that are not what they should be


def test_a_wrong_digest_is_named_whatever_the_converter_says(played: Callable[..., ImageFile], blobs: Blobs) -> None:
    path = next(iter(blobs.paths.values()))
    path.write_bytes(path.read_bytes()[:-1] + b"!")

    def say_something_else(peer: socket.socket, output: int) -> None:
        take_layers(peer)
        exchange.send(peer, b"E", exchange.Failure(slug="conversion", message="all is lost"))

    with pytest.raises(ImageBroken, match="layer 1 has the digest"):
        played(say_something_else)


def test_a_wrong_digest_is_named_though_the_converter_is_content(
    played: Callable[..., ImageFile], blobs: Blobs
) -> None:
    list(blobs.paths.values())[1].write_bytes(bytes(blobs.image.layers[1].size))

    def be_content(peer: socket.socket, output: int) -> None:
        take_layers(peer)
        answer(peer, json.dumps(HONEST).encode())

    with pytest.raises(ImageBroken, match="layer 2 has the digest"):
        played(be_content)


@pytest.mark.parametrize("more", [b"!", None])
def test_a_layer_of_another_size_is_never_given_away(
    played: Callable[..., ImageFile], blobs: Blobs, more: bytes | None
) -> None:
    path = next(iter(blobs.paths.values()))
    path.write_bytes(path.read_bytes() + more if more else path.read_bytes()[:-1])
    got: list[bytes] = []
    with pytest.raises(ImageBroken, match="layer 1 has .* bytes, its manifest promises"):
        played(lambda peer, _: got.append(peer.recv(9)))
    assert wait_until(lambda: got, what="the end at the other side") == [b""]


@pytest.mark.parametrize("error", [RegistryFailed("gone"), CancelledError(), KeyboardInterrupt()])
def test_what_keeps_a_layer_from_coming_is_raised(
    played: Callable[..., ImageFile], blobs: Blobs, error: BaseException
) -> None:
    def open_blob(layer: LayerBlob) -> Blob:
        if layer is blobs.image.layers[1]:
            raise error
        return blobs.open(layer)

    with pytest.raises(type(error)):
        played(lambda peer, _: take_layers(peer), open_blob=open_blob)


def test_only_a_read_only_file_is_a_layer(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        place_of(io.BytesIO(b"x"))
    with (tmp_path / "f").open("wb+", buffering=0) as writable, pytest.raises(ValueError, match="writing"):
        place_of(writable)


# a converter that lies

HONEST = {"changed": {}, "content_size": 1, "entries": 3, "inodes": 3, "passwd": "", "group": ""}


def nonsense_frame(peer: socket.socket, output: int) -> None:
    peer.send(b"\xff\xfe")


def unknown_kind(peer: socket.socket, output: int) -> None:
    peer.send(b"X{}")


def giant_answer(peer: socket.socket, output: int) -> None:
    take_layers(peer)
    while True:
        exchange.send(peer, b"R", b"[" * 60_000)


def flood(peer: socket.socket, output: int) -> None:
    while True:
        exchange.send(peer, b"P", b'{"stage":"read","done":1,"total":1}')


def progress_in_the_answer(peer: socket.socket, output: int) -> None:
    exchange.send(peer, b"R", b"{")
    exchange.send(peer, b"P", b'{"stage":"read","done":1,"total":1}')


def answer_before_the_layers(peer: socket.socket, output: int) -> None:
    answer(peer, json.dumps(HONEST).encode())


def huge_packet(peer: socket.socket, output: int) -> None:
    peer.send(b"R" + b"1" * 150_000)
    exchange.send(peer, b"R", b"")


@pytest.mark.parametrize(
    "lie",
    [nonsense_frame, unknown_kind, giant_answer, flood, progress_in_the_answer, answer_before_the_layers, huge_packet],
)
def test_lies_are_nonsense(
    played: Callable[..., ImageFile], blobs: Blobs, lie: Behaviour, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "_FRAMES_MAX", 2000)
    never = threading.Event()

    def open_blob(layer: LayerBlob) -> Blob:
        # The layers do not all come before the lie is told.
        if layer is blobs.image.layers[1] and lie is not giant_answer:
            never.wait(1)
        return blobs.open(layer)

    with pytest.raises(ConversionFailed, match="nonsense"):
        played(lie, open_blob=open_blob)


def test_facts_without_a_file_are_not_believed(played: Callable[..., ImageFile]) -> None:
    def claim(peer: socket.socket, output: int) -> None:
        take_layers(peer)
        answer(peer, json.dumps(HONEST).encode())

    with pytest.raises(ConversionFailed, match="no zstd squashfs"):
        played(claim)


def test_descriptors_it_sends_are_not_taken(played: Callable[..., ImageFile]) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    counted: list[int] = []

    def send_many(peer: socket.socket, output: int) -> None:
        take_layers(peer)
        with open("/dev/null") as null:
            before = count()
            for _ in range(50):
                exchange.send(peer, b"P", b'{"stage":"read","done":1,"total":1}', *[null.fileno()] * 10)
            counted.append(count() - before)

    with pytest.raises(ConversionFailed, match="without an answer"):
        played(send_many)
    assert counted[0] <= 0


def test_silence_is_ended(played: Callable[..., ImageFile]) -> None:
    def sleep(peer: socket.socket, output: int) -> None:
        take_layers(peer)
        assert peer.recv(1) == b""

    with pytest.raises(ConversionFailed, match="no progress"):
        played(sleep, silence_max=0.3)


def test_progress_without_end_is_ended(played: Callable[..., ImageFile]) -> None:
    def dawdle(peer: socket.socket, output: int) -> None:
        take_layers(peer)
        while True:
            exchange.send(peer, b"P", b'{"stage":"write","done":1,"total":100}')
            time.sleep(0.01)

    with pytest.raises(ConversionFailed, match="did not finish"):
        played(dawdle, duration_max=0.5)


def test_waiting_for_a_layer_is_no_silence(workspace: Path, blobs: Blobs) -> None:
    def open_blob(layer: LayerBlob) -> Blob:
        if layer is blobs.image.layers[1]:
            time.sleep(1.2)
        return blobs.open(layer)

    with Converter.start() as converter, Output(str(workspace)) as output:
        assert converter.run(blobs.image, open_blob, output, QUIET, silence_max=1.0).entries == 5


def test_a_file_that_grows_too_large_is_ended(played: Callable[..., ImageFile]) -> None:
    def grow(peer: socket.socket, output: int) -> None:
        take_layers(peer)
        os.ftruncate(output, 1 << 21)
        assert peer.recv(1) == b""

    with pytest.raises(ConversionFailed, match="larger than 1048576 bytes"):
        played(grow, file_size_max=1 << 20)


def test_one_that_stays_after_its_answer_is_not_believed(
    played: Callable[..., ImageFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "_END_MAX", 0.3)
    released = threading.Event()

    def stay(peer: socket.socket, output: int) -> None:
        take_layers(peer)
        answer(peer, json.dumps(HONEST).encode())
        released.wait(5)

    with pytest.raises(ConversionFailed, match="does not end"):
        played(stay)
    released.set()


def end_at_once(peer: socket.socket, output: int) -> None:
    return


def end_in_the_answer(peer: socket.socket, output: int) -> None:
    take_layers(peer)
    exchange.send(peer, b"R", b"{")


@pytest.mark.parametrize("behave", [end_at_once, end_in_the_answer])
def test_one_that_ends_is_named(played: Callable[..., ImageFile], behave: Behaviour) -> None:
    with pytest.raises(ConversionFailed, match="ended without an answer"):
        played(behave)


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        ({"slug": "image-broken", "message": "m"}, ImageBroken),
        ({"slug": "conversion", "message": "m"}, ConversionFailed),
        ({"slug": "policy-denied", "message": "m"}, ConversionFailed),
        ({"slug": "conversion", "message": "m", "errno": 28}, StoreUnusable),
    ],
)
def test_its_failure_is_raised(
    played: Callable[..., ImageFile], failure: dict[str, object], error: type[HpcctrError]
) -> None:
    with pytest.raises(error):
        played(lambda peer, _: exchange.send(peer, b"E", json.dumps(failure).encode()))


def test_facts_are_those_of_the_file(played: Callable[..., ImageFile], workspace: Path, blobs: Blobs) -> None:
    made, facts = convert(blobs.image, blobs.open, str(workspace), QUIET)
    content = Path(made.path).read_bytes()
    os.unlink(made.path)

    def count_wrong(peer: socket.socket, output: int) -> None:
        take_layers(peer)
        os.pwrite(output, content, 0)
        answer(peer, json.dumps(HONEST).encode())

    assert isinstance(facts, MergeFacts)
    with pytest.raises(ConversionFailed, match="has 5 inodes, the image 3"):
        played(count_wrong)
