"""The command's environment: the caller's, but for what describes the host's files.

Everything is bytes: names and values that are not text cross unchanged. Each variable keeps the reason for its value,
so that ``--explain`` shows the same plan that a launch uses.
"""

from __future__ import annotations

import os

from hpcctr.errors import UsageWrong

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: Variables that describe the host's file tree; inside, the image's value is taken. At most one ``*`` a glob.
OF_THE_HOST = (
    b"PATH", b"LD_*", b"GCONV_PATH", b"LOCPATH", b"NLSPATH", b"LOCALE_ARCHIVE", b"TERMINFO", b"MANPATH",
    b"INFOPATH", b"PYTHONPATH", b"PYTHONHOME", b"PYTHONSTARTUP", b"VIRTUAL_ENV", b"CONDA_*", b"_CE_*",
    b"MAMBA_*", b"PERL5LIB", b"PERLLIB", b"PERL_*", b"R_HOME", b"R_LIBS*", b"TCLLIBPATH", b"JAVA_HOME",
    b"CLASSPATH", b"GEM_*", b"NODE_PATH", b"JULIA_*", b"OPAL_PREFIX", b"PMIX_PREFIX", b"PMIX_INSTALL_PREFIX",
    b"PRTE_PREFIX", b"MPI_HOME", b"MPICH_HOME", b"I_MPI_ROOT", b"CPATH", b"C_INCLUDE_PATH",
    b"CPLUS_INCLUDE_PATH", b"LIBRARY_PATH", b"PKG_CONFIG_PATH", b"CMAKE_PREFIX_PATH", b"*_CA_BUNDLE",
    b"SSL_CERT_*", b"GIT_SSL_CAINFO", b"BASH_ENV", b"ENV", b"BASH_FUNC_*", b"MODULE*", b"LMOD_*",
    b"_ModuleTable*", b"LOADEDMODULES", b"_LMFILES_*", b"XDG_DATA_DIRS", b"XDG_CONFIG_DIRS",
)  # fmt: skip

#: What ``--clean-env`` keeps of the caller's: who they are, and the wire-up of whatever launched them.
KEPT_WHEN_CLEAN = (
    b"HOME", b"USER", b"LOGNAME", b"TERM", b"TZ", b"TMPDIR", b"XDG_RUNTIME_DIR", b"PMI_*", b"PMI2_*",
    b"PMIX_*", b"OMPI_*", b"PRTE_*", b"HYD*", b"MPI_LOCAL*", b"MPIR_*", b"SLURM_*", b"SLURMD_*", b"PBS_*",
    b"FLUX_*", b"PALS_*", b"LSB_*", b"CUDA_VISIBLE_DEVICES", b"ROCR_VISIBLE_DEVICES", b"GPU_DEVICE_ORDINAL",
    b"ZE_AFFINITY_MASK", b"OMP_*",
)  # fmt: skip

#: Variables that name a directory; without one behind it the variable would mislead.
_DIRECTORIES = (b"TMPDIR", b"XDG_RUNTIME_DIR", b"PMIX_*TMPDIR")

_PATH_WITHOUT_IMAGE = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Variable:
    """One variable of the command, and why it has its value."""

    __slots__ = ("origin", "value")

    def __init__(self, value: bytes, origin: str) -> None:
        self.value = value
        self.origin = origin


def is_match(name: bytes, globs: Iterable[bytes]) -> bool:
    """Whether ``name`` fits one of ``globs`` (at most one ``*`` each)."""
    for glob in globs:
        head, star, tail = glob.partition(b"*")
        if name == glob or (
            star and len(name) >= len(head) + len(tail) and name.startswith(head) and name.endswith(tail)
        ):
            return True
    return False


def is_directory_variable(name: bytes) -> bool:
    """Whether a variable's value is a directory that is carried in."""
    return is_match(name, _DIRECTORIES)


def of_this_process() -> dict[bytes, bytes]:
    """The environment as the kernel handed it over: Python may have added LC_CTYPE to its own copy (PEP 538)."""
    try:
        with open("/proc/self/environ", "rb") as file:
            entries = file.read().split(b"\0")
    except OSError:
        return dict(os.environb)  # noqa: TID251
    pairs = (entry.partition(b"=") for entry in entries if b"=" in entry)
    return {name: value for name, _, value in pairs}


def build(
    caller: dict[bytes, bytes],
    *,
    image: Sequence[bytes],
    host: Sequence[bytes] = (),
    extra_globs: Sequence[bytes] = (),
    clean: bool = False,
    requested: Sequence[bytes] = (),
) -> tuple[dict[bytes, Variable], dict[bytes, str]]:
    """(variables of the command, dropped variables with the reason).

    ``image`` and ``host`` are NAME=VALUE of the image and of host features, ``requested`` the words of ``-e``. Later
    wins: the caller's (or with ``clean`` the image's) base, host features, ``-e``. Raises :class:`UsageWrong` for an
    ``-e`` without a name.
    """
    globs = (*OF_THE_HOST, *extra_globs)
    final: dict[bytes, Variable] = {}
    dropped: dict[bytes, str] = {}
    of_image = dict(_pair(entry) for entry in image if b"=" in entry)
    for name, value in caller.items():
        if clean and not is_match(name, KEPT_WHEN_CLEAN):
            dropped[name] = "--clean-env"
        elif is_match(name, globs):
            dropped[name] = "describes the host's files"
        elif is_directory_variable(name) and not os.path.isdir(value):
            dropped[name] = "no such directory"
        else:
            final[name] = Variable(value, "caller")
    for name, value in of_image.items():
        if name not in final or clean and name not in (b"HOME", b"USER", b"LOGNAME"):
            final[name] = Variable(value, "image")
            dropped.pop(name, None)
    if b"PATH" not in final:
        final[b"PATH"] = Variable(_PATH_WITHOUT_IMAGE, "default")
        dropped.pop(b"PATH", None)
    # Packages under ~/.local were made for the host's Python.
    final.setdefault(b"PYTHONNOUSERSITE", Variable(b"1", "default"))
    for name, value in map(_pair, host):
        final[name] = Variable(value, "site")
    for word in requested:
        name, sign, value = word.partition(b"=")
        if not name:
            raise UsageWrong(
                f"-e {os.fsdecode(word)}: no variable name", hint="-e NAME=VALUE, or -e NAME for your own value"
            )
        if sign:
            final[name] = Variable(value, "-e")
        elif name in caller:
            final[name] = Variable(caller[name], "-e")
        dropped.pop(name, None)
    return final, dropped


def _pair(entry: bytes) -> tuple[bytes, bytes]:
    name, _, value = entry.partition(b"=")
    return name, value
