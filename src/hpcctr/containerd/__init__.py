"""The border to containerd, and the only importer of grpc.

``client`` says what hpcctr can ask of containerd, ``channel`` how a call is made, ``errors`` what becomes of a refusal;
``api/`` is generated from ``protos/`` by ``scripts/gen-protos``.
"""

from __future__ import annotations

from hpcctr.containerd.client import Containerd

__all__ = ["Containerd"]
