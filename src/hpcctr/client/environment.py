"""The command's environment: the caller's, but for what describes the host's files.

Everything is bytes: names and values that are not text cross unchanged. Each variable keeps the reason for its value,
so that ``--explain`` shows the same plan that a launch uses. ``docs/environment.md`` prints the lists.
"""

from __future__ import annotations

import os

from hpcctr.errors import UsageWrong

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: Variables that describe the host's file tree; inside, the image's value is taken. At most one ``*`` a glob.
OF_THE_HOST = (
    # programs, libraries and data that programs find by them
    b"PATH", b"LD_*", b"GCONV_PATH", b"LOCPATH", b"NLSPATH", b"LOCALE_ARCHIVE", b"TERMINFO", b"MANPATH", b"INFOPATH",
    b"XDG_DATA_DIRS", b"XDG_CONFIG_DIRS", b"LESSOPEN", b"LESSCLOSE", b"OPENSSL_CONF", b"GIT_EXEC_PATH",
    b"FONTCONFIG_*", b"GIO_MODULE_DIR", b"GI_TYPELIB_PATH", b"GTK_PATH", b"QT_PLUGIN_PATH", b"XLOCALEDIR",
    # certificates
    b"*_CA_BUNDLE", b"*_CA_CERTS", b"SSL_CERT_*", b"GIT_SSL_CAINFO", b"PIP_CERT",
    # shells: start-up files and exported functions
    b"BASH_ENV", b"ENV", b"FPATH", b"BASH_FUNC_*", b"PROMPT_COMMAND",
    # module systems: Environment Modules, Lmod, EasyBuild, Spack, Cray's
    b"MODULE*", b"__MODULES_*", b"LOADEDMODULES", b"_LMFILES_*", b"LMOD_*", b"__LMOD_*", b"_ModuleTable*",
    b"EBROOT*", b"EBVERSION*", b"EBDEVEL*", b"SPACK_ROOT", b"SPACK_LD_LIBRARY_PATH", b"CRAY_LD_LIBRARY_PATH",
    # languages and their environments
    b"PYTHONPATH", b"PYTHONHOME", b"PYTHONSTARTUP", b"PYTHONUSERBASE", b"PYTHONEXECUTABLE", b"PYENV_*",
    b"VIRTUAL_ENV", b"VIRTUAL_ENV_*", b"CONDA_*", b"_CONDA_*", b"_CE_*", b"MAMBA_*", b"_MAMBA_*", b"PERL5LIB",
    b"PERLLIB", b"PERL_*", b"R_HOME", b"R_LIBS*", b"TCLLIBPATH", b"LUA_PATH*", b"LUA_CPATH*", b"JAVA_HOME",
    b"CLASSPATH", b"GEM_*", b"NODE_PATH", b"JULIA_*",
    # MPI libraries
    b"OPAL_PREFIX", b"PMIX_PREFIX", b"PMIX_INSTALL_PREFIX", b"PRTE_PREFIX", b"MPI_HOME", b"MPI_BIN", b"MPI_LIB",
    b"MPI_INCLUDE", b"MPI_SYSCONFIG", b"MPI_FORTRAN_MOD_DIR", b"MPI_MAN", b"MPI_PYTHON*", b"MPICH_HOME",
    b"I_MPI_ROOT", b"FI_PROVIDER_PATH",
    b"OMPI_LIBDIR_LOC", b"*_MCA_mca_base_component_path",
    # compilers and toolkits
    b"CPATH", b"C_INCLUDE_PATH", b"CPLUS_INCLUDE_PATH", b"OBJC_INCLUDE_PATH", b"LIBRARY_PATH", b"COMPILER_PATH",
    b"GCC_EXEC_PREFIX", b"PKG_CONFIG_PATH", b"CMAKE_PREFIX_PATH", b"ACLOCAL_PATH", b"CUDA_HOME", b"CUDA_PATH",
    b"CUDA_ROOT", b"NVHPC*", b"ROCM_PATH", b"HIP_PATH", b"ONEAPI_ROOT", b"CMPLR_ROOT", b"MKLROOT", b"TBBROOT",
)  # fmt: skip

