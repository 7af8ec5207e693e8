"""Reads ``policy.d``. Anything wrong with it denies everything and says which file: :class:`PolicyUnusable`.

It is read at every launch, so an edit counts from the next launch on. What was parsed is kept by the files' content:
no time stamp is trusted, so there is no edit that is not seen.
"""

from __future__ import annotations

import os
import threading

from hpcctr import rootfiles
from hpcctr.errors import PolicyUnusable
from hpcctr.policy.rules import BUILT_IN, Rule
from hpcctr.policy.written import BYTES_MAX, parse
from hpcctr.rootfiles import require_only_roots_way

#: Files of a policy directory, and rules of all of them.
FILES_MAX = 200
RULES_MAX = 5000

#: Parsing takes many times what reading does: of launches at once that find an edit, one parses it.
_parsing = threading.Lock()
#: The content of the policy directory that was read last, and its rules.
_last: tuple[str, list[tuple[str, bytes]], tuple[Rule, ...]] | None = None


def load(directory: str, *, root_owned: bool = True) -> tuple[Rule, ...]:
    """The rules of every ``*.toml`` in ``directory``; :data:`BUILT_IN` when the directory does not exist.

    Names that begin with a dot are no policy: editors make them. An existing directory without rules denies everything.
    Without ``root_owned`` it may be anybody's: for trying out what is to become policy. Raises :class:`PolicyUnusable`.
    """
    _require_plain(directory)
    if root_owned:
        require_only_roots_way(os.path.dirname(directory))
    contents = rootfiles.contents(
        directory,
        bytes_max=BYTES_MAX,
        files_max=FILES_MAX,
        root_owned=root_owned,
        too_many=lambda text: PolicyUnusable(text, hint="put rules together"),
    )
    if contents is None:
        return BUILT_IN
    with _parsing:
        return _rules_of(directory, contents)


def _rules_of(directory: str, contents: list[tuple[str, bytes]]) -> tuple[Rule, ...]:
    global _last  # noqa: PLW0603
    if _last is not None and _last[:2] == (directory, contents):
        return _last[2]
    rules = tuple(rule for name, raw in contents for rule in parse(raw, f"{directory}/{name}"))
    if len(rules) > RULES_MAX:
        raise PolicyUnusable(
            f"{directory}: {len(rules)} rules, {RULES_MAX} are possible", hint="several users or images in one rule"
        )
    _last = (directory, contents, rules)
    return rules


def load_file(path: str, *, root_owned: bool = True) -> tuple[Rule, ...]:
    """The rules of one file. Raises :class:`PolicyUnusable`."""
    path = os.path.abspath(path)
    directory, name = os.path.split(path)
    if root_owned:
        require_only_roots_way(directory)
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise rootfiles.unreadable(path, error) from None
    try:
        return parse(rootfiles.content(descriptor, name, path, bytes_max=BYTES_MAX, root_owned=root_owned), path)
    finally:
        os.close(descriptor)


def _require_plain(directory: str) -> None:
    if not directory.startswith("/") or os.path.normpath(directory) != directory or directory == "/":
        raise PolicyUnusable(
            f"policy-directory = {directory!r} is not a plain absolute path", hint="edit policy-directory of site.toml"
        )
