"""The store as every launch reads it: which image a name means, and the file to mount.

    STORE/images/sha256-<64 hex>/root.squashfs     one read-only file per image
    STORE/images/sha256-<64 hex>/image.json        :class:`hpcctr.image.record.ImageRecord`
    STORE/images/sha256-<64 hex>/facts.json        :class:`hpcctr.image.record.FactsRecord`, if anything is known
    STORE/names/<registry>/<repository>/<tag>.<arch>.json     :class:`hpcctr.image.record.NameRecord`
    STORE/tmp/                                     what is being written; never read

A digest's colon is written ``-``: a colon ends a directory in overlayfs options. A name that is a digest
(``repo@sha256:…``) has the file word ``@sha256-<hex>``, which no tag can be. Nothing here is written in place, so a
reader needs no lock: it sees the old or the new file. Writing is :mod:`hpcctr.image.publish`. This module imports
only the standard library and msgspec."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec

from hpcctr.errors import ImageGone, ImageNotInStore, PlatformMissing, ReferenceWrong, StoreUnusable
from hpcctr.image.history import known_since as known_to
from hpcctr.image.history import meaning, was_there
from hpcctr.image.imagefile import open_image_file, store_unusable
from hpcctr.image.platform import acceptable, file_word, of_file_word, of_this_node
from hpcctr.image.recall import Recall
from hpcctr.image.record import FactsRecord, ImageFacts, ImageRecord, NameEntry, NameRecord, Platform, StoredImage
from hpcctr.image.reference import ImageRef, is_digest, is_digest_or_prefix
from hpcctr.image.stale import looked_up_again
from hpcctr.image.uses import has_gate

T = TypeVar("T", bound=msgspec.Struct)

SCHEMA = 1
IMAGE_FILE = "root.squashfs"
RECORD_FILE = "image.json"
FACTS_FILE = "facts.json"
#: A record holds at most 1 MiB each of passwd and group in base64, a config of at most 4 MiB, and little else.
_RECORD_SIZE_MAX = 16 * 2**20

_recall = Recall()


@dataclass(frozen=True, kw_only=True)
class StoredName:
    """One line of ``hpcctr images``: a name, the platform, and the image both mean. ``image`` is None once it was
    removed."""

    name: str
    platform: Platform
    digest: str
    since: str
    image: StoredImage | None


@dataclass(frozen=True, kw_only=True)
class Store:
    """A store directory, opened with :meth:`open`. Holds no descriptor: NFS servers may be restarted below it."""

    path: str

    @classmethod
    def open(cls, path: str, *, writable: bool = False) -> Store:
        """The store in ``path``; with ``writable`` it is made when absent. Raises :class:`StoreUnusable`."""
        if not path.startswith("/"):
            raise StoreUnusable(f"store {path!r} is not an absolute path", hint="set store in /etc/hpcctr/site.toml")
        if writable:
            from hpcctr.image.publish import require_writable

            require_writable(path)
            return cls(path=path)
        try:
            if not stat.S_ISDIR(os.stat(path).st_mode):
                raise StoreUnusable(f"store {path} is not a directory", hint="set store in /etc/hpcctr/site.toml")
        except FileNotFoundError:
            raise StoreUnusable(
                f"store {path} does not exist",
                hint="the first hpcctr pull by its administrator makes it; or set store in site.toml",
            ) from None
        except OSError as error:
            raise store_unusable(path, error) from None
        return cls(path=path)

    # where things are

    def image_directory(self, digest: str) -> str:
        """Where the image of that digest is, or would be."""
        return f"{self.path}/images/{digest.replace(':', '-')}"

    def name_file(self, ref: ImageRef, platform: Platform) -> str:
        """Where the record of that name is, or would be."""
        word = f"@{ref.digest.replace(':', '-')}" if ref.digest else ref.tag
        return f"{self.path}/names/{ref.registry}/{ref.repository}/{word}.{file_word(platform)}.json"

    # finding

    def find(
        self, text: str, platform: Platform | None = None, *, as_of: int | None = None, known_since: str | None = None
    ) -> StoredImage:
        """The image that a name or a digest (whole, or at least twelve digits) means on ``platform``; default: this
        node's.

        ``as_of`` (seconds since 1970) is about names alone: :func:`hpcctr.image.history.meaning`. With ``known_since``
        (RFC 3339) only what the name meant then and later counts.

        Raises :class:`ImageNotInStore`, :class:`ImageGone`, :class:`PlatformMissing`, :class:`ReferenceWrong`,
        :class:`StoreUnusable`.
        """
        wanted = platform or of_this_node()
        if text.startswith("sha256:") and is_digest_or_prefix(text):
            return self._require_platform(self.image(self.whole_digest(text)), wanted, text)
        ref = ImageRef.parse(text)
        named = ref.name_in_store()
        # Who says a digest or a file says what they mean now.
        moment = None if ref.digest or ref.is_file else as_of
        record = self._record(named, wanted, moment)
        if record is None:
            return self._find_unnamed(ref, named, wanted)
        history = record.history if known_since is None else known_to(record.history, known_since)
        means = meaning(history, moment)
        image = self._image_or_none(means.entry.digest, name=str(named))
        if image is None and means.is_past:
            raise ImageGone(
                f"image {ref.familiar}: {means.entry.digest[:19]}, {means.because}, is not in the store any more",
                hint=f"bring it again: hpcctr pull {_with_digest(named, means.entry.digest)}; or take what the name "
                "means now: HPCCTR_AS_OF=now",
            )
        # The name of a file's image is made of the file's own name: another file of that name is another image.
        if image is None or (ref.is_file and means.entry.source != source_text(ref)):
            raise self._not_in_store(ref)
        name = self._tagged(ref, image) or str(named)
        return msgspec.structs.replace(image, name=name, because=means.because)

    def was_there(self, text: str, platform: Platform | None, as_of: int) -> bool:
        """Whether a name meant something then. Raises as :meth:`find`."""
        if text.startswith("sha256:") and is_digest_or_prefix(text):
            return False
        record = self._record(ImageRef.parse(text).name_in_store(), platform or of_this_node(), as_of)
        return record is not None and was_there(record.history, as_of)

    def history_of(self, named: ImageRef) -> Iterator[NameEntry]:
        """Every meaning a name has and had, on all platforms."""
        for platform in self.platforms_of(named):
            record = self.name_record(named, platform)
            yield from record.history if record is not None else ()

    def whole_digest(self, text: str) -> str:
        """The digest in the store that begins like ``text``. Raises :class:`ImageNotInStore` for none or several."""
        if is_digest(text):
            return text
        found = [digest for digest in self.digests() if digest.startswith(text)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ImageNotInStore(f"{text} begins {len(found)} digests", hint=f"one of {', '.join(sorted(found)[:3])}")
        raise ImageNotInStore(f"no image in {self.path} has a digest that begins {text}", hint="hpcctr images")

    def image(self, digest: str, *, name: str = "") -> StoredImage:
        """The image of a whole digest. Raises :class:`ImageNotInStore`."""
        image = self._image_or_none(digest, name=name or digest)
        if image is None:
            raise ImageNotInStore(
                f"{digest} is not in the store {self.path}", hint="hpcctr images; hpcctr pull NAME@DIGEST"
            )
        return image

    def image_known_as(self, digest: str, untrusted_name: str) -> StoredImage:
        """The image of a whole digest, by a name somebody says it has, if it has or had it, else by its digest.

        Raises :class:`ImageNotInStore`, :class:`StoreUnusable`.
        """
        with contextlib.suppress(ImageNotInStore, PlatformMissing, ReferenceWrong):
            named = ImageRef.parse(untrusted_name).name_in_store()
            if any(entry.digest == digest for entry in self.history_of(named)):
                return self.image(digest, name=str(named))
        return self.image(digest)

    def is_whole(self, digest: str) -> bool:
        """Whether the image of that digest is there with a file of the size that was published, and nobody is about to
        remove it.
        """
        try:
            image = self._image_or_none(digest, name=digest, is_settled=False)
            return (
                image is not None
                and looked_up_again(lambda: os.stat(image.path)).st_size == image.record.file_size
                and has_gate(self.image_directory(digest))
                and (image.record.facts is None or self.facts(image) is not None)
            )
        except (StoreUnusable, OSError):
            return False

    def name_record(self, named: ImageRef, platform: Platform, *, as_of: int | None = None) -> NameRecord | None:
        """What a name means for exactly this platform; None when it means nothing. With ``as_of`` the newest meanings
        may be missing: what it meant at a moment that has passed, no other node changes.
        """
        path = self.name_file(named, platform)
        raw = self._read(path, is_settled=as_of is not None and as_of < time.time())
        if raw is None:
            return None
        record = _decode(raw, NameRecord, path)
        if not record.history or not all(is_digest(entry.digest) for entry in record.history):
            raise _damaged(path, "it names no digest")
        return record

    def names(self) -> Iterator[tuple[str, Platform, NameRecord]]:
        """Every name with its platform and record, in the order of the names."""
        top = f"{self.path}/names"
        for directory, file_name in _files_below(top):
            word, _, architecture = file_name.removesuffix(".json").rpartition(".")
            if not word or not file_name.endswith(".json") or file_name.startswith("."):
                continue
            repository = directory[len(top) + 1 :]
            text = f"{repository}@{word[1:].replace('-', ':', 1)}" if word.startswith("@") else f"{repository}:{word}"
            platform = of_file_word(architecture)
            try:
                named = ImageRef.parse(text)
            except ReferenceWrong:
                continue
            record = self.name_record(named, platform)
            if record is not None:
                yield text, platform, record

    def digests(self) -> list[str]:
        """Every image, with or without a name."""
        try:
            found = os.listdir(f"{self.path}/images")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise store_unusable(f"{self.path}/images", error) from None
        return sorted(digest for entry in found if is_digest(digest := entry.replace("-", ":", 1)))

    def images(self) -> list[StoredName]:
        """Every name, then every image that has none (its name is its digest)."""
        lines = []
        unnamed = dict.fromkeys(self.digests())
        known: dict[str, StoredImage | None] = {}
        for text, platform, record in self.names():
            digest = record.history[0].digest
            unnamed.pop(digest, None)
            if digest not in known:
                known[digest] = self._image_or_none(digest, name=text)
            image = known[digest]
            if image is not None:
                image = StoredImage(record=image.record, path=image.path, name=text)
            lines.append(
                StoredName(name=text, platform=platform, digest=digest, since=record.history[0].since, image=image)
            )
        for digest in unnamed:
            image = self._image_or_none(digest, name=digest)
            if image is not None:
                record_of = image.record
                lines.append(
                    StoredName(
                        name=digest, platform=record_of.platform, digest=digest, since=record_of.created, image=image
                    )
                )
        return lines

    def facts(self, image: StoredImage) -> ImageFacts | None:
        """What is known of an image's libraries; None for one stored before that was noted. Raises
        :class:`StoreUnusable` when it is damaged.
        """
        if image.record.facts is None:
            return None
        path = f"{os.path.dirname(image.path)}/{FACTS_FILE}"
        raw = self._read(path, is_settled=True)
        if raw is None:
            raise _damaged(path, "it is missing")
        known = _decode(raw, FactsRecord, path)
        if known.digest != image.record.digest:
            raise _damaged(path, "it is about another image")
        return known.facts

    # the file to mount

    def open_image_file(self, image: StoredImage) -> int:
        """:func:`hpcctr.image.imagefile.open_image_file` for this store."""
        return open_image_file(self.path, image)

    # inside

    def _find_unnamed(self, ref: ImageRef, named: ImageRef, wanted: Platform) -> StoredImage:
        """What is left when no record has the name: a manifest digest that came under another name, or the right
        error."""
        if ref.digest:
            image = self._image_or_none(ref.digest, name=ref.digest)
            if image is not None:
                image = msgspec.structs.replace(image, name=self._name_with(ref, named, image))
                return self._require_platform(image, wanted, ref.familiar)
        others = self.platforms_of(named)
        if others and not ref.is_file:
            raise PlatformMissing(
                f"image {ref.familiar} is in the store for {', '.join(map(str, others))}, not for {wanted}",
                hint=f"hpcctr pull --platform {wanted} {ref.familiar}",
            )
        raise self._not_in_store(ref)

    def _name_with(self, ref: ImageRef, named: ImageRef, image: StoredImage) -> str:
        """The name for an image asked for by NAME and digest: rules go by names, so only one it has or had counts.

        Any name that has or had it, the repository it came from, else the digest alone.
        """
        tagged = self._tagged(ref, image)
        if tagged:
            return tagged
        with contextlib.suppress(ReferenceWrong):
            source = ImageRef.parse(image.record.source)
            if (source.registry, source.repository) == (ref.registry, ref.repository):
                return str(named)
        return ref.digest

    def _tagged(self, ref: ImageRef, image: StoredImage) -> str:
        """NAME:TAG of NAME:TAG@DIGEST, if it means or has meant the image; else nothing."""
        if not (ref.tag and ref.digest):
            return ""
        tagged = replace(ref, digest="")
        has_meant_it = any(entry.digest == image.record.digest for entry in self.history_of(tagged))
        return str(tagged) if has_meant_it else ""

    def _record(self, named: ImageRef, wanted: Platform, as_of: int | None) -> NameRecord | None:
        for candidate in acceptable(wanted):
            record = self.name_record(named, candidate, as_of=as_of)
            if record is not None:
                return record
        return None

    def platforms_of(self, named: ImageRef) -> list[Platform]:
        """The platforms a name exists for."""
        directory, _, example = self.name_file(named, Platform(os="linux", architecture="x")).rpartition("/")
        beginning = example.removesuffix("x.json")
        try:
            found = os.listdir(directory)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise store_unusable(directory, error) from None
        words = [
            entry[len(beginning) : -len(".json")]
            for entry in found
            if entry.startswith(beginning) and entry.endswith(".json")
        ]
        return [of_file_word(word) for word in sorted(words) if word and "." not in word]

    def _require_platform(self, image: StoredImage, wanted: Platform, text: str) -> StoredImage:
        if image.record.platform not in acceptable(wanted):
            raise PlatformMissing(
                f"image {text} is for {image.record.platform}, not for {wanted}",
                hint=f"--platform {image.record.platform}",
            )
        return image

    def _not_in_store(self, ref: ImageRef) -> ImageNotInStore:
        return ImageNotInStore(
            f"image {ref.familiar} is not in the store {self.path}", hint=f"hpcctr pull {ref.familiar}"
        )

    def _image_or_none(self, digest: str, *, name: str, is_settled: bool = True) -> StoredImage | None:
        directory = self.image_directory(digest)
        raw = self._read(f"{directory}/{RECORD_FILE}", is_settled=is_settled)
        if raw is None:
            return None
        record = _decode(raw, ImageRecord, f"{directory}/{RECORD_FILE}")
        if record.digest != digest or record.file != IMAGE_FILE:
            raise _damaged(f"{directory}/{RECORD_FILE}", "it is about another image")
        return StoredImage(record=record, path=f"{directory}/{record.file}", name=name)

    def _owner(self) -> int:
        return os.stat(self.path).st_uid

    def _read(self, path: str, *, is_settled: bool = False) -> bytes | None:
        """The content of a record; None when there is no such file."""
        try:
            raw = looked_up_again(
                lambda: _recall.read(path, _RECORD_SIZE_MAX + 1, owner=self._owner, is_settled=is_settled)
            )
        except (FileNotFoundError, NotADirectoryError):
            return None
        except IsADirectoryError:
            raise _damaged(path, "it is not a regular file") from None
        except OSError as error:
            raise store_unusable(path, error) from None
        if len(raw) > _RECORD_SIZE_MAX:
            raise _damaged(path, f"it is larger than {_RECORD_SIZE_MAX} bytes")
        return raw


def source_text(ref: ImageRef) -> str:
    """A reference as records hold it: independent of the working directory, and text whatever bytes its path has."""
    return str(ref.absolute()).encode("utf-8", "backslashreplace").decode()


def _with_digest(named: ImageRef, digest: str) -> str:
    return replace(named, tag="", digest=digest).familiar


def _files_below(top: str) -> Iterator[tuple[str, str]]:
    def stop(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise store_unusable(error.filename or top, error) from None

    for directory, directories, files in os.walk(top, onerror=stop):
        directories.sort()
        for name in sorted(files):
            yield directory, name


def _decode(raw: bytes, kind: type[T], path: str) -> T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error)) from None


def _damaged(path: str, problem: str) -> StoreUnusable:
    return StoreUnusable(f"{path} is damaged: {problem}", hint=f"remove {path} and pull the image again")
