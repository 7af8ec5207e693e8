"""Grant: what policy allowed. Complete and frozen: the spec and the node container are made from it and nothing
else.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from hpcctr.context import Caller
from hpcctr.host.edits import HostEdits
from hpcctr.image.record import StoredImage
from hpcctr.request import Target


@dataclass(frozen=True, kw_only=True)
class Grant:
    """A launch that may happen."""

    caller: Caller
    image: StoredImage
    edits: HostEdits
    #: Mount points the container must have, parents before children, no duplicates.
    targets: tuple[Target, ...]
    #: Name of the rule that allowed it, with its file.
    rule: str
    #: Host features and devices that were asked for, by name.
    asked: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Identity of the node container: 32 hex digits over uid, image digest, host edits and mount targets."""
        digest = hashlib.sha256()
        for part in (str(self.caller.uid), self.image.record.digest, self.edits.key()):
            digest.update(part.encode() + b"\0\0")
        for target in self.targets:
            digest.update(target.kind.encode() + target.path + b"\0")
        return digest.hexdigest()[:32]
