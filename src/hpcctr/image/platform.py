"""Which processor an image is for, and which images a node can run.

Words and defaults: OCI image-spec ``image-index.md`` (platform variants) and Go's GOARCH. A variant names a minimum,
so a node also runs what asks for less."""

from __future__ import annotations

import re

from hpcctr.context import machine
from hpcctr.errors import UsageWrong
from hpcctr.image.record import Platform

_WORD = re.compile(r"[a-z0-9_]{1,32}", re.ASCII)
#: Variants a processor of the key's architecture may have, newest first. The last one is what no variant means.
_VARIANTS = {"amd64": ("v4", "v3", "v2", "v1"), "arm64": ("v9", "v8"), "arm": ("v8", "v7", "v6", "v5")}
_UNSAID = {"amd64": "v1", "arm64": "v8", "arm": "v7"}
_OTHER_NAMES = {"x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64", "i386": "386", "armhf": "arm"}


def normal(platform: Platform) -> Platform:
    """The same platform in one spelling: other names of an architecture replaced, the variant left out where it is
    implied."""
    architecture = _OTHER_NAMES.get(platform.architecture.lower(), platform.architecture.lower())
    variant = platform.variant.lower()
    if variant.isdigit():
        variant = f"v{variant}"
    if variant == _UNSAID.get(architecture):
        variant = ""
    return Platform(os=platform.os.lower(), architecture=architecture, variant=variant)


def of_this_node() -> Platform:
    """The platform of the machine this runs on, without a variant."""
    return normal(Platform(os="linux", architecture=machine()))


def parse(text: str) -> Platform:
    """``linux/arm64``, ``linux/arm/v7`` or just ``arm64``. Raises :class:`UsageWrong`."""
    words = text.split("/")
    if len(words) == 1:
        words = ["linux", *words]
    if len(words) not in (2, 3) or not all(_WORD.fullmatch(word.lower().replace("-", "_")) for word in words):
        raise UsageWrong(f"platform {text!r} is not OS/ARCH[/VARIANT]", hint="for instance --platform linux/arm64")
    platform = normal(Platform(os=words[0], architecture=words[1], variant=words[2] if len(words) == 3 else ""))
    if platform.os != "linux":
        raise UsageWrong(f"platform {text!r} is not one of Linux", hint="for instance --platform linux/arm64")
    return platform


def acceptable(wanted: Platform) -> tuple[Platform, ...]:
    """The platforms whose images serve ``wanted``, best first, in the spelling of :func:`normal`."""
    wanted = normal(wanted)
    known = _VARIANTS.get(wanted.architecture, ())
    at_most = wanted.variant or _UNSAID.get(wanted.architecture, "")
    if at_most not in known:
        return (wanted,) if not wanted.variant else (wanted, normal(_with_variant(wanted, "")))
    return tuple(normal(_with_variant(wanted, variant)) for variant in known[known.index(at_most) :])


def file_word(platform: Platform) -> str:
    """How the platform is written in a file name of the store: ``amd64``, ``arm-v6``."""
    platform = normal(platform)
    return platform.architecture + (f"-{platform.variant}" if platform.variant else "")


def of_file_word(word: str) -> Platform:
    """The platform :func:`file_word` wrote."""
    architecture, _, variant = word.partition("-")
    return Platform(os="linux", architecture=architecture, variant=variant)


def is_usable(platform: Platform) -> bool:
    """Whether it is one of Linux with words that can stand in a file name."""
    words = (platform.architecture, platform.variant or "v")
    return platform.os == "linux" and all(_WORD.fullmatch(word) for word in words)


def _with_variant(platform: Platform, variant: str) -> Platform:
    return Platform(os=platform.os, architecture=platform.architecture, variant=variant)
