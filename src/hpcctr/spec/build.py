"""The whole document (OCI runtime-spec ``config.md``)."""

from __future__ import annotations

from collections.abc import Sequence

from hpcctr.policy.grant import Grant
from hpcctr.spec.hooks import hooks
from hpcctr.spec.linux import linux
from hpcctr.spec.mounts import BindMount, mounts
from hpcctr.spec.process import process
from hpcctr.spec.root import root

#: The oldest version that has every field used here; runtimes refuse a major version they do not know.
OCI_VERSION = "1.0.2"


def build_spec(grant: Grant, *, container_id: str, binds: Sequence[BindMount] = ()) -> dict[str, object]:
    """The document for a grant. ``container_id`` is the engine's name for this container, unique on the node; ``binds``
    are the grant's mount edits, resolved.
    """
    document: dict[str, object] = {
        "ociVersion": OCI_VERSION,
        "process": process(grant.caller),
        "root": root(),
        "mounts": mounts(binds),
        "linux": linux(container_id),
    }
    if grant.edits.hooks:
        document["hooks"] = hooks(grant.edits.hooks)
    return document
