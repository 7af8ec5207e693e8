"""The section ``hooks``: programs of the host's that the site has named, run by the runtime while it builds."""

from __future__ import annotations

from collections.abc import Sequence

from hpcctr.host.edits import HookEdit

#: Seconds of a hook whose file says none, and of any.
TIMEOUT = 10
TIMEOUT_MAX = 30


def hooks(edits: Sequence[HookEdit]) -> dict[str, list[dict[str, object]]]:
    """The section, in the edits' order; nothing without edits.

    A runtime that is given no environment would hand its own on, so there always is one.
    """
    section: dict[str, list[dict[str, object]]] = {}
    for edit in edits:
        section.setdefault(edit.stage, []).append(
            {
                "path": edit.path,
                "args": list(edit.args) or [edit.path],
                "env": list(edit.env),
                "timeout": min(edit.timeout or TIMEOUT, TIMEOUT_MAX),
            }
        )
    return section
