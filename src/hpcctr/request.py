"""What a caller asks for: the words of ``hpcctr run`` and ``exec``, and the requests that cross the socket.

``RUN_OPTIONS`` is the one declaration of run's options, ``EXEC_OPTIONS`` the part of them exec has: the short lane
parses by it (:func:`RunWords.parse`), the typer command is made from it, and documentation is checked against it.
:class:`LaunchRequest` or :class:`ExecRequest` is all that leaves the user's process: no uid, no command, no
environment, no source path.

Imports nothing but the error classes, frames and lock files: it is part of every launch.
"""

from __future__ import annotations

import os

from hpcctr.errors import NoCommand, ProtocolBroken, UsageWrong
from hpcctr.lockfile import locked_image
from hpcctr.wire import Frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

#: More targets make a launch slow for everybody: each costs a mount under one kernel lock.
TARGETS_MAX = 120
#: Of Linux, the closing zero byte included (linux/limits.h).
PATH_MAX = 4096
#: Digits of a moment in seconds since 1970: enough for three thousand years.
AS_OF_DIGITS = 11
#: Devices and features of one launch, each, and characters of a name of theirs.
FEATURES_MAX = 64
FEATURE_NAME_MAX = 512
MPI_CHOICES = ("auto", "container", "host")
#: Above every pid the kernel gives out (PID_MAX_LIMIT in linux/threads.h).
_PID_END = 4194305
#: Places a mount target may never be at or below; enter refuses them again.
FORBIDDEN_TARGETS = (b"/proc", b"/sys", b"/dev", b"/run/hpcctr")


class Option:
    """One option of ``hpcctr run``."""

    __slots__ = ("choices", "flags", "help", "implied", "metavar", "name", "repeated")

    def __init__(
        self,
        name: str,
        flags: tuple[str, ...],
        help: str,  # noqa: A002
        *,
        metavar: str = "",
        repeated: bool = False,
        choices: tuple[str, ...] = (),
        implied: str = "",
    ) -> None:
        self.name = name
        self.flags = flags
        self.help = help
        #: Empty for a flag that takes no value.
        self.metavar = metavar
        self.repeated = repeated
        self.choices = choices
        #: The value of the option without ``=VALUE``; the next word is never its value then.
        self.implied = implied


RUN_OPTIONS = (
    Option(
        "volume",
        ("-v", "--volume"),
        "Show a file or directory of yours inside: SRC[:DST[:ro]]. Opened with your own rights.",
        metavar="SRC[:DST[:ro]]",
        repeated=True,
    ),
    Option(
        "env", ("-e", "--env"), "Set a variable; without =VALUE, take yours.", metavar="NAME[=VALUE]", repeated=True
    ),
    Option("clean_env", ("--clean-env",), "Start from the image's environment instead of yours."),
    Option("workdir", ("-w", "--workdir"), "Directory to start in; default: the one you are in.", metavar="DIR"),
    Option("no_home", ("--no-home",), "Do not show your home directory inside."),
    Option(
        "entrypoint",
        ("--entrypoint",),
        "Run this in place of the image's entrypoint, with CMD as arguments.",
        metavar="PROGRAM",
    ),
    Option(
        "gpu",
        ("--gpu",),
        "Show the node's GPU drivers: of all GPUs your job has, of some (--gpu=0,1 or =UUID), or none.",
        metavar="[all|N,M|none]",
        implied="all",
    ),
    Option(
        "device",
        ("--device",),
        "Show what belongs to a device of the node, by its CDI name.",
        metavar="VENDOR/CLASS=NAME",
        repeated=True,
    ),
    Option("feature", ("--feature",), "Add a host feature of the site: ib, x11, ...", metavar="NAME", repeated=True),
    Option(
        "mpi",
        ("--mpi",),
        "Whose MPI library: the image's, the node's in its place, or what fits.",
        metavar="WHOSE",
        choices=MPI_CHOICES,
    ),
    Option(
        "pull",
        ("--pull",),
        "When to fetch the image: if the store lacks it, always, or never.",
        metavar="WHEN",
        choices=("missing", "always", "never"),
    ),
    Option(
        "platform", ("--platform",), "Platform to pull, as OS/ARCH[/VARIANT]; default: this node's.", metavar="PLATFORM"
    ),
    Option(
        "locked",
        ("--locked",),
        "Take the digest that a file of pull --lock has for IMAGE; refuse what is not in it.",
        metavar="FILE",
    ),
    Option("explain", ("--explain",), "Print what would be granted, mounted and set, and run nothing."),
)
EXEC_OPTIONS = tuple(option for option in RUN_OPTIONS if option.name in ("env", "clean_env", "workdir"))


