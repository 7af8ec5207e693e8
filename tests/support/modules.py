"""Module systems of Debian and Python environments, as users' login shells have them.

Environment Modules and Lmod cannot be installed together, so each is unpacked beside the machine (kept in
/var/cache/hpcctr/debian) and laid over /usr in the mount namespace of one Host.

Of conda itself nothing can be installed from PyPI. :func:`conda_environment` makes what its activation works on, and
:func:`conda_activation` has the script written by rattler's library (PyPI: py-rattler), which reads an environment as
conda does; the variables that only conda's own shell function sets are added, as conda 24 prints them.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

from tests.support.host import Host
from tests.support.images import CACHE

System = Literal["environment-modules", "lmod"]

INIT: dict[System, str] = {
    "environment-modules": "/usr/share/modules/init/bash",
    "lmod": "/usr/share/lmod/lmod/init/bash",
}
"""What a login shell sources."""

MODULEFILE: dict[System, tuple[str, str]] = {
    "environment-modules": (
        "tool",
        "#%Module1.0\nprepend-path PATH @/bin\nprepend-path LD_LIBRARY_PATH @/lib\nprepend-path MANPATH @/man\n"
        "setenv CUDA_HOME @\nsetenv TOOL_SETTING fast\n",
    ),
    "lmod": (
        "tool.lua",
        'prepend_path("PATH", "@/bin")\nprepend_path("LD_LIBRARY_PATH", "@/lib")\nprepend_path("MANPATH", "@/man")\n'
        'setenv("CUDA_HOME", "@")\nsetenv("TOOL_SETTING", "fast")\n',
    ),
}
"""Name and text of the module `tool`, in each system's language; `@` is the directory of the tool."""


def unpacked(system: System) -> Path:
    """The directory with usr/ of the package and of what it needs that this machine lacks; downloaded once."""
    wanted = ["apt-get", "--simulate", "--no-install-recommends", "install", system]
    listed = subprocess.run(wanted, check=True, capture_output=True, text=True).stdout
    packages = sorted(re.findall(r"^Inst (\S+)", listed, flags=re.M))
    assert system in packages, f"{system} is installed on this machine: remove it, so that both systems can be tested"
    digest = hashlib.sha256("\n".join(packages).encode()).hexdigest()[:20]
    finished = CACHE / "debian" / f"{system}-{digest}"
    if finished.exists():
        return finished
    unfinished = finished.with_suffix(".unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "-q", "-q", "download", *packages], cwd=unfinished, check=True, capture_output=True)
    for package in unfinished.glob("*.deb"):
        subprocess.run(["dpkg-deb", "--extract", package, unfinished], check=True)
        package.unlink()
    unfinished.rename(finished)
    return finished


def lay_over(host: Host, system: System) -> None:
    """Show the packages in /usr of a Host that belongs to one test."""
    lower = f"lowerdir={unpacked(system)}/usr:/usr"
    host.run(["mount", "-t", "overlay", "-o", lower, "overlay", "/usr"])


def conda_environment(prefix: Path) -> Path:
    """An environment as conda makes one, with a package that has an activation script."""
    for directory in ("bin", "lib", "conda-meta", "etc/conda/activate.d", "share/proj"):
        (prefix / directory).mkdir(parents=True)
    (prefix / "conda-meta/history").write_text("")
    (prefix / "conda-meta/state").write_text('{"env_vars": {"MY_PROJECT": "weather"}}')
    (prefix / "etc/conda/activate.d/proj4-activate.sh").write_text('export PROJ_DATA="$CONDA_PREFIX/share/proj"\n')
    (prefix / "bin/python3").write_text("#!/bin/sh\necho python of the environment outside\n")
    (prefix / "bin/python3").chmod(0o755)
    return prefix


def conda_activation(prefix: Path) -> str:
    """Shell text that activates an environment."""
    library = CACHE / "pip/py-rattler"
    if not library.exists():
        unfinished = library.with_suffix(".unfinished")
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
        install = [*pip, "--target", str(unfinished), "py-rattler"]
        subprocess.run(install, check=True, capture_output=True)
        unfinished.rename(library)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; "
        "from rattler.shell import ActivationVariables, Shell, activate; "
        "print(activate(Path(sys.argv[2]), ActivationVariables(current_path=[]), Shell.bash, None).script)"
    )
    written = subprocess.run(
        [sys.executable, "-c", code, library, prefix], check=True, capture_output=True, text=True
    ).stdout
    conda = {
        "CONDA_EXE": "/opt/miniconda3/bin/conda",
        "CONDA_PYTHON_EXE": "/opt/miniconda3/bin/python",
        "_CE_M": "",
        "_CE_CONDA": "",
        "CONDA_DEFAULT_ENV": prefix.name,
        "CONDA_PROMPT_MODIFIER": f"({prefix.name}) ",
        "MAMBA_EXE": "/opt/bin/micromamba",
        "MAMBA_ROOT_PREFIX": "/opt/micromamba",
    }
    return written + "".join(f'export {name}="{value}"\n' for name, value in conda.items())
