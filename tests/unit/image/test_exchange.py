"""What a converter says is taken for what it is, or for nonsense; never for more."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcctr.errors import ConversionFailed, HpcctrError, ImageBroken, StoreUnusable
from hpcctr.image import exchange
from hpcctr.image.exchange import Advance, Failure, Job, Layer, parse_advance, parse_facts, parse_failure
from hpcctr.image.ldsearch import LIBRARIES_MAX, MPI_MAX
from hpcctr.image.record import Changed, ImageFacts, Library, MpiLibrary
from hpcctr.image.treestream import ACCOUNTS_MAX, MergeFacts

FACTS = MergeFacts(changed=Changed(xattrs=3), content_size=7, entries=5, inodes=4, passwd=b"root\0\xff", group=b"")
JOB = Job(layers=2, file_size_max=1 << 40, blobs_size=12)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def test_a_job_arrives_with_its_descriptor(pair: tuple[socket.socket, socket.socket]) -> None:
    read, write = os.pipe()
    exchange.send(pair[0], b"J", JOB, write)
    os.close(write)
    job, descriptor = exchange.receive_with_descriptor(pair[1], b"J", Job)
    assert job == JOB
    assert not os.get_inheritable(descriptor)
    os.write(descriptor, b"x")
    os.close(descriptor)
    assert os.read(read, 9) == b"x"
    os.close(read)


@pytest.mark.parametrize(("kind", "count"), [(b"L", 1), (b"J", 0), (b"J", 2)])
def test_another_frame_or_number_of_descriptors_is_refused(
    pair: tuple[socket.socket, socket.socket], kind: bytes, count: int
) -> None:
    exchange.send(pair[0], kind, JOB, *[0] * count)
    with pytest.raises(ValueError, match="J frame with one descriptor"):
        exchange.receive_with_descriptor(pair[1], b"J", Job)


def test_a_puller_that_is_gone_is_the_end(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].close()
    with pytest.raises(EOFError):
        exchange.receive_with_descriptor(pair[1], b"L", Layer)


def test_an_answer_arrives_in_pieces(pair: tuple[socket.socket, socket.socket]) -> None:
    facts = dataclasses.replace(FACTS, group=b"g" * 50_000)
    exchange.send_facts(pair[0], facts)
    answer = b""
    while (frame := pair[1].recv(exchange.FRAME_MAX)) != b"R":
        assert frame.startswith(b"R")
        answer += frame[1:]
    assert parse_facts(answer) == facts


def test_the_largest_facts_are_no_larger_than_an_answer_may_be() -> None:
    largest = b"\xff" * ACCOUNTS_MAX
    facts = dataclasses.replace(FACTS, passwd=largest, group=largest, content_size=2**48, entries=2**48, inodes=2**48)
    answer = msgspec.json.encode(facts)
    assert len(answer) <= exchange.ANSWER_MAX
    assert parse_facts(answer) == facts


@pytest.mark.parametrize(
    "change",
    [
        {"entries": -1},
        {"inodes": 0},
        {"inodes": 6},
        {"content_size": -1},
        {"content_size": 2**60},
        {"entries": 2**80},
        {"changed": {"xattrs": -1}},
        {"changed": {"xattrs": "many"}},
        {"changed": None},
        {"passwd": "no base64!"},
        {"passwd": "A" * (ACCOUNTS_MAX * 4 // 3 + 8)},
        {"entries": 5.5},
        {"entries": True},
    ],
)
def test_facts_that_cannot_be_are_nonsense(change: dict[str, object]) -> None:
    document = json.loads(msgspec.json.encode(FACTS))
    with pytest.raises(ConversionFailed, match="nonsense"):
        parse_facts(json.dumps({**document, **change}).encode())


@pytest.mark.parametrize("untrusted", [b"", b"{}", b"[]", b"null", b"[" * 100_000, b"\xff", b'{"stage":"read"}'])
def test_what_is_no_document_of_ours_is_nonsense(untrusted: bytes) -> None:
    for parse in (parse_advance, parse_facts):
        with pytest.raises(ConversionFailed, match="nonsense"):
            parse(untrusted)
    assert "nonsense" in parse_failure(untrusted, "/store").message


@pytest.mark.parametrize(
    ("stage", "done", "total"), [("read", -1, 1), ("read", 2, 1), ("write", 0, 2**50), ("sleep", 0, 1)]
)
def test_progress_that_cannot_be_is_nonsense(stage: str, done: int, total: int) -> None:
    with pytest.raises(ConversionFailed, match="nonsense"):
        parse_advance(json.dumps({"stage": stage, "done": done, "total": total}).encode())
    assert parse_advance(msgspec.json.encode(Advance(stage="read", done=1, total=1))).done == 1


def failure(**fields: object) -> HpcctrError:
    words = {"slug": "conversion", "message": "m", **fields}
    return parse_failure(msgspec.json.encode(msgspec.convert(words, Failure)), "/store/tmp")


def test_a_failure_is_an_error_of_images_and_of_nothing_else() -> None:
    assert type(failure(slug="image-broken")) is ImageBroken
    for slug in ("conversion", "policy-denied", "caller-refused", "", "no-such"):
        assert type(failure(slug=slug)) is ConversionFailed


def test_want_of_space_is_explained_by_the_store() -> None:
    for number, words in ((28, "no space left"), (122, "quota")):
        error = failure(errno=number)
        assert isinstance(error, StoreUnusable)
        assert error.message.startswith("/store/tmp: ")
        assert words in error.message
    assert type(failure(errno=13)) is ConversionFailed


def test_words_are_made_fit_for_a_terminal() -> None:
    error = failure(message="\x1b[2J\n\0\u202e" + "x" * 5000, hint="\r")
    assert error.message.startswith("?[2J???x")
    assert len(error.message) <= 1000
    assert error.hint == "?"


_document = st.recursive(
    st.one_of(st.none(), st.integers(), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=200), _document.map(lambda value: json.dumps(value).encode())))
def test_no_bytes_do_more_than_fail(untrusted: bytes) -> None:
    for parse in (parse_advance, parse_facts):
        with pytest.raises(ConversionFailed):
            parse(untrusted)
    assert isinstance(parse_failure(untrusted, "/store"), HpcctrError)


LIBRARY = Library(soname="libdemo.so.1", path="/usr/lib/libdemo.so.1", defines=("DEMO_1.0",))
MPI = MpiLibrary(soname="libmpi.so.12", path="/opt/libmpi.so.12", family="mpich", version="4.0.2", pmi=("pmi1",))
LINKED = ImageFacts(
    libc="glibc", libc_version="2.36", loader="/lib/ld.so", libraries=(LIBRARY,), mpi=(MPI,), pmix="5.0.7"
)


def test_what_was_noted_of_libraries_arrives() -> None:
    facts = dataclasses.replace(FACTS, facts=LINKED)
    assert parse_facts(msgspec.json.encode(facts)) == facts


@pytest.mark.parametrize(
    "change",
    [
        {"libc": "bionic"},
        {"libc_version": "2" * 200},
        {"libc_version": "2\n"},
        {"loader": "lib/ld.so"},
        {"loader": "/lib/../ld.so"},
        {"pmix": "\x1b[31m5"},
        {"libraries": [{"soname": "a/b", "path": "/a"}]},
        {"libraries": [{"soname": "", "path": "/a"}]},
        {"libraries": [{"soname": "s" * 200, "path": "/a"}]},
        {"libraries": [{"soname": "a", "path": "/a//b"}]},
        {"libraries": [{"soname": "a", "path": "/" + "a" * 600}]},
        {"libraries": [{"soname": "a", "path": "/a", "defines": ["A\u202e"]}]},
        {"libraries": [{"soname": "a", "path": "/a", "defines": ["A"] * 201}]},
        {"libraries": [{"soname": "a", "path": "/a"}] * (LIBRARIES_MAX + 1)},
        {"mpi": [msgspec.to_builtins(MPI)] * (MPI_MAX + 1)},
        {"mpi": [{**msgspec.to_builtins(MPI), "family": "lam"}]},
        {"mpi": [{**msgspec.to_builtins(MPI), "pmi": ["pmi3"]}]},
        {"mpi": [{**msgspec.to_builtins(MPI), "pmi": ["pmi1", "pmi1"]}]},
        {"mpi": [{**msgspec.to_builtins(MPI), "version": "4\t"}]},
        {"mpi": [{**msgspec.to_builtins(MPI), "product": "\u001b"}]},
        {"mpi": [{**msgspec.to_builtins(MPI), "path": "relative"}]},
    ],
)
def test_libraries_no_converter_notes_are_nonsense(change: dict[str, object]) -> None:
    answer = msgspec.to_builtins(FACTS) | {"facts": msgspec.to_builtins(LINKED) | change}
    with pytest.raises(ConversionFailed, match="nonsense"):
        parse_facts(json.dumps(answer).encode())