class NeedsFullParser(Exception):  # noqa: N818
    """The command line has something (``--help``, an unknown option) that the full command answers better."""


class RunWords:
    """The words of one ``hpcctr run``, as bytes where they are the user's data."""

    __slots__ = (
        "clean_env",
        "command",
        "device",
        "entrypoint",
        "env",
        "explain",
        "feature",
        "gpu",
        "image",
        "locked",
        "mpi",
        "no_home",
        "platform",
        "pull",
        "volume",
        "workdir",
    )

    def __init__(self, image: str, command: Sequence[bytes], **options: object) -> None:
        self.image = image
        #: None when the command line has no CMD: the image's entrypoint and command are used.
        self.command: tuple[bytes, ...] | None = tuple(command) or None
        self.volume: tuple[bytes, ...] = ()
        self.env: tuple[bytes, ...] = ()
        self.workdir: bytes | None = None
        self.entrypoint: bytes | None = None
        self.clean_env = False
        self.no_home = False
        self.explain = False
        self.device: tuple[bytes, ...] = ()
        self.feature: tuple[bytes, ...] = ()
        #: Empty where the command line does not say.
        self.gpu = ""
        self.mpi = ""
        self.pull = "missing"
        self.platform = ""
        self.locked = ""
        for name, value in options.items():
            if name not in self.__slots__:
                raise TypeError(name)
            setattr(self, name, value)
        if "gpu" in options and not is_gpu_choice(self.gpu):
            raise UsageWrong(
                f"--gpu={self.gpu}: not all, none, or names of GPUs with commas between",
                hint="--gpu=0,1; hpcctr doctor",
            )
        for option in RUN_OPTIONS:
            value = getattr(self, option.name)
            if option.choices and value and value not in option.choices:
                raise UsageWrong(
                    f"{option.flags[0]} {value}: not one of {', '.join(option.choices)}", hint="hpcctr run --help"
                )

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> RunWords:
        """The words after ``run``. Options end at IMAGE; what follows it (after an optional ``--``) is CMD.

        Raises :class:`NeedsFullParser` for anything not plainly an option of :data:`RUN_OPTIONS`.
        """
        options, image, command = _split(arguments, RUN_OPTIONS)
        return cls(image, command, **options)

    def settled(self) -> RunWords:
        """The same with an image that a lock file has settled, where one is to.

        Raises :class:`LockFileWrong`, :class:`ImageNotLocked`.
        """
        if not self.locked:
            return self
        options = {
            name: value
            for name in self.__slots__
            if name not in ("image", "command", "locked") and (value := getattr(self, name))
        }
        return RunWords(locked_image(self.locked, self.image, self.platform), self.command or (), **options)


class ExecWords:
    """The words of one ``hpcctr exec``, as bytes where they are the user's data."""

    __slots__ = ("clean_env", "command", "env", "pid", "workdir")

    def __init__(
        self,
        pid: str,
        command: Sequence[bytes],
        *,
        env: tuple[bytes, ...] = (),
        clean_env: bool = False,
        workdir: bytes | None = None,
    ) -> None:
        if not _is_pid(pid):
            raise UsageWrong(f"exec {pid}: not a process id", hint="hpcctr ps lists yours; hpcctr exec PID -- CMD")
        if not command:
            raise NoCommand(f"exec {pid}: no command to run", hint=f"hpcctr exec {pid} -- CMD")
        self.pid = int(pid)
        self.command = tuple(command)
        self.env = env
        self.clean_env = clean_env
        self.workdir = workdir

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> ExecWords:
        """The words after ``exec``, read as :meth:`RunWords.parse` reads its own, by :data:`EXEC_OPTIONS`."""
        options, pid, command = _split(arguments, EXEC_OPTIONS)
        return cls(pid, command, **options)  # type: ignore[arg-type]  # by name, each of its option's type


def is_gpu_choice(text: str) -> bool:
    """Whether ``text`` can be what ``--gpu`` is given: words of letters, digits, and what CDI names have in them."""
    return all(word and all(one.isalnum() or one in ".:_-" for one in word) for word in text.split(",")) and (
        text.isascii()
    )


def spelled_out(arguments: Sequence[str], known: Sequence[Option]) -> list[str]:
    """The same words with the implied value written where an option comes without one: other parsers take the next
    word.
    """
    by_flag = {flag: option for option in known for flag in option.flags}
    words = list(arguments)
    at = 0
    while at < len(words) and words[at].startswith("-") and words[at] != "--":
        option = by_flag.get(words[at])
        if option is not None and option.implied:
            words[at] += f"={option.implied}"
        elif option is not None and option.metavar:
            at += 1
        at += 1
    return words


