"""What the caller's process takes along: directories and files of its own view, and where it starts.

Nothing here needs or has privilege. Sources are named, not opened: enter opens them, with the caller's rights, in the
caller's mount namespace.
"""

from __future__ import annotations

import os
import stat

from hpcctr.client import environment
from hpcctr.errors import SourceMissing, TargetImpossible, UsageWrong, WorkingDirectoryMissing
from hpcctr.request import PATH_MAX, TARGETS_MAX, Target, target_problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

#: Directories that make up a system: the image's are wanted, so a working directory or home there is not carried in.
_SYSTEM = (
    b"/bin", b"/boot", b"/dev", b"/etc", b"/lib", b"/lib32", b"/lib64", b"/libx32", b"/proc", b"/sbin", b"/sys",
    b"/usr", b"/run/hpcctr",
)  # fmt: skip
#: Of these, only what lies below is carried, never the directory itself.
_SYSTEM_TOPS = (b"/", b"/media", b"/mnt", b"/opt", b"/run", b"/srv", b"/var")
_SHOWN_MAX = 400
#: The kernel's own trees: part of every plan, as the caller sees them.
KERNEL_TREES = (b"/proc", b"/sys", b"/dev")


class Mount:
    """One source of the caller's and its place inside."""

    __slots__ = ("kind", "origin", "read_only", "source", "target")

    def __init__(self, source: bytes, target: bytes, *, kind: str, read_only: bool, origin: str) -> None:
        self.source = source
        self.target = target
        self.kind = kind
        self.read_only = read_only
        self.origin = origin

    def is_same(self, other: Mount) -> bool:
        """Whether both show the same file in the same way."""
        return (self.source, self.read_only) == (other.source, other.read_only)

    @property
    def source_word(self) -> bytes:
        """The source as enter opens it: ``path/.`` makes the kernel mount what an automount point stands for."""
        return self.source.rstrip(b"/") + b"/." if self.kind == "d" else self.source


class Baggage:
    """The mounts of a launch, outer before inner, and the directory to start in."""

    __slots__ = ("directory", "mounts")

    def __init__(self, mounts: Sequence[Mount], directory: bytes) -> None:
        self.mounts = tuple(mounts)
        self.directory = directory

    def targets(self) -> list[Target]:
        """The mount points the container must have. One below another mount exists in that mount's source, or not at
        all.
        """
        outermost: list[Target] = []
        for mount in self.mounts:
            if not any(mount.target.startswith(target.path + b"/") for target in outermost):
                outermost.append(Target(mount.kind, mount.target))
        return outermost


def gather(
    variables: dict[bytes, bytes],
    *,
    volumes: Sequence[bytes] = (),
    workdir: bytes | None = None,
    no_home: bool = False,
    site_directories: Sequence[bytes] = (),
) -> Baggage:
    """The baggage for a caller with these environment ``variables``.

    ``volumes`` are the words of ``-v``; ``site_directories`` those of the site that are carried where they exist.
    Raises :class:`SourceMissing`, :class:`TargetImpossible`, :class:`WorkingDirectoryMissing`, :class:`UsageWrong`.
    """
    here = _working_directory(workdir)
    wanted: dict[bytes, Mount] = {}

    def carry(path: bytes, origin: str) -> None:
        if path not in wanted and is_carried(path) and os.path.isdir(path):
            wanted[path] = Mount(path, path, kind="d", read_only=False, origin=origin)

    carry(b"/tmp", "default")  # noqa: S108
    if not no_home:
        carry(home(variables), "home")
    if here is not None:
        carry(here, "working directory")
    for name, value in variables.items():
        if value.startswith(b"/") and environment.is_directory_variable(name):
            # Where a symbolic link of the caller's leads: the link itself may lie in a directory that comes along.
            for path in (os.path.normpath(value), os.path.realpath(value)):
                carry(path, os.fsdecode(name))
    for path in site_directories:
        carry(path, "site.toml carry")
    for mount in map(volume, volumes):
        earlier = wanted.get(mount.target)
        if earlier is not None and earlier.origin == "-v" and not mount.is_same(earlier):
            raise UsageWrong(
                f"-v: {shown(earlier.source)} and {shown(mount.source)} are both to be mounted on"
                f" {shown(mount.target)}",
                hint="leave one out, or give it another place: -v SRC:DST",
            )
        wanted[mount.target] = mount
    mounts = _without_repetition(sorted(wanted.values(), key=lambda mount: mount.target.split(b"/")))
    if len(mounts) > TARGETS_MAX:
        raise UsageWrong(
            f"{len(mounts)} mounts, {TARGETS_MAX} are possible", hint="name a common directory once instead"
        )
    return Baggage(mounts, workdir if workdir is not None else here or b"/")


def shown(path: bytes) -> str:
    """A word of the user's in a message: on one line, with nothing a terminal obeys, and no longer than one reads."""
    text = path if len(path) <= _SHOWN_MAX else path[:_SHOWN_MAX] + b"..."
    return "".join(one if one.isprintable() or "\udc80" <= one <= "\udcff" else "?" for one in os.fsdecode(text))


