"""``hpcctr engine check``: site and policy as the engine reads them, and what it would decide, with its own code."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import typer

from hpcctr.cli.progress import say
from hpcctr.cli.table import Format, print_rows, printable
from hpcctr.context import Caller, machine
from hpcctr.errors import ImageGone, ImageNotInStore, PlatformMissing, PolicyDenied, StoreUnusable, UsageWrong
from hpcctr.image import shelves
from hpcctr.image.record import Platform, StoredImage
from hpcctr.image.reference import ImageRef
from hpcctr.image.shelves import SharedName, is_shared_name
from hpcctr.policy import account, load
from hpcctr.policy.aliases import other_names
from hpcctr.policy.decide import Verdict, verdict
from hpcctr.policy.rules import PRIVATE, Asked, Rule
from hpcctr.policy.shadow import shadowed
from hpcctr.policy.written import BYTES_MAX
from hpcctr.request import target_problem
from hpcctr.site import DEFAULT_PATH, Site

_COLUMNS = ("action", "rule", "file", "users", "images", "registries", "targets", "features", "devices")
_RULE_KEY = re.compile(r"^\s*(\[\[?\s*)?[\"']?rule[\"']?\s*[\]=]", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What was read: rules in deciding order, and the site that images are looked up at."""

    #: What it was, for people.
    what: str
    rules: tuple[Rule, ...]
    site: Site


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """A launch that nobody makes."""

    user: str
    #: As for ``hpcctr run``; with ``is_private``, what the user calls an image of their own.
    image: str
    is_private: bool = False
    #: Names or numbers of groups, beside those that the name service knows the user in.
    groups: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()


def read(file: str | None) -> Checked:
    """A site file, a policy file or a policy directory: a directory is one of policy, and a file that has a ``rule``.

    For root, who may write them is looked at, as the engine does; others may try out what is still theirs. Raises
    :class:`PolicyUnusable`, :class:`SiteFileWrong`.
    """
    is_root = os.geteuid() == 0
    if file is not None and Path(file).is_dir():
        rules = load.load(os.path.abspath(file), root_owned=is_root)  # noqa: PTH100
        return Checked(what=f"{file}: a policy directory, {len(rules)} rules", rules=rules, site=Site.of_this_process())
    if file is not None and _is_policy(Path(file)):
        rules = load.load_file(file, root_owned=is_root)
        return Checked(what=f"{file}: a policy file, {len(rules)} rules", rules=rules, site=Site.of_this_process())
    site = Site.load(file, root_owned=is_root)
    rules = load.load(site.policy_directory, root_owned=is_root)
    return Checked(
        what=f"{file or DEFAULT_PATH}: a site file; {site.policy_directory}: {len(rules)} rules", rules=rules, site=site
    )


def show(checked: Checked, format: Format) -> None:  # noqa: A002
    """Print the rules in deciding order, and what of them can never decide."""
    never = list(shadowed(checked.rules))
    by = {id(rule): earlier for rule, earlier in never}
    rows = [_row(rule, by.get(id(rule))) for rule in checked.rules]
    if format is Format.TABLE:
        print_rows([{key: _cell(row[key]) for key in _COLUMNS} for row in rows], _COLUMNS, format)
    else:
        print_rows(rows, _COLUMNS, format)
    for rule, earlier in never:
        say(printable(f"warning: {rule.label} never decides: {earlier.label} does before it"))
    say(printable(f"{checked.what}, otherwise deny"))


def tell(checked: Checked, asked: WhatIf, format: Format) -> int:  # noqa: A002
    """Print what would be decided, and by which rule; the exit status is that of a launch so far: 0, or of a denial.

    Raises :class:`UsageWrong`, :class:`ReferenceWrong`, :class:`DeadlinePassed`.
    """
    result = would_decide(checked, asked)
    if format is Format.JSON:
        rule = result.rule
        words = {
            "decision": "allow" if result.is_allowed else "deny",
            "rule": rule.name if rule is not None else None,
            "file": rule.file if rule is not None else None,
            "text": result.text,
        }
        typer.echo(json.dumps(words, indent=2))
    else:
        typer.echo(printable(result.text))
    return 0 if result.is_allowed else PolicyDenied.exit_status


