"""CDI files in the shapes that vendors' generators write, over libraries and device nodes that stand in."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_HOOK = "/usr/bin/nvidia-cdi-hook"


def a_file(**changes: Any) -> dict[str, Any]:
    """The smallest file that is right, and what to change of it."""
    return {
        "cdiVersion": "1.1.0",
        "kind": "vendor.com/device",
        "devices": [{"name": "one", "containerEdits": {"env": ["ONE=1"]}}],
    } | changes


def write(directory: Path, name: str, document: object) -> Path:
    """Write a document, or text as it is, as a file of root's."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    path.chmod(0o644)
    return path


def nvidia_like(
    libraries: Path,
    *,
    driver: str = "550.54.15",
    gpus: Sequence[tuple[str, Sequence[str]]] = (("0", ()), ("1", ())),
    common: Sequence[str] = (),
    hooks: bool = True,
    inside: str = "/usr/lib/x86_64-linux-gnu",
) -> str:
    """YAML as nvidia-ctk writes it, of these GPUs (name, device nodes) and of the libraries that ``driver`` has."""
    lines = ["---", "cdiVersion: 0.5.0", "kind: nvidia.com/gpu", "devices:"]
    every = [node for _, nodes in gpus for node in nodes]
    for name, nodes in (*gpus, ("all", list(dict.fromkeys(every)))):
        lines += [f'    - name: "{name}"' if name[0].isdigit() else f"    - name: {name}", "      containerEdits:"]
        lines += [f"        {line}" for line in _nodes(nodes)] or ["        env: [STANDS_IN=1]"]
    lines += ["containerEdits:", "    env:", f"        - NVIDIA_CTK_LIBCUDA_DIR={inside}"]
    lines += ["        - NVIDIA_VISIBLE_DEVICES=void", *(f"    {line}" for line in _nodes(common))]
    if hooks:
        lines.append("    hooks:")
        for words in (
            ("create-symlinks", "--link", f"libcuda.so.1::{inside}/libcuda.so"),
            ("enable-cuda-compat", f"--host-driver-version={driver}"),
            ("update-ldcache", "--folder", inside),
            ("disable-device-node-modification",),
        ):
            lines += ["        - hookName: createContainer", f"          path: {_HOOK}", "          args:"]
            lines += [f"            - {word}" for word in ("nvidia-cdi-hook", *words)]
            lines += ["          env:", "            - NVIDIA_CTK_DEBUG=false"]
    lines.append("    mounts:")
    for stem in ("libcuda.so", "libnvidia-ml.so"):
        lines += [
            f"        - hostPath: {libraries}/{stem}.{driver}",
            f"          containerPath: {inside}/{stem}.{driver}",
        ]
        lines += [
            "          options:",
            *(f"            - {word}" for word in ("ro", "nosuid", "nodev", "rbind", "rprivate")),
        ]
    return "\n".join(lines) + "\n"


def _nodes(nodes: Sequence[str]) -> list[str]:
    lines = [line for node in nodes for line in (f"    - path: {node}", f"      hostPath: {node}")]
    return ["deviceNodes:", *lines] if lines else []


def nvidia_libraries(directory: Path, driver: str = "550.54.15") -> Path:
    """Empty files with the names of a driver's libraries, and the links ldconfig makes."""
    directory.mkdir(parents=True, exist_ok=True)
    for stem in ("libcuda.so", "libnvidia-ml.so"):
        (directory / f"{stem}.{driver}").write_bytes(b"")
        link = directory / f"{stem}.1"
        link.unlink(missing_ok=True)
        link.symlink_to(f"{stem}.{driver}")
    return directory


def amd_like(gpus: Sequence[Sequence[str]], common: Sequence[str]) -> dict[str, Any]:
    """A document as amd-ctk 1.2 writes it: every node with its numbers, mode and owner."""

    def node(path: str) -> dict[str, Any]:
        status = os.lstat(path)
        return {
            "path": path,
            "type": "c",
            "major": os.major(status.st_rdev),
            "minor": os.minor(status.st_rdev),
            "fileMode": 0o660,
            "permissions": "rwm",
            "uid": 0,
            "gid": 44,
        }

    devices = [(str(index), [*nodes, *common]) for index, nodes in enumerate(gpus)]
    devices.append(("all", [*(path for nodes in gpus for path in nodes), *common]))
    return {
        "cdiVersion": "0.6.0",
        "kind": "amd.com/gpu",
        "devices": [
            {"name": name, "containerEdits": {"deviceNodes": [node(path) for path in nodes]}} for name, nodes in devices
        ],
        "containerEdits": {},
    }


@contextlib.contextmanager
def stand_ins(count: int) -> Iterator[list[str]]:
    """Device nodes in /dev that nothing else uses, with the numbers of /dev/null and on. They stand in for GPUs."""
    paths = [f"/dev/hpcctr-cdi-{os.getpid()}-{number}" for number in range(count)]
    try:
        for number, path in enumerate(paths):
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3 + number))
        yield paths
    finally:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
