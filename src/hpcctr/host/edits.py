"""HostEdits: what a container gets beyond its image, each piece with the place it comes from.

Only the site decides them. They are part of a node container's key, so they are plain values that compare and print.
"""

from __future__ import annotations

from dataclasses import dataclass

from hpcctr.site import Site


@dataclass(frozen=True, kw_only=True)
class EnvEdit:
    """One variable and where it comes from."""

    name: str
    value: str
    origin: str


@dataclass(frozen=True, kw_only=True)
class HostEdits:
    """Everything a site adds to a container."""

    env: tuple[EnvEdit, ...] = ()

    def key(self) -> str:
        """A text equal for equal edits, for the node container's key."""
        return "\n".join(f"env {edit.name}={edit.value}" for edit in self.env)


def of_site(site: Site) -> HostEdits:
    """The edits every launch of the site gets."""
    return HostEdits(
        env=tuple(EnvEdit(name=name, value=value, origin="site.toml [env]") for name, value in site.env.items())
    )
