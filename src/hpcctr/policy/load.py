"""Reads ``policy.d``. Anything wrong with it denies everything and says which file: :class:`PolicyUnusable`."""

from __future__ import annotations

import os
import stat

import msgspec

from hpcctr.errors import PolicyUnusable
from hpcctr.policy.rules import BUILT_IN, PolicyFile, Rule
from hpcctr.site import read_root_owned


def load(directory: str) -> tuple[Rule, ...]:
    """The rules of every ``*.toml`` in ``directory``; :data:`BUILT_IN` when the directory does not exist.

    An existing directory without rules denies everything. Raises :class:`PolicyUnusable`.
    """
    try:
        status = os.lstat(directory)
    except FileNotFoundError:
        return BUILT_IN
    except OSError as error:
        raise PolicyUnusable(f"{directory}: {error.strerror}", hint=f"ls -ld {directory}") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != 0 or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PolicyUnusable(
            f"{directory} is not a directory that only root can write",
            hint=f"chown root:root {directory} && chmod go-w {directory}",
        )
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".toml"))  # noqa: PTH208
    except OSError as error:
        raise PolicyUnusable(f"{directory}: {error.strerror}", hint=f"ls -ld {directory}") from None
    rules: list[Rule] = []
    for name in names:
        rules += _rules_of(f"{directory}/{name}", name)
    return tuple(rules)


def _rules_of(path: str, name: str) -> list[Rule]:
    try:
        parsed = msgspec.toml.decode(read_root_owned(path), type=PolicyFile)
    except OSError as error:
        raise PolicyUnusable(f"{path}: {error.strerror}", hint=f"ls -l {path}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PolicyUnusable(f"{path}: {error}", hint=f"hpcctr engine check {path}") from None
    seen: set[str] = set()
    for rule in parsed.rule:
        if not rule.name or rule.name in seen:
            raise PolicyUnusable(
                f"{path}: rule {rule.name!r} has no name of its own", hint=f"name every rule in {path}"
            )
        seen.add(rule.name)
    return [msgspec.structs.replace(rule, file=name) for rule in parsed.rule]
