"""The administrator's settings of a test site: a site.toml for one Host."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

INSTALLED_ENTER = Path(os.environ.get("HPCCTR_DEV", "/opt/hpcctr/dev")) / "libexec/enter"


@dataclass(frozen=True, kw_only=True)
class Site:
    """A written site.toml and what stands in it."""

    file: Path
    store: Path
    policy_directory: Path
    containerd_socket: Path
    enter: Path
    runtime: Literal["runc", "crun"]

    @classmethod
    def write(
        cls,
        directory: Path,
        *,
        containerd_socket: Path,
        store: Path | None = None,
        enter: Path = INSTALLED_ENTER,
        runtime: Literal["runc", "crun"] = "runc",
        linger_seconds: int = 1,
        carry: Sequence[str] = (),
        keys: str = "",
        more: str = "",
    ) -> Self:
        """Write DIRECTORY/site.toml; `keys` is TOML text for the top, `more` for the end, for instance further tables.

        DIRECTORY/policy.d and DIRECTORY/profiles.d do not exist: a test that wants rules or profiles makes them.
        """
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        store = directory / "store" if store is None else store
        store.mkdir(mode=0o755, parents=True, exist_ok=True)
        file = directory / "site.toml"
        carried = ", ".join(f'"{path}"' for path in carry)
        file.write_text(
            f'store = "{store}"\nenter = "{enter}"\nruntime = "{runtime}"\nlinger-seconds = {linger_seconds}\n'
            f'policy-directory = "{directory}/policy.d"\nprofile-directory = "{directory}/profiles.d"\n'
            f"carry = [{carried}]\n{keys}\n"
            f'[containerd]\nsocket = "{containerd_socket}"\n\n{more}'
        )
        file.chmod(0o644)
        return cls(
            file=file,
            store=store,
            policy_directory=directory / "policy.d",
            containerd_socket=containerd_socket,
            enter=enter,
            runtime=runtime,
        )

    @property
    def environment(self) -> dict[str, str]:
        """What tells a command of hpcctr which site it is at."""
        return {"HPCCTR_SITE": str(self.file)}
