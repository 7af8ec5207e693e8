"""What the puller and the converter say to each other: frames on a SOCK_SEQPACKET socket.

A frame is one byte for its kind and a JSON document. Puller to converter, in this order::

    J  Job            with a descriptor of the output file, read and write
    L  Layer          with a descriptor of a file its blob lies in, read only; one for each layer, lowest first,
                      as they become complete

Converter to puller::

    P  Advance        any number of times
    R  bytes          pieces of the answer, MergeFacts, then an empty one; or
    E  Failure        the end

The converter has parsed hostile input: whatever it says is ``untrusted_`` until :func:`parse_advance`,
:func:`parse_facts` or :func:`parse_failure` has accepted it. Descriptors it sends are closed by the kernel, as nothing
here asks for any."""

from __future__ import annotations

import array
import errno
import os
import socket
from typing import TypeVar

import msgspec

from hpcctr.errors import ConversionFailed, HpcctrError, ImageBroken
from hpcctr.image.imagefile import store_unusable
from hpcctr.image.ldsearch import LIBRARIES_MAX, MPI_MAX, TEXT_MAX
from hpcctr.image.libraryfile import DEFINES_MAX, is_path, is_word
from hpcctr.image.progress import Stage
from hpcctr.image.record import ImageFacts
from hpcctr.image.treestream import ACCOUNTS_MAX, MergeFacts

T = TypeVar("T")

#: Bytes of a frame; a socket takes as much at once whatever its buffers are.
FRAME_MAX = 1 << 16
#: Bytes of an answer: passwd and group in base64, libraries, and the rest.
ANSWER_MAX = 2 * (ACCOUNTS_MAX * 4 // 3 + 4) + 2 * TEXT_MAX + (1 << 17)
#: Larger than any number of bytes or entries an image has.
_NUMBER_MAX = 1 << 48
_PIECE = 1 << 15
_TEXT_MAX = 1000
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be made, beside the output file itself."""

    layers: int
    #: Bytes the image file may have.
    file_size_max: int
    #: Of all layers' blobs together, bytes; 0 when their sizes are not known. Only for progress.
    blobs_size: int


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """Where a layer's blob lies in the file that comes with it, and what it must be."""

    offset: int
    size: int
    #: Of the blob; empty when the source has none.
    digest: str
    #: Of the uncompressed tar stream.
    diff_id: str


class Advance(msgspec.Struct, frozen=True, kw_only=True):
    """How far the converter is."""

    stage: Stage
    done: int
    total: int


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why there is no image file. ``errno`` when it is about space, which only the puller can explain."""

    slug: str
    message: str
    hint: str = ""
    errno: int = 0


def send(peer: socket.socket, kind: bytes, content: msgspec.Struct | bytes, *descriptors: int) -> None:
    """Raises OSError when nobody is there."""
    frame = kind + (content if isinstance(content, bytes) else msgspec.json.encode(content))
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    peer.sendmsg([frame], rights, socket.MSG_NOSIGNAL)


def send_facts(peer: socket.socket, facts: MergeFacts) -> None:
    """The answer, in pieces."""
    answer = msgspec.json.encode(facts)
    for at in range(0, len(answer), _PIECE):
        send(peer, b"R", answer[at : at + _PIECE])
    send(peer, b"R", b"")


def receive_with_descriptor(peer: socket.socket, kind: bytes, content: type[T]) -> tuple[T, int]:
    """The converter's side: a frame of that kind with its descriptor. Raises EOFError when the puller is gone."""
    # Not socket.recv_fds, which drops the flags it is given.
    descriptors = array.array("i")
    room = socket.CMSG_LEN(2 * descriptors.itemsize)
    frame, rights, flags, _ = peer.recvmsg(FRAME_MAX, room, socket.MSG_CMSG_CLOEXEC)
    if not frame:
        raise EOFError
    for _, _, sent in rights:
        descriptors.frombytes(sent[: len(sent) - len(sent) % descriptors.itemsize])
    if frame[:1] != kind or len(descriptors) != 1 or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        raise ValueError(f"a {kind.decode()} frame with one descriptor was expected")
    return msgspec.json.decode(frame[1:], type=content), descriptors[0]


# what the puller makes of it


def parse_advance(untrusted: bytes) -> Advance:
    """Raises :class:`ConversionFailed`."""
    advance = _parse(untrusted, Advance)
    if not 0 <= advance.done <= advance.total <= _NUMBER_MAX:
        raise nonsense()
    return advance


def parse_facts(untrusted: bytes) -> MergeFacts:
    """Raises :class:`ConversionFailed`."""
    facts = _parse(untrusted, MergeFacts)
    changed = msgspec.structs.asdict(facts.changed).values()
    if (
        not all(0 <= number <= _NUMBER_MAX for number in (*changed, facts.content_size))
        or not 1 <= facts.inodes <= facts.entries <= _NUMBER_MAX
        or max(len(facts.passwd), len(facts.group)) > ACCOUNTS_MAX
        or not (facts.facts is None or _is_plain(facts.facts))
    ):
        raise nonsense()
    return facts


def _is_plain(untrusted: ImageFacts) -> bool:
    """Whether nothing in it is longer, more or stranger than what a converter notes."""
    libraries, mpi = untrusted.libraries, untrusted.mpi
    files = [(one.soname, one.path) for one in libraries] + [(one.soname, one.path) for one in mpi]
    versions = [untrusted.libc_version, untrusted.pmix, *(one.version for one in mpi), *(one.product for one in mpi)]
    return (
        len(libraries) <= LIBRARIES_MAX
        and len(mpi) <= MPI_MAX
        and all(len(one.defines) <= DEFINES_MAX and all(map(is_word, one.defines)) for one in libraries)
        and all(is_word(soname) and "/" not in soname and is_path(path) for soname, path in files)
        and all(version == "" or is_word(version) for version in versions)
        and all(len(one.pmi) == len(set(one.pmi)) for one in mpi)
        and (untrusted.loader == "" or is_path(untrusted.loader))
    )


def parse_failure(untrusted: bytes, directory: str) -> HpcctrError:
    """The error to raise; ``directory`` is where the image file was written."""
    try:
        failure = _parse(untrusted, Failure)
    except ConversionFailed as error:
        return error
    if failure.errno in _NO_SPACE:
        return store_unusable(directory, OSError(failure.errno, os.strerror(failure.errno)))
    cls = ImageBroken if failure.slug == ImageBroken.slug else ConversionFailed
    return cls(_plain(failure.message), hint=_plain(failure.hint))


def nonsense() -> ConversionFailed:
    """The converter said something that no converter says."""
    return ConversionFailed("the converter answered nonsense", hint="do not use this image: it may attack its readers")


def _parse(untrusted: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(untrusted, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise nonsense() from None


def _plain(untrusted: str) -> str:
    """A sentence a terminal can be shown."""
    text = "".join(character if character.isprintable() else "?" for character in untrusted[:_TEXT_MAX])
    return text.encode("utf-8", "replace").decode()
