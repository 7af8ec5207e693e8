"""Rules of a site: who may launch what. Files of ``policy.d`` in order of name, rules in order of writing, first match
decides.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

import msgspec


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One ``[[rule]]``.

    ``users`` are login names, uids, ``@GROUP`` or ``*``; ``images`` are globs over names as ``hpcctr images`` prints
    them (``*`` crosses slashes). An absent list matches everybody or everything.
    """

    name: str
    action: Literal["allow", "deny"]
    users: tuple[str, ...] = ("*",)
    images: tuple[str, ...] = ("*",)
    #: The file it stands in; filled in by the loader.
    file: str = ""

    @property
    def label(self) -> str:
        """How messages and the audit line name the rule."""
        return f'{self.file}, rule "{self.name}"'

    def is_about(self, *, user_names: frozenset[str], image_name: str) -> bool:
        """Whether the rule decides for a caller known by ``user_names`` (name, uid, ``@group`` …) and an image."""
        who = "*" in self.users or not user_names.isdisjoint(self.users)
        return who and any(fnmatchcase(image_name, pattern) for pattern in self.images)


class PolicyFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of ``policy.d``."""

    rule: tuple[Rule, ...] = ()


#: The policy of a site without policy files: whatever the administrator put into the shared store may be run by
#: anybody.
BUILT_IN = (Rule(name="shared-store", action="allow", file="built-in policy"),)
