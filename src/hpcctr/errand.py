"""What a user has done in the store by somebody who may: the storekeeper (:mod:`hpcctr.storekeeper`).

An :class:`Errand` crosses the engine's socket; the engine answers with a socket to a storekeeper of the user's own, and
the two talk there in lines of JSON (:class:`Said`), while bytes of an archive go the other way.
"""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

from hpcctr.errors import HpcctrError, ProtocolBroken, of_slug
from hpcctr.image.record import ImageRecord
from hpcctr.wire import Frame

#: ``pull`` from a registry into the shared store, ``import`` an archive into the user's own, ``images`` and ``remove``
#: of the user's own.
Task = Literal["pull", "import", "images", "remove"]
_TASKS: tuple[str, ...] = get_args(Task)
#: Bytes of a name, platform or source in an errand.
_WORD_MAX = 8192
#: Bytes of one line of a storekeeper's.
LINE_MAX = 8 << 20


class Errand(msgspec.Struct, frozen=True, kw_only=True):
    """A claim: what to do, with which image. For ``import``, ``name`` is the name to give and ``source`` what the user
    calls the source; ``image`` is the archive's kind and the reference in it, as ``oci-archive::tag``.
    """

    task: Task
    image: str = ""
    platform: str = ""
    name: str = ""
    source: str = ""

    VERB = "store"
    KEYS = frozenset({"task", "image", "platform", "name", "source"})

    def frame(self) -> Frame:
        """The errand as a frame."""
        words = ((key, getattr(self, key)) for key in ("task", "image", "platform", "name", "source"))
        return Frame(self.VERB, [(key, word.encode()) for key, word in words if word])

    @classmethod
    def of_frame(cls, untrusted: Frame) -> Errand:
        """The errand in a frame. Raises :class:`ProtocolBroken` unless every field is well formed."""
        untrusted.require_keys(cls.KEYS)
        words = {key: untrusted.text(key, "") for key in cls.KEYS}
        if words["task"] not in _TASKS:
            raise ProtocolBroken("an errand the storekeeper does not know")
        for key, word in words.items():
            if len(word) > _WORD_MAX or not word.isprintable():
                raise ProtocolBroken(f"field {key} of an errand is too long or has control characters")
        return msgspec.convert(words, cls)


class Progressed(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """How far a pull is; the fields are those of :class:`hpcctr.image.progress.Progress`."""

    stage: str
    done: int
    total: int
    who: str = ""


class Pulled(msgspec.Struct, frozen=True, kw_only=True, tag="pulled"):
    """The end of a pull or an import."""

    name: str
    digest: str
    file_size: int
    was_stored: bool


class Listed(msgspec.Struct, frozen=True, kw_only=True, tag="listed"):
    """One of the user's own images; None when the name's image is gone."""

    name: str
    platform: str
    digest: str
    since: str
    record: ImageRecord | None = None


class Removed(msgspec.Struct, frozen=True, kw_only=True, tag="removed"):
    """What was taken away: names, digests, bytes."""

    names: tuple[str, ...]
    digests: tuple[str, ...]
    freed: int


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """An :class:`HpcctrError` of the storekeeper's."""

    slug: str
    message: str
    hint: str = ""

    @classmethod
    def of(cls, error: HpcctrError) -> Failed:
        """The error as a line, without what no message is long enough for."""
        return cls(slug=error.slug, message=error.message[:4000], hint=error.hint[:4000])

    def error(self) -> HpcctrError:
        """The error again."""
        return of_slug(self.slug)(self.message, hint=self.hint)


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag="ended"):
    """Nothing more comes, and nothing failed."""


Said = Progressed | Pulled | Listed | Removed | Failed | Ended
