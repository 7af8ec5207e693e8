"""Directories for sockets, stores and state that ordinary users may walk through.

pytest's own temporary directories are closed to everyone but root, and lie in /tmp, which containers see as the
caller's: a test that put its store there would prove too much.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PLACE = Path("/var/lib/hpcctr-test")


@contextlib.contextmanager
def scratch(name: str) -> Iterator[Path]:
    """A directory owned by root, mode 0755, below directories only root may write; removed at the end."""
    PLACE.mkdir(mode=0o755, parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=PLACE))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)
