"""Whether libraries of the node would load in an image: the symbol versions they need against those there are.

Pure, from what the image's conversion noted and the headers of the node's files, both kept: milliseconds. ld.so checks
the same when a program starts (elf/dl-version.c), and says it in words that name neither image nor remedy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from hpcctr.host.edits import HostEdits
from hpcctr.host.libraries import FOLDER, ShownFile, defines_of, is_of_glibc, shown
from hpcctr.host.loading import cannot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hpcctr.image.record import ImageFacts

#: The first distributions with a version of glibc, for hints.
_DISTRIBUTIONS = (
    ((2, 28), "Debian 10, Rocky Linux 8"),
    ((2, 31), "Debian 11, Ubuntu 20.04, SLES 15 SP3"),
    ((2, 34), "Rocky Linux 9, Ubuntu 22.04"),
    ((2, 35), "Ubuntu 22.04, Debian 12"),
    ((2, 36), "Debian 12, Ubuntu 24.04"),
    ((2, 39), "Ubuntu 24.04, Rocky Linux 10, Debian 13"),
    ((2, 41), "Debian 13"),
)
_NUMBERS = re.compile(r"[0-9]+")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One reason why a program may not work."""

    #: ``refuse``: a library that was asked for cannot load. ``note``: true of every image that is newer than the node,
    #: and seldom of any consequence.
    level: Literal["note", "warn", "refuse"]
    text: str
    hint: str = ""


def problems(edits: HostEdits, facts: ImageFacts | None) -> tuple[Problem, ...]:
    """What does not fit, refusals first."""
    files = shown(edits)
    libraries = [file for file in files if file.is_findable]
    if not files:
        return ()
    if facts is None:
        return (
            Problem(
                level="warn",
                text="the image was stored before its libraries were noted: whether the node's fit cannot be told",
                hint="hpcctr rm IMAGE, hpcctr pull IMAGE",
            ),
        )
    reason = cannot(facts)
    if reason and libraries:
        return (
            Problem(
                level="refuse",
                text=f"{reason}: {_names(libraries)} of the node cannot be loaded",
                hint=f"use an image with glibc (Debian, Ubuntu, Rocky Linux, …), or leave {_origins(libraries)} out",
            ),
        )
    found = [*_unmet(files, libraries, facts), *_hidden(libraries, facts)]
    return tuple(sorted(found, key=lambda problem: problem.level != "refuse"))


def _unmet(files: Sequence[ShownFile], libraries: Sequence[ShownFile], facts: ImageFacts) -> Iterable[Problem]:
    """Needs that neither the image nor the node's libraries meet, one problem for each library that lacks something."""
    host = {file.soname: frozenset(file.file.defines) for file in reversed(libraries)}
    image = defines_of(facts)
    lacking: dict[tuple[str, bool], dict[ShownFile, set[str]]] = {}
    missing: dict[str, list[ShownFile]] = {}
    for file in files:
        for name, wanted in file.file.needs:
            defines = host.get(name, image.get(name))
            # A library without any versions takes all (ld.so only says so).
            if defines and (less := set(wanted) - defines):
                lacking.setdefault((name, file.is_in_directory), {})[file] = less
        if file.target.startswith(f"{FOLDER}/"):
            for name in file.file.needed:
                if name not in host and name not in image and "/" not in name and not is_of_glibc(name):
                    missing.setdefault(name, []).append(file)
    for (name, is_in_directory), needs in lacking.items():
        level: Literal["warn", "refuse"] = "warn" if is_in_directory else "refuse"
        has = host.get(name, image.get(name, frozenset()))
        yield _lacking(name, needs, level, facts, has, is_of_host=name in host)
    for name, needing in missing.items():
        yield Problem(
            level="refuse",
            text=f"{_names(needing)} of the node needs {name}, which neither the node nor the image has",
            hint=f"install {name} on the node or in the image, or leave {_origins(needing)} out",
        )


def _lacking(
    name: str,
    needs: dict[ShownFile, set[str]],
    level: Literal["warn", "refuse"],
    facts: ImageFacts,
    defines: Collection[str],
    *,
    is_of_host: bool,
) -> Problem:
    most = max((version for wanted in needs.values() for version in wanted), key=_by_number)
    files = sorted(needs, key=lambda file: most not in needs[file])
    leave = f"leave {_origins(files)} out"
    whose = "the node's" if is_of_host else "the image's"
    has = f"{whose} has {_plain(_best(most, defines)) or 'none of that kind'}"
    remedy = f"use an image with a newer {name}, or {leave}"
    if most.startswith("GLIBC_") and is_of_glibc(name):
        has = f"the image has glibc {_plain(facts.libc_version)}"
        remedy = f"use an image with glibc {most.removeprefix('GLIBC_')} or newer{_distributions(most)}, or {leave}"
    return Problem(level=level, text=f"{_names(files)} of the node needs {most} of {name}, and {has}", hint=remedy)


def _hidden(libraries: Sequence[ShownFile], facts: ImageFacts) -> Iterable[Problem]:
    """Libraries of the node that take the place of newer ones of the image's. Private versions are for a library's own
    parts, which come from the node as well.
    """
    image = defines_of(facts)
    for file in {file.soname: file for file in reversed(libraries)}.values():
        less = {
            version
            for version in image.get(file.soname, frozenset()) - frozenset(file.file.defines)
            if "PRIVATE" not in version
        }
        if less:
            most = max(less, key=_by_number)
            yield Problem(
                level="note",
                text=f"{file.soname} of the node takes the place of the image's and lacks its {_plain(most)}: "
                "programs of the image that need it will not start",
                hint=f"update it on the node, or leave {_origins([file])} out",
            )


def _plain(untrusted_text: str) -> str:
    """An image's word for a message."""
    return (
        untrusted_text
        if len(untrusted_text) <= 64 and untrusted_text.isascii() and untrusted_text.isprintable()
        else "?"
    )


def _best(version: str, defines: Collection[str]) -> str:
    """The highest version there is of the same kind (``GLIBCXX_3.4.28`` for a missing ``GLIBCXX_3.4.32``)."""
    kind = version.partition("_")[0] + "_"
    return max((one for one in defines if one.startswith(kind) and "PRIVATE" not in one), key=_by_number, default="")


def _by_number(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in _NUMBERS.findall(version)[:8] if len(number) < 20)


def _distributions(version: str) -> str:
    wanted = _by_number(version)[:2]
    names = next((names for least, names in _DISTRIBUTIONS if wanted <= least), "")
    return f" ({names} or newer)" if names else ""


def _origins(files: Iterable[ShownFile]) -> str:
    """What to leave out: a profile by its name."""
    origins = (file.origin for file in files)
    names = (os.path.basename(one).removesuffix(".toml") if one.endswith(".toml") else one for one in origins)
    return " and ".join(dict.fromkeys(names))


def _names(files: Sequence[ShownFile]) -> str:
    """The first one's name as the node has it, and how many there are beside it."""
    name = files[0].source.rpartition("/")[2]
    return name if len(files) == 1 else f"{name} (and {len(files) - 1} more)"