def would_decide(checked: Checked, asked: WhatIf) -> Verdict:
    """The decision. An image that the store has is taken as a launch takes it, one that it lacks as a pull does."""
    for target in asked.targets:
        problem = target_problem(os.fsencode(target))
        if problem:
            raise UsageWrong(f"--target {target!r} {problem}", hint="a place inside the container: /scratch/data")
    caller = _caller(asked)
    image = None if asked.is_private else _stored(checked.site, caller, asked.image)
    return verdict(
        checked.rules,
        Asked(
            user_names=account.names_for(checked.rules, caller),
            image_name=image.policy_name if image is not None else _name(asked),
            other_names=other_names(checked.rules, checked.site.store, image) if image is not None else (),
            # In the order in which a request has them, for the words of a denial.
            targets=tuple(sorted(map(os.fsencode, asked.targets), key=lambda path: path.split(b"/"))),
            features=asked.features,
            devices=asked.devices,
        ),
    )


def _is_policy(path: Path) -> bool:
    """Whether a file is one of policy: no site file has a key ``rule``. One that is no TOML is what it looks like."""
    try:
        if not path.is_file():
            # Refused by whoever reads it in earnest.
            return False
        with path.open("rb") as opened:
            text = opened.read(BYTES_MAX).decode()
    except (OSError, UnicodeDecodeError):
        return False
    try:
        return "rule" in tomllib.loads(text)
    except (ValueError, RecursionError):
        return _RULE_KEY.search(text) is not None


def _row(rule: Rule, earlier: Rule | None) -> dict[str, object]:
    return {
        "action": rule.action,
        "rule": rule.name,
        "file": rule.file,
        "users": rule.users,
        "images": rule.images,
        "registries": rule.registries,
        "targets": rule.targets,
        "features": rule.features,
        "devices": rule.devices,
        "shadowed_by": earlier.label if earlier is not None else None,
    }


def _cell(value: object) -> object:
    """A list in a table: ``*`` for one that was not written, ``-`` for one that has nothing in it."""
    if value is None:
        return "*"
    return ",".join(value) or "-" if isinstance(value, tuple) else value


def _caller(asked: WhatIf) -> Caller:
    """The user with the groups that a login gives, and those that were named."""
    uid = account.uid_of(asked.user, asked_by=os.getuid())
    if uid is None:
        raise UsageWrong(f"--as {asked.user}: no such user", hint=f"getent passwd {asked.user}; or a uid")
    known: list[int] = []
    with contextlib.suppress(KeyError):
        entry = account.with_deadline(lambda: pwd.getpwuid(uid), uid=uid)
        known = [
            entry.pw_gid,
            *account.with_deadline(lambda: os.getgrouplist(entry.pw_name, entry.pw_gid), uid=uid),
        ]
    groups = [*known, *(_gid(group) for group in asked.groups)]
    if not groups:
        raise UsageWrong(
            f"--as {asked.user}: the name service knows no group of theirs",
            hint="--group, as often as there are groups",
        )
    return Caller(pid=0, pidfd=-1, uid=uid, gid=groups[0], groups=tuple(sorted(set(groups))))


def _gid(group: str) -> int:
    gid = account.gid_of(group.removeprefix("@"), asked_by=os.getuid())
    if gid is None:
        raise UsageWrong(f"--group {group}: no such group", hint=f"getent group {group}; or a gid")
    return gid


def _stored(site: Site, caller: Caller, image: str) -> StoredImage | None:
    try:
        return shelves.find(
            site.store,
            caller.uid,
            image,
            Platform(os="linux", architecture=machine()),
            gids=(caller.gid, *caller.groups),
        )
    except (ImageGone, ImageNotInStore, PlatformMissing, StoreUnusable):
        return None


def _name(asked: WhatIf) -> str:
    """What an image is going to be known by that is not there yet."""
    text = asked.image
    if is_shared_name(text):
        name = SharedName.parse(text).name
        return PRIVATE + (name if name.startswith("sha256:") else str(ImageRef.parse(name).name_in_store()))
    name = text if text.startswith("sha256:") else str(ImageRef.parse(text).name_in_store())
    return f"{PRIVATE}{name}" if asked.is_private else name
