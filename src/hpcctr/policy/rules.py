"""Rules of a site: who may launch what. Files of ``policy.d`` in order of name, rules in order of writing, first match
decides.

An *allow* rule matches a launch when it covers all that is asked for; a *deny* rule when it meets any of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property
from typing import Literal

#: How names of images begin that are not in the part of the store for everyone: they belong to no registry.
PRIVATE = "private/"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a decision is about."""

    #: Login name, uid, ``@GROUP`` and ``@gid``: :func:`hpcctr.policy.account.names_for`.
    user_names: frozenset[str]
    #: As ``hpcctr images`` prints it with its registry; ``private/NAME``; ``sha256:…`` when no name was said.
    image_name: str
    #: Other names of the same image, for deny rules alone.
    other_names: tuple[str, ...] = ()
    #: Plain absolute paths.
    targets: tuple[bytes, ...] = ()
    features: tuple[str, ...] = ()
    #: ``vendor.com/class=name``.
    devices: tuple[str, ...] = ()
    #: Devices that come with these, whatever they are called by who asks; for deny rules alone.
    other_devices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One mount target, feature or device that is asked for."""

    kind: Literal["mount target", "feature", "device"]
    name: str | bytes

    def __str__(self) -> str:
        text = self.name if isinstance(self.name, str) else self.name.decode(errors="backslashreplace")
        shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text[:200])
        return f"{self.kind} {shown}" + ("…" if len(text) > 200 else "")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One ``[[rule]]``.

    ``users`` are login names, uids, ``@GROUP`` or ``*``; ``images`` globs over names with their registry (``*`` crosses
    slashes); ``registries`` are ``HOST[:PORT]``, ``targets`` absolute paths, ``features`` and ``devices`` globs. None
    is a list that was not written and stands for everything; of an allow rule, an empty one of the last three is that
    nothing may be asked for.
    """

    name: str
    action: Literal["allow", "deny"]
    users: tuple[str, ...] = ("*",)
    images: tuple[str, ...] = ("*",)
    registries: tuple[str, ...] | None = None
    targets: tuple[str, ...] | None = None
    features: tuple[str, ...] | None = None
    devices: tuple[str, ...] | None = None
    #: The file it stands in.
    file: str = ""

    @property
    def label(self) -> str:
        """How messages and the audit line name the rule."""
        return f'{self.file}, rule "{self.name}"'

    def matches(self, asked: Asked) -> bool:
        """Whether the rule decides."""
        return self.is_about_user(asked) and bool(self.image_met(asked)) and self._is_about_things(asked)

    def is_about_user(self, asked: Asked) -> bool:
        """Whether the rule is about this caller."""
        return self._is_for_everybody or not self._users.isdisjoint(asked.user_names)

    def image_met(self, asked: Asked) -> str:
        """The name by which the rule is about this image; empty when it is not."""
        names = (asked.image_name, *asked.other_names) if self.action == "deny" else (asked.image_name,)
        return next((name for name in names if self._is_about_name(name)), "")

    def things_met(self, asked: Asked) -> Iterator[Thing]:
        """What is asked for and in the rule's lists."""
        for kind, listed, wanted, is_in in self._lists(asked):
            if listed is not None:
                yield from (Thing(kind=kind, name=name) for name in wanted if is_in(name))

    def things_left(self, asked: Asked) -> Iterator[Thing]:
        """What is asked for and outside the rule's lists."""
        for kind, listed, wanted, is_in in self._lists(asked):
            if listed is not None:
                yield from (Thing(kind=kind, name=name) for name in wanted if not is_in(name))

    def _is_about_things(self, asked: Asked) -> bool:
        if self.action == "allow":
            return next(self.things_left(asked), None) is None
        return all(
            listed is None or any(is_in(name) for name in wanted) for _, listed, wanted, is_in in self._lists(asked)
        )

    def _lists(
        self, asked: Asked
    ) -> tuple[
        tuple[Literal["mount target", "feature", "device"], object, Sequence[str | bytes], Callable[..., bool]], ...
    ]:
        if self._says_nothing_of_things:
            return ()
        devices = (*asked.devices, *asked.other_devices) if self.action == "deny" else asked.devices
        return (
            ("mount target", self.targets, asked.targets, self._is_in_targets),
            ("feature", self.features, asked.features, self._is_in_features),
            ("device", self.devices, devices, self._is_in_devices),
        )

    def _is_about_name(self, name: str) -> bool:
        return (self._is_about_every_image or self._images(name)) and (
            self.registries is None or registry_of(name) in self.registries
        )

    def _is_in_targets(self, path: bytes) -> bool:
        return any(is_within(path, top) for top in self._targets)

    def _is_in_features(self, name: str) -> bool:
        return self._features(name)

    def _is_in_devices(self, name: str) -> bool:
        return self._devices(name)

    @cached_property
    def _users(self) -> frozenset[str]:
        return frozenset(self.users)

    @cached_property
    def _is_for_everybody(self) -> bool:
        return "*" in self.users

    @cached_property
    def _is_about_every_image(self) -> bool:
        return "*" in self.images

    @cached_property
    def _says_nothing_of_things(self) -> bool:
        return self.targets is None and self.features is None and self.devices is None

    @cached_property
    def _images(self) -> Callable[[str], bool]:
        return _matcher(self.images)

    @cached_property
    def _targets(self) -> tuple[bytes, ...]:
        return tuple(target.encode() for target in self.targets or ())

    @cached_property
    def _features(self) -> Callable[[str], bool]:
        return _matcher(self.features or ())

    @cached_property
    def _devices(self) -> Callable[[str], bool]:
        return _matcher(self.devices or ())


def registry_of(image_name: str) -> str | None:
    """``HOST[:PORT]`` of a name with its registry; None for an image that is private or has no name."""
    if image_name.startswith((PRIVATE, "sha256:", "@")):
        return None
    registry, slash, _ = image_name.partition("/")
    return registry if slash else None


def is_within(path: bytes, top: bytes) -> bool:
    """Whether a plain absolute path is ``top`` or below it, by components: ``/scratch2`` is not below ``/scratch``."""
    return top == b"/" or path == top or path.startswith(top + b"/")


def before_glob(pattern: str) -> str:
    """The part of a glob that stands for itself; all of it when it has no character of a glob."""
    ends = [at for at in map(pattern.find, "*?[") if at >= 0]
    return pattern[: min(ends)] if ends else pattern


def _matcher(patterns: Iterable[str]) -> Callable[[str], bool]:
    """Whether a text matches one of several globs (fnmatch(3), ``*`` for every character)."""
    patterns = tuple(patterns)
    if not patterns:
        return lambda _: False
    # fnmatch keeps fewer compiled globs than a policy may have, and compiles the others at every look.
    match = re.compile("|".join(map(translate, patterns))).match
    return lambda text: match(text) is not None


#: The policy of a site without policy files: whatever the administrator put into the shared store may be run by
#: anybody.
BUILT_IN = (Rule(name="shared-store", action="allow", file="built-in policy"),)
