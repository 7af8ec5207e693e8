"""The whole document (OCI runtime-spec ``config.md``)."""

from __future__ import annotations

from hpcctr.policy.grant import Grant
from hpcctr.spec.linux import linux
from hpcctr.spec.mounts import mounts
from hpcctr.spec.process import process
from hpcctr.spec.root import root

#: The oldest version that has every field used here; runtimes refuse a major version they do not know.
OCI_VERSION = "1.0.2"


def build_spec(grant: Grant, *, container_id: str) -> dict[str, object]:
    """The document for a grant. ``container_id`` is the engine's name for this container, unique on the node."""
    return {
        "ociVersion": OCI_VERSION,
        "process": process(grant.caller),
        "root": root(),
        "mounts": mounts(),
        "linux": linux(container_id),
    }
