"""Lock files: which digest a name stands for, written by ``hpcctr pull --lock`` and read by ``hpcctr run --locked``.

    # what the paper was computed with
    docker.io/library/debian:12 sha256:<64 hex> linux/amd64

One image a line: its name as in the store, the digest of its manifest, the platform. What follows a ``#`` is a comment.
Made for people and their version control: lines keep their order, and what a person has written stays.

Imports nothing but the error classes and the processor's name: it is part of launches.
"""

from __future__ import annotations

from hpcctr.errors import ImageNotLocked, LockFileWrong
from hpcctr.processor import machine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

#: Bytes of a lock file.
_SIZE_MAX = 1 << 20
_HEX = frozenset("0123456789abcdef")


class Locked:
    """One image of a lock file."""

    __slots__ = ("digest", "name", "platform")

    def __init__(self, *, name: str, digest: str, platform: str) -> None:
        self.name = name
        self.digest = digest
        self.platform = platform

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Locked) and self.line() == other.line()

    def __hash__(self) -> int:
        return hash(self.line())

    def line(self) -> str:
        """The image as a line, without its end."""
        return f"{self.name} {self.digest} {self.platform}"

    @property
    def launched_as(self) -> str:
        """The name that means just this digest: ``NAME@DIGEST``, also for one that another user shares."""
        if self.name.startswith("sha256:"):
            return self.digest
        owner, name = split_owner(self.name)
        return f"{owner}{name.partition('@')[0]}@{self.digest}"


def read(path: str) -> str:
    """The text of a lock file. Raises :class:`LockFileWrong`."""
    try:
        with open(path, "rb") as file:
            raw = file.read(_SIZE_MAX + 1)
    except OSError as error:
        raise LockFileWrong(f"{path}: {error.strerror}", hint=f"hpcctr pull --lock {path} IMAGE writes it") from None
    if len(raw) > _SIZE_MAX:
        raise LockFileWrong(f"{path}: larger than {_SIZE_MAX} bytes", hint="name a file that pull --lock has written")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise LockFileWrong(f"{path}: not text in UTF-8", hint="name a file that pull --lock has written") from None


def parse(text: str, path: str) -> list[Locked]:
    """The images of a lock file's text. Raises :class:`LockFileWrong` naming the line."""
    found: list[Locked] = []
    seen: set[tuple[str, str]] = set()
    for number, line in enumerate(text.split("\n"), 1):
        one = _of_line(line, f"{path}, line {number}")
        if one is None:
            continue
        if (one.name, one.platform) in seen:
            raise LockFileWrong(
                f"{path}, line {number}: {one.name} for {one.platform} is there twice", hint="remove one of the lines"
            )
        seen.add((one.name, one.platform))
        found.append(one)
    return found


def updated(text: str, images: Sequence[Locked], path: str) -> str:
    """The text with these images in it: each in its line where it has one, else at the end. Comments stay.

    Raises :class:`LockFileWrong`.
    """
    parse(text, path)
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    wanted = {(image.name, image.platform): image for image in images}
    for number, line in enumerate(lines):
        there = _of_line(line, path)
        image = wanted.pop((there.name, there.platform), None) if there is not None else None
        if image is not None:
            _, sign, comment = line.partition("#")
            lines[number] = image.line() + (f"  #{comment}" if sign else "")
    lines += [image.line() for image in wanted.values()]
    return "\n".join(lines) + "\n"


def locked_image(path: str, image: str, platform: str = "") -> str:
    """The name to launch ``image`` by, with the digest a lock file has for it on ``platform`` (default: this node's).

    Raises :class:`LockFileWrong`, :class:`ImageNotLocked`.
    """
    wanted = platform or f"linux/{machine()}"
    images = parse(read(path), path)
    if image.startswith("sha256:"):
        known = [one for one in images if one.digest == image]
    else:
        name = full_name(image)
        known = [one for one in images if one.name == name]
    fitting = [one for one in known if one.platform == wanted or one.platform.startswith(f"{wanted}/")]
    if fitting:
        return min(fitting, key=lambda one: len(one.platform)).launched_as
    if known:
        raise ImageNotLocked(
            f"image {image} is in {path} for {', '.join(one.platform for one in known)}, not for {wanted}",
            hint=f"hpcctr pull --platform {wanted} --lock {path} {image}",
        )
    raise ImageNotLocked(f"image {image} is not in {path}", hint=f"hpcctr pull --lock {path} {image}")


def full_name(image: str) -> str:
    """A name as the store has it: ``debian:12`` is ``docker.io/library/debian:12``.

    For what :class:`hpcctr.image.reference.ImageRef` accepts the same as its ``name_in_store()``; other texts come out
    as something that no store has.
    """
    owner, name = split_owner(image)
    if owner and name.startswith("sha256:"):
        return image
    name, at, digest = name.removeprefix("docker://").partition("@")
    first, slash, rest = name.partition("/")
    if slash and (set(first) & set(".:[") or first.lower() == "localhost"):
        registry, path = first.lower(), rest
    else:
        registry, path = "docker.io", name
    if registry == "index.docker.io":
        registry = "docker.io"
    path, _, tag = path.partition(":")
    if registry == "docker.io" and "/" not in path:
        path = f"library/{path}"
    return f"{owner}{registry}/{path}" + (f"@{digest}" if at else f":{tag or 'latest'}")


def split_owner(image: str) -> tuple[str, str]:
    """(``@OWNER/`` or nothing, the rest) of a name."""
    if not image.startswith("@"):
        return "", image
    owner, slash, rest = image.partition("/")
    return owner + slash, rest


def _of_line(line: str, where: str) -> Locked | None:
    words = line.partition("#")[0].split()
    if not words:
        return None
    if len(words) != 3 or not "".join(words).isprintable():
        raise LockFileWrong(f"{where}: not NAME DIGEST PLATFORM", hint="remove the line and pull --lock again")
    name, digest, platform = words
    if len(digest) != 71 or not digest.startswith("sha256:") or not _HEX.issuperset(digest[7:]):
        raise LockFileWrong(f"{where}: no digest sha256:<64 hex>", hint="remove the line and pull --lock again")
    return Locked(name=name, digest=digest, platform=platform)
