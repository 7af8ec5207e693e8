"""Running a function of a test module in a mount namespace of its own, so that what it mounts ends with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_CHILD = """
import importlib, json, sys
module, name, arguments = sys.argv[1:]
print(json.dumps(getattr(importlib.import_module(module), name)(*json.loads(arguments))))
"""


def in_private_mounts(function: Callable[..., Any], *arguments: Any, timeout: float = 60) -> Any:
    """What `function` returns there. Arguments and result are JSON; an exception fails the test with its traceback."""
    argv = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", _CHILD]
    run = subprocess.run(
        [*argv, function.__module__, function.__name__, json.dumps([_plain(argument) for argument in arguments])],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={"PATH": os.defpath + ":/usr/sbin:/sbin", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def _plain(argument: Any) -> Any:
    return str(argument) if isinstance(argument, Path) else argument
