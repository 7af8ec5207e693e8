"""The border to containerd, and the only importer of grpc.

``client`` says what hpcctr can ask of containerd, ``channel`` how a call is made, ``errors`` what becomes of a refusal;
``api/`` is generated from ``protos/`` by ``scripts/gen-protos``.
"""

from __future__ import annotations

import os

# grpc reads this when it is imported, and else writes of every lost connection on the standard error of whoever ran us.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # noqa: TID251

from hpcctr.containerd.client import Containerd  # noqa: E402

__all__ = ["Containerd"]
