"""Grant → OCI runtime spec. Pure; one file per section of the document, :mod:`hpcctr.spec.build` puts them together.

The document is an allow-list by construction: what is not written here is not in it. It describes a container that is
created and never started, and whose only purpose is its mount namespace.
"""