def _split(arguments: Sequence[str], known: Sequence[Option]) -> tuple[dict[str, object], str, list[bytes]]:
    """(values of options by name, the first word that is none, the words behind it and an optional ``--``)."""
    by_flag = {flag: option for option in known for flag in option.flags}
    options: dict[str, object] = {}
    rest = list(arguments)
    while rest and rest[0].startswith("-"):
        word = rest.pop(0)
        flag, sign, value = word.partition("=") if word.startswith("--") else (word, "", "")
        option = by_flag.get(flag)
        if option is None or (sign and not option.metavar):
            raise NeedsFullParser(word)
        if not option.metavar:
            options[option.name] = True
            continue
        if not sign and option.implied:
            value = option.implied
        elif not sign:
            if not rest:
                raise NeedsFullParser(word)
            value = rest.pop(0)
        if option.repeated:
            earlier = options.get(option.name, ())
            assert isinstance(earlier, tuple)  # noqa: S101
            options[option.name] = (*earlier, os.fsencode(value))
        else:
            options[option.name] = os.fsencode(value) if option.name in ("workdir", "entrypoint") else value
    if not rest:
        raise NeedsFullParser("nothing but options")
    first = rest.pop(0)
    if rest and rest[0] == "--":
        rest.pop(0)
    return options, first, [os.fsencode(word) for word in rest]


class Target:
    """A mount point the container must have: where, and whether a directory (``d``) or a file (``f``)."""

    __slots__ = ("kind", "path")

    def __init__(self, kind: str, path: bytes) -> None:
        self.kind = kind
        self.path = path

    def __repr__(self) -> str:
        return f"Target({self.kind!r}, {self.path!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Target) and (self.kind, self.path) == (other.kind, other.path)

    def __hash__(self) -> int:
        return hash((self.kind, self.path))

    @classmethod
    def parse(cls, untrusted: bytes) -> Target:
        """``d:/path`` or ``f:/path``. Raises :class:`ProtocolBroken` for anything enter would refuse as well."""
        kind, _, path = untrusted.partition(b":")
        if kind not in (b"d", b"f"):
            raise ProtocolBroken("a mount target that is neither directory nor file")
        problem = target_problem(path)
        if problem:
            raise ProtocolBroken(f"mount target {os.fsdecode(path[:200])!r} {problem}")
        return cls(kind.decode(), path)


def target_problem(path: bytes) -> str:
    """Why nothing can be mounted on ``path`` whatever the image; empty when something can."""
    if not path.startswith(b"/"):
        return "is not an absolute path"
    if len(path) >= PATH_MAX:
        return f"is longer than {PATH_MAX - 1} bytes"
    if path == b"/":
        return "is the root of the container"
    parts = path[1:].split(b"/")
    if any(part in (b"", b".", b"..") for part in parts):
        return "is not a plain path"
    if any(len(part) > 255 for part in parts):
        return "has a name of more than 255 bytes in it"
    for place in FORBIDDEN_TARGETS:
        if path == place or path.startswith(place + b"/"):
            return f"is at or below {place.decode()}, which is the node's own"
    return ""