#: What ``--clean-env`` keeps of the caller's: who they are, and the wire-up of whatever launched them.
KEPT_WHEN_CLEAN = (
    b"HOME", b"USER", b"LOGNAME", b"TERM", b"TZ", b"TMPDIR", b"XDG_RUNTIME_DIR", b"PMI_*", b"PMI2_*",
    b"PMIX_*", b"OMPI_*", b"PRTE_*", b"HYD*", b"MPI_LOCAL*", b"MPIR_*", b"SLURM_*", b"SLURMD_*", b"PBS_*",
    b"FLUX_*", b"PALS_*", b"LSB_*", b"CUDA_VISIBLE_DEVICES", b"ROCR_VISIBLE_DEVICES", b"GPU_DEVICE_ORDINAL",
    b"ZE_AFFINITY_MASK", b"OMP_*",
)  # fmt: skip

#: Variables that name a directory, which is carried in; without one behind it the variable would mislead.
DIRECTORIES = (b"TMPDIR", b"TMP", b"TEMP", b"XDG_RUNTIME_DIR", b"PMIX_*TMPDIR")

#: Variables that name the environment activated outside: of venv, of conda and its relatives. What activation scripts
#: of its packages have set names files below it, which are there inside when it lies in the home.
ACTIVATED = (b"VIRTUAL_ENV", b"CONDA_PREFIX")

_PATH_WITHOUT_IMAGE = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: The caller's whatever the image says: who they are.
_PERSONAL = (b"HOME", b"USER", b"LOGNAME")


class Variable:
    """One variable of the command, and why it has its value."""

    __slots__ = ("origin", "value")

    def __init__(self, value: bytes, origin: str) -> None:
        self.value = value
        self.origin = origin


class Globs:
    """Names and patterns with at most one ``*`` each, taken apart once: an environment has hundreds of names."""

    __slots__ = ("_heads", "_names", "_others", "_tails")

    def __init__(self, globs: Iterable[bytes]) -> None:
        parts = [(glob, *glob.partition(b"*")) for glob in globs]
        self._names = frozenset(glob for glob, _, star, _ in parts if not star)
        self._heads = tuple(head for _, head, star, tail in parts if star and not tail)
        self._tails = tuple(tail for _, head, star, tail in parts if star and tail and not head)
        self._others = tuple((head, tail) for _, head, star, tail in parts if star and tail and head)

    def __contains__(self, name: bytes) -> bool:
        return (
            name in self._names
            or name.startswith(self._heads)
            or name.endswith(self._tails)
            or any(
                len(name) >= len(head) + len(tail) and name.startswith(head) and name.endswith(tail)
                for head, tail in self._others
            )
        )


_DIRECTORY_GLOBS = Globs(DIRECTORIES)


def is_directory_variable(name: bytes) -> bool:
    """Whether a variable's value is a directory that is carried in."""
    return name in _DIRECTORY_GLOBS


def is_inside(path: bytes, targets: Iterable[bytes]) -> bool:
    """Whether an absolute path lies at or below one of the places that show the caller's files inside."""
    path = os.path.normpath(path)
    return any(path == target or path.startswith(target + b"/") for target in targets)


def of_this_process() -> dict[bytes, bytes]:
    """The environment as the kernel handed it over: Python may have added LC_CTYPE to its own copy (PEP 538).

    Of a name that occurs more than once the first value, which getenv(3) finds. An entry without a name is not here.
    """
    try:
        with open("/proc/self/environ", "rb") as file:
            entries = file.read().split(b"\0")
    except OSError:
        return dict(os.environb)  # noqa: TID251
    pairs = (entry.partition(b"=") for entry in reversed(entries))
    found = {name: value for name, sign, value in pairs if name and sign}
    return dict(reversed(found.items()))


