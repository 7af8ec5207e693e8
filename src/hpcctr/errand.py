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
#: of the user's own; ``share``, ``unshare`` and ``shares`` of one of them with others, ``shared`` and ``inspect`` of
#: what others share with the user; ``verify`` that the file of one of the user's own is what was published.
Task = Literal["pull", "import", "images", "remove", "share", "unshare", "shares", "shared", "inspect", "verify"]
_TASKS: tuple[str, ...] = get_args(Task)
#: Bytes of a name, platform or source in an errand.
_WORD_MAX = 8192
#: Bytes of one line of a storekeeper's.
LINE_MAX = 8 << 20


class Errand(msgspec.Struct, frozen=True, kw_only=True):
    """A claim: what to do, with which image. For ``import``, ``name`` is the name to give and ``source`` what the user
    calls the source; ``image`` is the archive's kind and the reference in it, as ``oci-archive::tag``. ``grantees`` are
    users and groups by number, ``uid-1000,gid-100``.
    """

    task: Task
    image: str = ""
    platform: str = ""
    name: str = ""
    source: str = ""
    grantees: str = ""
    #: ``yes``: of ``pull`` and ``import``, read an image that is stored already and bring it anew when it is damaged.
    verify: str = ""

    VERB = "store"
    KEYS = frozenset({"task", "image", "platform", "name", "source", "grantees", "verify"})

    def frame(self) -> Frame:
        """The errand as a frame."""
        keys = ("task", "image", "platform", "name", "source", "grantees", "verify")
        words = ((key, getattr(self, key)) for key in keys)
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
        if words["verify"] not in ("", "yes"):
            raise ProtocolBroken("field verify of an errand is neither empty nor yes")
        return msgspec.convert(words, cls)


class Progressed(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """How far a pull is; the fields are those of :class:`hpcctr.image.progress.Progress`."""

    stage: str
    done: int
    total: int
    #: Who does it, when that is somebody else, and their stage.
    who: str = ""
    doing: str = ""


class Pulled(msgspec.Struct, frozen=True, kw_only=True, tag="pulled"):
    """The end of a pull or an import."""

    name: str
    digest: str
    file_size: int
    was_stored: bool
    platform: str = ""


class Listed(msgspec.Struct, frozen=True, kw_only=True, tag="listed"):
    """One of the user's own images, or of ``owner``'s (a uid); ``record`` is None when the name's image is gone."""

    name: str
    platform: str
    digest: str
    since: str
    record: ImageRecord | None = None
    #: Seconds since the epoch when a node last began or ended to use it, or it was brought or named; 0 when unknown.
    last_used: float = 0.0
    owner: int | None = None


class Granted(msgspec.Struct, frozen=True, kw_only=True, tag="granted"):
    """Whom an image is shared with: ``uid-1000`` or ``gid-100``, and since when."""

    image: str
    grantee: str
    since: str


class Quota(msgspec.Struct, frozen=True, kw_only=True, tag="quota"):
    """What the user's own images take, and may take, in bytes."""

    used: int
    limit: int


class Removed(msgspec.Struct, frozen=True, kw_only=True, tag="removed"):
    """What was taken away: names, digests, bytes; and the nodes because of which some of the bytes stay for now."""

    names: tuple[str, ...]
    digests: tuple[str, ...]
    freed: int
    used_on: tuple[str, ...] = ()


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


Said = Progressed | Pulled | Listed | Granted | Quota | Removed | Failed | Ended