class LaunchRequest:
    """What crosses the socket: the image and the names of mount targets. A claim, decided on by policy."""

    __slots__ = ("as_of", "devices", "explain", "features", "gpu", "image", "mpi", "platform", "targets")
    KEYS = frozenset({"image", "platform", "target", "explain", "as-of", "gpu", "device", "feature", "mpi"})
    VERB = "run"

    def __init__(
        self,
        *,
        image: str,
        targets: Sequence[Target] = (),
        platform: str = "",
        explain: bool = False,
        as_of: int | None = None,
        gpu: str = "",
        devices: Sequence[str] = (),
        features: Sequence[str] = (),
        mpi: str = "",
    ) -> None:
        self.image = image
        #: ``all``, or names of GPUs with commas between; empty: none.
        self.gpu = gpu
        #: Qualified CDI names, and names of site profiles, each once.
        self.devices = tuple(dict.fromkeys(devices))
        self.features = tuple(dict.fromkeys(features))
        #: Whose MPI: ``container``, ``host``, or ``auto``; empty: as the site has it, and the caller has not asked.
        self.mpi = mpi
        self.targets = tuple(targets)
        self.platform = platform
        self.explain = explain
        #: Seconds since 1970: the name is to mean what it meant then. None: what it means now.
        self.as_of = as_of

    def targets_with(self, carry: Sequence[str]) -> tuple[Target, ...]:
        """The targets and the site's directories, without those that lie below another: they exist in the other's
        source.
        """
        wanted = {target.path: target for target in self.targets}
        for path in carry:
            wanted.setdefault(os.fsencode(path), Target("d", os.fsencode(path)))
        kept: list[Target] = []
        for target in sorted(wanted.values(), key=lambda target: target.path.split(b"/")):
            if not kept or not target.path.startswith(kept[-1].path + b"/"):
                kept.append(target)
        return tuple(kept)

    def frame(self) -> Frame:
        """The request as a frame."""
        fields = [("image", os.fsencode(self.image))]
        if self.platform:
            fields.append(("platform", os.fsencode(self.platform)))
        if self.explain:
            fields.append(("explain", b"yes"))
        if self.as_of is not None:
            fields.append(("as-of", b"%d" % self.as_of))
        fields += [(key, os.fsencode(value)) for key, value in (("gpu", self.gpu), ("mpi", self.mpi)) if value]
        fields += [("device", os.fsencode(name)) for name in self.devices]
        fields += [("feature", os.fsencode(name)) for name in self.features]
        fields += [("target", target.kind.encode() + b":" + target.path) for target in self.targets]
        return Frame(self.VERB, fields)

    @classmethod
    def of_frame(cls, untrusted: Frame) -> LaunchRequest:
        """The request in a frame. Raises :class:`ProtocolBroken` unless every field is well formed."""
        untrusted.require_keys(cls.KEYS)
        targets = [Target.parse(value) for value in untrusted.every("target")]
        if len(targets) > TARGETS_MAX:
            raise ProtocolBroken(f"{len(targets)} mount targets, {TARGETS_MAX} are possible")
        if len({target.path for target in targets}) != len(targets):
            raise ProtocolBroken("a mount target is named twice")
        explain = untrusted.one("explain", b"no")
        if explain not in (b"yes", b"no"):
            raise ProtocolBroken("explain is neither yes nor no")
        as_of = untrusted.one("as-of", b"")
        if as_of and not (as_of.isdigit() and len(as_of) <= AS_OF_DIGITS):
            raise ProtocolBroken("as-of is no number of seconds")
        gpu = untrusted.text("gpu", "")
        if gpu and (len(gpu) > FEATURE_NAME_MAX or not is_gpu_choice(gpu)):
            raise ProtocolBroken("gpu is no choice of GPUs")
        mpi = untrusted.text("mpi", "")
        if mpi not in ("", *MPI_CHOICES):
            raise ProtocolBroken("mpi is none of the choices")
        return cls(
            image=untrusted.text("image"),
            platform=untrusted.text("platform", ""),
            targets=sorted(targets, key=lambda target: target.path.split(b"/")),
            explain=explain == b"yes",
            as_of=int(as_of) if as_of else None,
            gpu=gpu,
            devices=_feature_words(untrusted, "device"),
            features=_feature_words(untrusted, "feature"),
            mpi=mpi,
        )


def _feature_words(untrusted: Frame, key: str) -> list[str]:
    values = untrusted.every(key)
    if len(values) > FEATURES_MAX:
        raise ProtocolBroken(f"{len(values)} fields {key}, {FEATURES_MAX} are possible")
    return [_feature_word(value) for value in values]


def _feature_word(untrusted: bytes) -> str:
    """A name of a device or feature: printable ASCII without a blank. Whether there is such a thing is asked later."""
    if not 0 < len(untrusted) <= FEATURE_NAME_MAX or not all(33 <= byte < 127 for byte in untrusted):
        raise ProtocolBroken("a name of a device or host feature that none can have")
    return untrusted.decode()


def _is_pid(text: str) -> bool:
    """Whether ``text`` is a process id in plain decimal digits: no sign, no blank, no leading zero."""
    return text.isascii() and text.isdigit() and text[0] != "0" and len(text) <= 7 and int(text) < _PID_END


class ExecRequest:
    """What crosses the socket to go where a running process is: its pid, and the name its image is known by.

    Both are claims: the kernel tells the engine whose process that is and which image it runs in. The name only says
    which of the image's names policy is asked about.
    """

    __slots__ = ("image", "pid")
    KEYS = frozenset({"pid", "image"})
    VERB = "exec"

    def __init__(self, *, pid: int, image: str = "") -> None:
        self.pid = pid
        self.image = image

    def frame(self) -> Frame:
        """The request as a frame."""
        fields = [("pid", b"%d" % self.pid)]
        if self.image:
            fields.append(("image", os.fsencode(self.image)))
        return Frame(self.VERB, fields)

    @classmethod
    def of_frame(cls, untrusted: Frame) -> ExecRequest:
        """The request in a frame. Raises :class:`ProtocolBroken` unless every field is well formed."""
        untrusted.require_keys(cls.KEYS)
        pid = untrusted.text("pid")
        if not _is_pid(pid):
            raise ProtocolBroken("the pid to go to is not a process id")
        return cls(pid=int(pid), image=untrusted.text("image", ""))
