"""Images of the three kinds people bring most: as `spack containerize`, mambaorg/micromamba and NVIDIA's NGC make them.

Small (a shell stands for every program), but with the paths, links, scripts, ENV, USER, WORKDIR and ENTRYPOINT of
theirs.
"""

from __future__ import annotations

from tests.support.oci import Image, Member, busybox, directory, file, symlink

_SOFTWARE = "opt/software/linux-debian12-x86_64_v3/gcc-12.2.0"


def _script(name: str, text: str) -> Member:
    return file(name, f"#!/bin/sh\n{text}\n".encode(), mode=0o755)


def _parents(*paths: str) -> list[Member]:
    """All directories above these paths, each once, outer before inner."""
    found: dict[str, None] = {}
    for path in paths:
        parts = path.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            found.setdefault("/".join(parts[:depth]))
    return [directory(path) for path in found if path not in ("bin", "etc", "usr", "usr/bin")]


def spack(packages: int = 40) -> Image:
    """Every program is a link in a view, which is a link to a generation of links into /opt/software."""
    members: list[Member] = []
    for number in range(packages):
        prefix = f"{_SOFTWARE}/pkg{number}-1.{number}-{'abcdefgh' * 4}"
        members += [
            *_parents(f"{prefix}/bin/x", f"{prefix}/lib/x"),
            _script(f"{prefix}/bin/tool{number}", f'echo "tool{number} $(dirname "$(readlink -f "$0")")"'),
            file(f"{prefix}/lib/libpkg{number}.so.1.{number}", b"library", mode=0o755),
            symlink(f"{prefix}/lib/libpkg{number}.so.1", f"libpkg{number}.so.1.{number}"),
            symlink(f"{prefix}/lib/libpkg{number}.so", f"libpkg{number}.so.1"),
        ]
        generation = "opt/views/._view/qwertyuiopasdfghjklzxcvbnmqwerty"
        members += [
            *_parents(f"{generation}/bin/x", f"{generation}/lib/x"),
            symlink(f"{generation}/bin/tool{number}", f"/{prefix}/bin/tool{number}"),
            symlink(f"{generation}/lib/libpkg{number}.so", f"/{prefix}/lib/libpkg{number}.so"),
        ]
    unique = {(member.name, member.type): member for member in members}
    view = "/opt/views/view"
    return busybox(
        *unique.values(),
        symlink("opt/views/view", "/opt/views/._view/qwertyuiopasdfghjklzxcvbnmqwerty"),
        directory("opt/spack-environment"),
        file(
            "opt/spack-environment/activate.sh",
            f"export SPACK_ENV=/opt/spack-environment\nexport CMAKE_PREFIX_PATH={view}\n"
            f"export PATH={view}/bin:$PATH\nexport MANPATH={view}/share/man:\n".encode(),
        ),
        _script("entrypoint.sh", '. /opt/spack-environment/activate.sh\nexec "$@"'),
        config={
            "Env": [f"PATH={view}/bin:/usr/local/bin:/usr/bin:/bin", f"LD_LIBRARY_PATH={view}/lib"],
            "Entrypoint": ["/entrypoint.sh"],
            "Cmd": ["/bin/sh"],
        },
    )


def micromamba() -> Image:
    """The environment is at /opt/conda, of a user of the image's; the entry script activates it."""
    return busybox(
        *_parents("opt/conda/bin/x", "opt/conda/conda-meta/x", "opt/conda/etc/conda/activate.d/x", "usr/local/bin/x"),
        _script("opt/conda/bin/python", 'echo "python of the image, prefix ${CONDA_PREFIX-not activated}"'),
        file("opt/conda/conda-meta/history"),
        _script("bin/micromamba", "echo 2.0.5"),
        file(
            "usr/local/bin/_activate_current_env.sh",
            b'if [ "${MAMBA_SKIP_ACTIVATE}" = 1 ]; then return; fi\n'
            b'export CONDA_PREFIX="${MAMBA_ROOT_PREFIX}" CONDA_SHLVL=1 CONDA_DEFAULT_ENV="${ENV_NAME}"\n',
        ),
        _script("usr/local/bin/_entrypoint.sh", 'set -e\n. /usr/local/bin/_activate_current_env.sh\nexec "$@"'),
        config={
            "Env": [
                "PATH=/opt/conda/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "LANG=C.UTF-8",
                "LC_ALL=C.UTF-8",
                "ENV_NAME=base",
                "MAMBA_ROOT_PREFIX=/opt/conda",
                "MAMBA_EXE=/bin/micromamba",
                "MAMBA_USER=mambauser",
                "MAMBA_USER_ID=57439",
                "MAMBA_USER_GID=57439",
            ],
            "User": "mambauser",
            "WorkingDir": "/tmp",
            "Entrypoint": ["/usr/local/bin/_entrypoint.sh"],
            "Cmd": ["/bin/bash"],
        },
    )


def ngc() -> Image:
    """A banner before the command, a shell start-up file in ENV, /workspace, and a hundred variables."""
    return busybox(
        *_parents("opt/nvidia/entrypoint.d/x", "usr/local/cuda-12.8/bin/x", "workspace/x"),
        directory("workspace/examples"),
        file("workspace/README.md", b"workspace of the image\n"),
        symlink("usr/local/cuda", "cuda-12.8"),
        _script("usr/local/cuda-12.8/bin/nvcc", 'echo "nvcc of the image below $CUDA_HOME"'),
        file("opt/nvidia/entrypoint.d/10-banner.txt", b"=============\n== PyTorch ==\n=============\n"),
        file("etc/shinit_v2", b"export FROM_SHINIT=yes\n"),
        _script(
            "opt/nvidia/nvidia_entrypoint.sh",
            'for part in /opt/nvidia/entrypoint.d/*.txt; do cat "$part"; done\nexec "$@"',
        ),
        config={
            "Env": [
                "PATH=/usr/local/cuda/bin:/usr/local/bin:/usr/bin:/bin",
                "LD_LIBRARY_PATH=/usr/local/cuda/compat/lib:/usr/local/nvidia/lib:/usr/local/nvidia/lib64",
                "LIBRARY_PATH=/usr/local/cuda/lib64/stubs:",
                "CUDA_HOME=/usr/local/cuda",
                "CUDA_VERSION=12.8.0.038",
                "NVIDIA_VISIBLE_DEVICES=all",
                "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video",
                "NVIDIA_REQUIRE_JETPACK_HOST_MOUNTS=",
                "BASH_ENV=/etc/bash.bashrc",
                "SHELL=/bin/bash",
                "ENV=/etc/shinit_v2",
                "OPAL_PREFIX=/opt/hpcx/ompi",
                "PYTHONIOENCODING=utf-8",
                "UCC_CL_BASIC_TLS=^sharp",
                "TORCH_CUDA_ARCH_LIST=7.5 8.0 8.6 9.0 10.0 12.0+PTX",
                *(f"NVIDIA_COMPONENT_{number}_VERSION={number}.{number}.{number}" for number in range(90)),
            ],
            "WorkingDir": "/workspace",
            "Entrypoint": ["/opt/nvidia/nvidia_entrypoint.sh"],
            "Cmd": ["/bin/sh"],
        },
    )
