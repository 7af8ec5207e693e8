"""Image files for tests of the engine's lower half: a squashfs and the record that would lie beside it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

BUSYBOX = "/usr/bin/busybox"


def busybox_tree(root: Path) -> None:
    """A root with a shell and the usual directories, an /etc of its own, and some traps."""
    for name in ("bin", "etc", "dev", "proc", "sys", "tmp", "usr/share", "var"):
        (root / name).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    shutil.copy(BUSYBOX, root / "bin/busybox")
    for applet in ("sh", "cat", "ls", "sleep", "id", "stat", "touch", "true"):
        (root / "bin" / applet).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    (root / "etc/os-release").write_text("ID=busybox\n")
    (root / "var/run").symlink_to("../tmp")
    (root / "escape").symlink_to("/")


def make_squashfs(file: Path, fill: Callable[[Path], None] = busybox_tree) -> Path:
    """Write an image file of what `fill` puts into an empty directory; everything in it belongs to root."""
    tree = file.with_suffix(".tree")
    tree.mkdir()
    fill(tree)
    argv = ["mksquashfs", str(tree), str(file), "-all-root", "-quiet", "-no-progress", "-comp", "gzip"]
    subprocess.run(argv, check=True, capture_output=True)
    shutil.rmtree(tree)
    return file