def set_in_this_process(final: dict[bytes, bytes]) -> None:
    """Make the environment that execv(3) hands on ``final``.

    Variable by variable: what is not changed stays as the kernel handed it over, in its place and as often as it is
    named, and entries that are no NAME=VALUE stay.
    """
    given = of_this_process()
    # Python's own view, which differs where Python or a library has set something.
    now = dict(os.environb)  # noqa: TID251
    for name in {*given, *now}:
        if name and name not in final:
            os.unsetenv(name)
    for name, value in final.items():
        if given.get(name) != value:
            os.unsetenv(name)
            os.putenv(name, value)
        elif now.get(name) != value:
            os.putenv(name, value)


def build(
    caller: dict[bytes, bytes],
    *,
    image: Sequence[bytes],
    host: Sequence[bytes] = (),
    extra_globs: Sequence[bytes] = (),
    clean: bool = False,
    requested: Sequence[bytes] = (),
    root: bytes = b"",
    shown: Sequence[bytes] | None = None,
    directory: bytes | None = None,
) -> tuple[dict[bytes, Variable], dict[bytes, str]]:
    """(variables of the command, dropped variables with the reason).

    ``image`` and ``host`` are NAME=VALUE of the image and of host features, ``requested`` the words of ``-e``. Later
    wins: the caller's (or with ``clean`` the image's) base, host features, ``-e``. Files that variables name are looked
    for below ``root``, and with ``shown``, the places at which the command sees the caller's files, there only. The
    command starts in ``directory``. Raises :class:`UsageWrong` for an ``-e`` without a name.
    """
    of_the_host, kept_when_clean = Globs((*OF_THE_HOST, *extra_globs)), Globs(KEPT_WHEN_CLEAN)

    def are_there(value: bytes) -> bool:
        paths = value.split(b":") if value.startswith(b"/") else ()
        return all(_is_there(path, root, shown) for path in paths if path.startswith(b"/"))

    final: dict[bytes, Variable] = {}
    dropped: dict[bytes, str] = {}
    activated = [caller[name].rstrip(b"/") + b"/" for name in ACTIVATED if caller.get(name, b"").rstrip(b"/")]
    of_image = dict(_pair(entry) for entry in image if entry.find(b"=") > 0)
    for name, value in caller.items():
        if clean and name not in kept_when_clean:
            dropped[name] = "--clean-env"
        elif name in of_the_host:
            dropped[name] = "describes the host's files"
        elif is_directory_variable(name) and not os.path.isdir(root + value):
            dropped[name] = "no such directory"
        elif is_directory_variable(name) and not are_there(value):
            dropped[name] = "the directory is not carried in"
        elif name == b"PWD" and directory is not None and not _is_name_of(value, directory, root, are_there(value)):
            final[name] = Variable(directory, "where it starts")
        elif name != b"PWD" and name not in _PERSONAL and any(prefix in value + b"/" for prefix in activated):
            dropped[name] = "lies in an environment activated outside"
        else:
            final[name] = Variable(value, "caller")
    for name, value in of_image.items():
        kept = final.get(name)
        # A path or list of paths of the host's that is not there inside describes the host's files, whatever its name.
        if kept is None or (name not in _PERSONAL and (clean or not are_there(kept.value))):
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


def _is_there(path: bytes, root: bytes, shown: Sequence[bytes] | None) -> bool:
    return os.path.lexists(root + path) if shown is None else is_inside(path, shown)


def _is_name_of(value: bytes, directory: bytes, root: bytes, is_there: bool) -> bool:
    """Whether PWD may stay: the caller's name for a directory may go through symbolic links, and is as good inside
    where all of it is there. Programs that believe another value would write elsewhere.
    """
    if value == directory:
        return True
    try:
        return value.startswith(b"/") and is_there and os.path.samefile(root + value, root + directory)
    except OSError:
        return False


def _pair(entry: bytes) -> tuple[bytes, bytes]:
    name, _, value = entry.partition(b"=")
    return name, value
