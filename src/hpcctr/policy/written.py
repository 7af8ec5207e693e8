"""Rules as they are written: the text of one policy file to :class:`hpcctr.policy.rules.Rule`. Pure.

Whatever is wrong is a :class:`PolicyUnusable` that names the file, the rule, and what to do: a rule that could never
match, or would match something else than it says, is a denial of everything and not a surprise.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from typing import Literal, NoReturn, TypeAlias

import msgspec

from hpcctr.errors import PolicyUnusable, ReferenceWrong
from hpcctr.image.reference import ImageRef, is_digest
from hpcctr.policy.rules import PRIVATE, Rule, before_glob

#: Of one file.
BYTES_MAX = 1 << 20
RULES_MAX = 1000
#: Characters of a name, and entries and characters of an entry in a list.
_NAME_MAX = 128
_ENTRIES_MAX = 1000
_ENTRY_MAX = 4096

_Entries: TypeAlias = tuple[str, ...]


class _Written(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One ``[[rule]]``, value by value."""

    name: str
    action: Literal["allow", "deny"]
    users: _Entries = ("*",)
    images: _Entries = ("*",)
    registries: _Entries | None = None
    targets: _Entries | None = None
    features: _Entries | None = None
    devices: _Entries | None = None


def parse(raw: bytes, path: str) -> tuple[Rule, ...]:
    """The rules of a file's content; ``path`` is for messages, its last part the file's name in labels.

    Raises :class:`PolicyUnusable`.
    """
    if len(raw) > BYTES_MAX:
        _refuse(path, f"larger than {BYTES_MAX} bytes", remedy="split it into several files")
    try:
        untrusted = tomllib.loads(raw.decode())
    except UnicodeDecodeError:
        _refuse(path, "not text in UTF-8", remedy=f"file {path}")
    except (ValueError, RecursionError) as error:
        # ValueError alone: an integer of more digits than Python takes.
        _refuse(path, f"not TOML: {str(error)[:300]}", remedy=f"hpcctr engine check {path}")
    for key in untrusted:
        if key != "rule":
            _refuse(path, f"has a key {key[:100]!r} beside its rules", remedy="every rule begins with [[rule]]")
    tables = untrusted.get("rule", [])
    if not isinstance(tables, list):
        _refuse(path, "rule is not a list of tables", remedy="begin every rule with [[rule]]")
    if len(tables) > RULES_MAX:
        _refuse(path, f"{len(tables)} rules, {RULES_MAX} are possible", remedy="split it into several files")
    rules: list[Rule] = []
    for number, table in enumerate(tables, 1):
        rule = _rule(table, path, number)
        if any(earlier.name == rule.name for earlier in rules):
            _refuse(f"{path}, rule {rule.name!r}", "another rule of this file has its name", remedy="rename one")
        rules.append(rule)
    return tuple(rules)


def _rule(table: object, path: str, number: int) -> Rule:
    name = table.get("name") if isinstance(table, dict) else None
    where = f"{path}, rule {name[:_NAME_MAX]!r}" if isinstance(name, str) and name else f"{path}, rule {number}"
    try:
        written = msgspec.convert(table, _Written)
    except msgspec.ValidationError as error:
        _refuse(where, str(error)[:300], remedy="the keys of a rule are in docs/site.md, Policy")
    _require_text(where, "name", written.name, maximum=_NAME_MAX)
    checks: tuple[tuple[str, _Entries | None, Callable[[str], str]], ...] = (
        ("users", written.users, _user_problem),
        ("images", written.images, _image_problem),
        ("registries", written.registries, _registry_problem),
        ("targets", written.targets, _target_problem),
        ("features", written.features, _no_problem),
        ("devices", written.devices, _no_problem),
    )
    for key, entries, problem_of in checks:
        _require_entries(where, key, entries, problem_of, may_be_empty=written.action == "allow" and key in _THINGS)
    return Rule(**msgspec.structs.asdict(written), file=os.path.basename(path))


#: Lists of which an allow rule may say that nothing is to be asked for.
_THINGS = ("targets", "features", "devices")


def _require_entries(
    where: str, key: str, entries: _Entries | None, problem_of: Callable[[str], str], *, may_be_empty: bool
) -> None:
    if entries is None:
        return
    if not entries and not may_be_empty:
        _refuse(where, f"{key} is empty, so that the rule is about nothing", remedy=f"leave {key} out: for everything")
    if len(entries) > _ENTRIES_MAX:
        _refuse(where, f"{key} has {len(entries)} entries, {_ENTRIES_MAX} are possible", remedy="make it several rules")
    for entry in entries:
        _require_text(where, key, entry, maximum=_ENTRY_MAX)
        problem = problem_of(entry)
        if problem:
            _refuse(where, f"{key}: {entry[:200]!r} {problem}", remedy="docs/site.md, Policy")


def _require_text(where: str, key: str, text: str, *, maximum: int) -> None:
    problem = ""
    if not text.strip():
        problem = "is empty"
    elif len(text) > maximum:
        problem = f"is longer than {maximum} characters"
    elif not text.isprintable():
        problem = "has a control character, or another that cannot be printed"
    elif text != text.strip():
        problem = "begins or ends with a blank"
    if problem:
        _refuse(where, f"{key}: {text[:200]!r} {problem}", remedy="write it as it is to be shown")


def _user_problem(user: str) -> str:
    if user != "*" and ("*" in user or user.startswith("@*")):
        return "is no user: names are written out, * alone is everybody"
    if user == "@":
        return "names no group"
    if ":" in user or "/" in user or "," in user:
        return "is no name of a user or group: one entry for each, groups with an @ before them"
    return ""


def _image_problem(pattern: str) -> str:
    """Names of images have registry and tag; what only reads as if it meant an image would never match."""
    literal = before_glob(pattern)
    name = pattern.removeprefix(PRIVATE)
    if literal == pattern:
        canonical = _canonical(name)
        if canonical == name:
            return ""
        return f"is no name as hpcctr gives it to rules{f': {pattern[: -len(name)]}{canonical}' if canonical else ''}"
    first, slash, _ = literal.removeprefix(PRIVATE).partition("/")
    return f"begins with no registry: {_registry_problem(first)}" if slash and _registry_problem(first) else ""


def _canonical(name: str) -> str:
    """The name of an image as rules see it; empty when there is none."""
    if is_digest(name):
        return name
    try:
        ref = ImageRef.parse(name)
    except ReferenceWrong:
        return ""
    return "" if ref.is_file else str(ref.name_in_store())


def _registry_problem(registry: str) -> str:
    """Only what :class:`ImageRef` makes of a name can be compared with what it makes of another."""
    try:
        canonical = ImageRef.parse(f"{registry}/a/b").registry
    except ReferenceWrong:
        canonical = ""
    if canonical == registry:
        return ""
    return f"{registry} is not HOST[:PORT] as names have it{f', {canonical} is' if canonical else ''}"


def _target_problem(target: str) -> str:
    if not target.startswith("/"):
        return "is not an absolute path"
    if target != "/" and any(part in ("", ".", "..") for part in target[1:].split("/")):
        return "is not a plain path: no . or .., no two slashes, none at the end"
    return ""


def _no_problem(_: str) -> str:
    return ""


def _refuse(where: str, problem: str, *, remedy: str) -> NoReturn:
    raise PolicyUnusable(f"{where}: {problem}", hint=remedy)
