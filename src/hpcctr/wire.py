"""Frames on the engine's socket.

One SOCK_SEQPACKET packet is one frame of at most :data:`FRAME_MAX` bytes::

    b"hpcctr/1 VERB" NUL  (KEY "=" VALUE NUL)*

Keys are lower-case words; values are any bytes but NUL, so paths and environments cross unchanged; a list is a repeated
key. The format needs no parser library on the client, and no value can be mistaken for structure.

A reader accepts wire version N and N-1 (rolling upgrades); 1 is the first. What a frame says is untrusted until the
receiver has checked it against its closed set of keys (:meth:`Frame.require_keys`).
"""

from __future__ import annotations

from hpcctr.errors import ProtocolBroken

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from hpcctr.errors import HpcctrError

#: Everything of the engine's that is not the store; only root can make it. enter is compiled for the socket's name.
RUN_DIRECTORY = "/run/hpcctr"
ENGINE_SOCKET = "/run/hpcctr/engine.sock"
VERSION = 1
FRAME_MAX = 65536
_MAGIC = b"hpcctr/"
_KEY_BYTES = frozenset(b"abcdefghijklmnopqrstuvwxyz-")


class Frame:
    """A verb and its fields, in order."""

    __slots__ = ("fields", "verb")

    def __init__(self, verb: str, fields: Iterable[tuple[str, bytes]] = ()) -> None:
        self.verb = verb
        self.fields = tuple(fields)

    def one(self, key: str, default: bytes | None = None) -> bytes:
        """The only value of ``key``; ``default`` when it is absent."""
        values = self.every(key)
        if len(values) == 1:
            return values[0]
        if not values and default is not None:
            return default
        raise ProtocolBroken(f"field {key} occurs {len(values)} times in a {self.verb} frame")

    def every(self, key: str) -> list[bytes]:
        """All values of ``key``, in order."""
        return [value for name, value in self.fields if name == key]

    def text(self, key: str, default: str | None = None) -> str:
        """The only value of ``key`` as UTF-8 text."""
        value = self.one(key, None if default is None else default.encode())
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise ProtocolBroken(f"field {key} of a {self.verb} frame is not UTF-8") from None

    def require_keys(self, allowed: frozenset[str]) -> None:
        """Raise :class:`ProtocolBroken` when the frame has a key outside ``allowed``."""
        for name, _ in self.fields:
            if name not in allowed:
                raise ProtocolBroken(
                    f"field {name} is not part of a {self.verb} frame",
                    hint="client and engine differ by too many versions",
                )

    def pack(self) -> bytes:
        """The packet. Raises :class:`ProtocolBroken` for a value with NUL and for a frame over :data:`FRAME_MAX`."""
        parts = [_MAGIC + f"{VERSION} {self.verb}".encode()]
        for name, value in self.fields:
            if b"\0" in value:
                raise ProtocolBroken(f"value of {name} has a NUL byte")
            parts.append(name.encode() + b"=" + value)
        packet = b"\0".join(parts) + b"\0"
        if len(packet) > FRAME_MAX:
            raise ProtocolBroken(
                f"a {self.verb} frame of {len(packet)} bytes is over the limit of {FRAME_MAX}",
                hint="fewer or shorter mount targets, or a smaller environment in the image",
            )
        return packet

    @classmethod
    def of_error(cls, error: HpcctrError) -> Frame:
        """An error as an answer: its texts at a length that fits, without what a frame cannot hold."""
        texts = (("slug", error.slug), ("message", error.message), ("hint", error.hint))
        return cls("error", [(key, text.replace("\0", "?").encode(errors="replace")[:4000]) for key, text in texts])

    @classmethod
    def unpack(cls, untrusted_packet: bytes) -> Frame:
        """The frame in a packet. Raises :class:`ProtocolBroken` for anything that is not one."""
        if len(untrusted_packet) > FRAME_MAX:
            raise ProtocolBroken(f"a frame over the limit of {FRAME_MAX} bytes")
        if not untrusted_packet.startswith(_MAGIC) or not untrusted_packet.endswith(b"\0"):
            raise ProtocolBroken("not an hpcctr frame")
        head, *rest = untrusted_packet[:-1].split(b"\0")
        version, _, verb = head[len(_MAGIC) :].partition(b" ")
        if version != str(VERSION).encode():
            shown = version[:20].decode("ascii", "replace")
            raise ProtocolBroken(
                f"wire version {shown!r} is not {VERSION}",
                hint="client and engine must be of the same or the next version",
            )
        if not verb or not _KEY_BYTES.issuperset(verb):
            raise ProtocolBroken("a frame without a verb")
        fields: list[tuple[str, bytes]] = []
        for entry in rest:
            name, sign, value = entry.partition(b"=")
            if not sign or not name or not _KEY_BYTES.issuperset(name):
                raise ProtocolBroken(f"a field of a {verb.decode()} frame has no name")
            fields.append((name.decode(), value))
        return cls(verb.decode(), fields)