def home(variables: dict[bytes, bytes]) -> bytes:
    """The caller's home as a plain path; empty when there is none."""
    path = variables.get(b"HOME", b"")
    if not path.startswith(b"/"):
        return b""
    return b"/" + os.path.normpath(path).lstrip(b"/")


def is_carried(path: bytes) -> bool:
    """Whether a directory is carried at its own place by default: not the root, a system directory, or a system top."""
    return not (
        target_problem(path)
        or path in _SYSTEM_TOPS
        or any(path == top or path.startswith(top + b"/") for top in _SYSTEM)
    )


def volume(word: bytes) -> Mount:
    """The mount a ``-v SRC[:DST[:ro]]`` asks for."""
    source, *rest = word.split(b":")
    target = rest[0] if rest else b""
    mode = rest[1] if len(rest) > 1 else b"rw"
    if not source or len(rest) > 2 or mode not in (b"ro", b"rw"):
        raise UsageWrong(
            f"-v {shown(word)}: not SRC[:DST[:ro]]", hint="-v /data:/data:ro; a path with a colon cannot be given"
        )
    if not source.startswith(b"/"):
        source = _here() + b"/" + source
    target = (target.rstrip(b"/") or b"/") if target else os.path.normpath(source)
    problem = target_problem(target)
    if problem:
        raise TargetImpossible(
            f"-v {shown(word)}: {shown(target)} {problem}", hint="name a plain path inside: -v SRC:/path"
        )
    try:
        mode_bits = os.stat(source).st_mode
    except OSError as error:
        raise SourceMissing(
            f"-v {shown(word)}: {shown(source)}: {error.strerror}", hint=f"ls -ld {shown(source)}"
        ) from None
    if stat.S_ISCHR(mode_bits) or stat.S_ISBLK(mode_bits):
        raise SourceMissing(
            f"-v {shown(word)}: {shown(source)} is a device file, and nodev keeps it from being opened below a volume",
            hint="every device of the node is at its own path below /dev inside; for an empty file, -v one of yours",
        )
    kind = "d" if stat.S_ISDIR(mode_bits) else "f"
    return Mount(source, target, kind=kind, read_only=mode == b"ro", origin="-v")


def require_absolute(workdir: bytes) -> None:
    """Raise :class:`UsageWrong` unless the word of ``-w`` can be a directory inside."""
    if not workdir.startswith(b"/"):
        raise UsageWrong(
            f"-w {os.fsdecode(workdir)}: not an absolute path", hint="-w names a directory inside the container"
        )


def _working_directory(workdir: bytes | None) -> bytes | None:
    """Where the caller stands; None when that no longer exists and ``-w`` says where to start."""
    if workdir is not None:
        require_absolute(workdir)
    try:
        return _here()
    except WorkingDirectoryMissing:
        if workdir is not None:
            return None
        raise


def _here() -> bytes:
    """The working directory as the kernel names it. Raises :class:`WorkingDirectoryMissing` when it has no name."""
    try:
        here = os.getcwdb()
    except OSError as error:
        raise WorkingDirectoryMissing(
            f"the working directory cannot be found: {error.strerror}", hint="cd, or -w DIR"
        ) from None
    if here.startswith(b"(unreachable)"):
        raise WorkingDirectoryMissing("the working directory is outside this root directory", hint="cd, or -w DIR")
    if len(here) >= PATH_MAX:
        raise WorkingDirectoryMissing(
            f"the working directory's path is longer than {PATH_MAX - 1} bytes", hint="cd, or -w DIR"
        )
    return here


def _without_repetition(mounts: Sequence[Mount]) -> list[Mount]:
    """Outer mounts before inner ones; an inner one its outer already shows at the same place is left out."""
    kept: list[Mount] = []
    for mount in mounts:
        outer = next((one for one in reversed(kept) if mount.target.startswith(one.target + b"/")), None)
        if outer is None:
            kept.append(mount)
            continue
        inside = outer.source.rstrip(b"/") + mount.target[len(outer.target) :]
        if mount.origin != "-v" and inside == mount.source and not outer.read_only:
            continue
        if not os.path.lexists(inside):
            raise TargetImpossible(
                f"{shown(mount.target)}: does not exist in {shown(outer.source)}, which is mounted on"
                f" {shown(outer.target)}",
                hint=f"mkdir -p {shown(inside)}, or choose another place for it",
            )
        if os.path.realpath(inside) != os.path.realpath(outer.source) + mount.target[len(outer.target) :]:
            raise TargetImpossible(
                f"{shown(mount.target)}: leads through a symbolic link in {shown(outer.source)}, which is mounted on"
                f" {shown(outer.target)}",
                hint=f"name the place it leads to: {shown(os.path.realpath(inside))}",
            )
        kept.append(mount)
    return kept
