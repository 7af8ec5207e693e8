"""Libraries and programs built by tests, with SONAMEs, search paths and symbol versions as they want them.

They are linked without any C library: a "libc.so.6" that defines GLIBC_2.99 is one more of them.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def library(
    path: Path,
    *,
    soname: str = "",
    defines: Sequence[str] = (),
    needs: Mapping[Path, Sequence[str]] | None = None,
    runpath: str = "",
    rpath: str = "",
    body: str = "",
) -> Path:
    """A library at ``path`` that defines versions, and needs versions of other libraries built here.

    A library it needs nothing versioned of has an empty list. ``body`` is C code, with what it needs of libc.
    """
    needs = needs or {}
    code = "".join(f"void {_symbol(version)}(void) {{}}\n" for version in defines)
    called = [_symbol(version) for versions in needs.values() for version in versions]
    code += "".join(f"void {name}(void);\n" for name in called)
    code += f"void uses_{_symbol(path.name)}(void) {{ {''.join(f'{name}();' for name in called)} }}\n" + body
    options = ["-shared", "-fPIC"]
    if defines:
        path.parent.mkdir(parents=True, exist_ok=True)
        script = path.with_name(f"{path.name}.map")
        script.write_text("".join(f"{version} {{ global: {_symbol(version)}; }};\n" for version in defines))
        options.append(f"-Wl,--version-script={script}")
    if soname:
        options.append(f"-Wl,-soname,{soname}")
    if rpath:
        options += ["-Wl,--disable-new-dtags", f"-Wl,-rpath,{rpath}"]
    if runpath:
        options += ["-Wl,--enable-new-dtags", f"-Wl,-rpath,{runpath}"]
    return _built(path, code, [*options, *([] if body else ["-nostdlib"])], list(needs))


def program(path: Path, body: str, libraries: Sequence[Path] = (), *options: str) -> Path:
    """A program of C code, linked with libraries."""
    return _built(path, body, list(options), libraries)


def _symbol(version: str) -> str:
    return "sym_" + re.sub(r"[^A-Za-z0-9]", "_", version)


def _built(path: Path, code: str, options: Sequence[str], libraries: Sequence[Path]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    source = path.with_name(f"{path.name}.c")
    source.write_text(code)
    command = ["gcc", "-o", str(path), str(source), *options, "-Wl,--no-as-needed", *map(str, libraries)]
    command.append("-Wl,--allow-shlib-undefined")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    source.unlink()
    return path
