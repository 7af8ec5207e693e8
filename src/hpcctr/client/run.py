"""The caller's half of a launch as a story. Ends by becoming enter, which becomes the command."""

from __future__ import annotations

import os

from hpcctr.client import as_of, carry, connect, enter, environment, preflight
from hpcctr.errors import NoCommand, UsageWrong
from hpcctr.request import MPI_CHOICES, LaunchRequest, RunWords, is_gpu_choice

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Sequence
    from typing import NoReturn

    from hpcctr.wire import Frame


#: Images of files and directories (:mod:`hpcctr.image.reference`).
FILE_TRANSPORTS = ("oci-archive", "docker-archive", "oci")
#: Tells a program, and hpcctr ps, which image it runs in.
IMAGE_VARIABLE = b"HPCCTR_IMAGE"
DIGEST_VARIABLE = b"HPCCTR_IMAGE_DIGEST"


class Wishes:
    """What of the node a launch asks for: by its options, or by variables where they cannot be given (as under
    ``srun --container``).
    """

    __slots__ = ("devices", "features", "gpu", "mpi")

    def __init__(self, words: RunWords, caller: dict[bytes, bytes]) -> None:
        self.gpu = words.gpu or _text_of(caller, b"HPCCTR_GPU")
        self.mpi = words.mpi or _text_of(caller, b"HPCCTR_MPI")
        self.devices = [os.fsdecode(name) for name in words.device or caller.get(b"HPCCTR_DEVICE", b"").split()]
        self.features = [os.fsdecode(name) for name in words.feature or caller.get(b"HPCCTR_FEATURE", b"").split()]
        if self.gpu and not is_gpu_choice(self.gpu):
            raise UsageWrong(f"HPCCTR_GPU={self.gpu}: not all, none, or names of GPUs with commas between")
        if self.mpi and self.mpi not in MPI_CHOICES:
            raise UsageWrong(f"HPCCTR_MPI={self.mpi}: not one of {', '.join(MPI_CHOICES)}")
        if self.gpu == "none":
            self.gpu = ""


def _text_of(caller: dict[bytes, bytes], name: bytes) -> str:
    return os.fsdecode(caller.get(name, b""))


class Launch:
    """Everything decided about one launch: what the engine granted and what the caller brings."""

    __slots__ = ("baggage", "command", "devices", "dropped", "granted", "variables", "warnings")

    def __init__(self, words: RunWords, granted: Frame, caller: dict[bytes, bytes]) -> None:
        wishes = Wishes(words, caller)
        self.granted = granted
        self.baggage = _baggage(words, caller, granted.every("carry"))
        self.variables, self.dropped = variables_for(
            granted,
            caller,
            clean=words.clean_env,
            requested=words.env,
            shown=(*carry.KERNEL_TREES, *(mount.target for mount in self.baggage.mounts)),
            directory=self.baggage.directory,
        )
        self.command = _command(words, granted)
        self.warnings = [os.fsdecode(text) for text in granted.every("warning")]
        #: Device nodes of host features, as the caller finds them.
        self.devices = preflight.settle_devices(granted, wishes, self.variables, self.warnings)
        preflight.require_wireup(granted, wishes.mpi, self.variables, self.warnings)
        preflight.require_launcher_outside(self.command, self.variables, image=granted.text("name"))


def run(words: RunWords, sock: _socket.socket | None = None) -> NoReturn:
    """Become the command of ``words``; ``sock`` is a connection to an engine in this session (root), else the node's
    is asked.

    Raises any :class:`hpcctr.errors.HpcctrError` before that.
    """
    preflight.require_outside()
    sock, launch = prepare(words, sock)
    preflight.warn(launch.warnings, launch.variables)
    descriptor = inheritable(sock)
    argv = enter.plan(
        descriptor,
        launch.baggage.mounts,
        launch.baggage.directory,
        launch.command,
        launch.variables[b"PATH"].value,
        kernel_trees=carry.KERNEL_TREES,
    )
    program = launch.granted.one("enter")
    variables = {name: variable.value for name, variable in launch.variables.items()}
    if words.clean_env:
        enter.become(program, argv, variables)
    environment.set_in_this_process(variables)
    enter.become(program, argv)


def prepare(words: RunWords, sock: _socket.socket | None = None) -> tuple[_socket.socket, Launch]:
    """Ask the engine, that of ``sock`` or the node's, and settle what the launch will be: the connection, where enter
    asks for the namespace, and the launch.
    """
    caller = environment.of_this_process()
    baggage = _baggage(words, caller, ())
    wishes = Wishes(words, caller)
    request = LaunchRequest(
        image=_absolute(words.image),
        targets=baggage.targets(),
        platform=words.platform,
        explain=words.explain,
        gpu=wishes.gpu,
        devices=wishes.devices,
        features=wishes.features,
        mpi=wishes.mpi,
        # Who asks the registry wants what the name means now.
        as_of=None if words.pull == "always" else as_of.job_start(caller),
    )
    sock, granted = connect.asked(request.frame(), sock)
    return sock, Launch(words, granted, caller)


def _absolute(image: str) -> str:
    """An image of a file by a path that means the same to everybody: the engine has another working directory."""
    transport, colon, path = image.partition(":")
    if not colon or transport not in FILE_TRANSPORTS or path.startswith("/"):
        return image
    return f"{transport}:{os.path.join(os.getcwd(), path)}"


def variables_for(
    granted: Frame,
    caller: dict[bytes, bytes],
    *,
    clean: bool,
    requested: Sequence[bytes],
    root: bytes = b"",
    shown: Sequence[bytes] | None = None,
    directory: bytes | None = None,
) -> tuple[dict[bytes, environment.Variable], dict[bytes, str]]:
    """(the command's variables, dropped ones with the reason); ``root``, ``shown`` and ``directory`` are those of
    :func:`hpcctr.client.environment.build`.

    Raises :class:`UsageWrong`.
    """
    variables, dropped = environment.build(
        caller,
        image=granted.every("env"),
        host=granted.every("host-env"),
        extra_globs=granted.every("host-glob"),
        clean=clean,
        requested=requested,
        root=root,
        shown=shown,
        directory=directory,
    )
    for name, field in ((IMAGE_VARIABLE, "name"), (DIGEST_VARIABLE, "digest")):
        if name not in variables or variables[name].origin != "-e":
            variables[name] = environment.Variable(granted.one(field), "hpcctr")
    return variables, dropped


def _baggage(
    words: RunWords, caller: dict[bytes, bytes], site_directories: list[bytes] | tuple[bytes, ...]
) -> carry.Baggage:
    return carry.gather(
        caller, volumes=words.volume, workdir=words.workdir, no_home=words.no_home, site_directories=site_directories
    )


def _command(words: RunWords, granted: Frame) -> list[bytes]:
    """CMD exactly; with --entrypoint that and CMD; without CMD the image's entrypoint and command."""
    if words.entrypoint is not None:
        return [words.entrypoint, *(words.command or ())]
    command = (
        list(words.command) if words.command is not None else [*granted.every("entrypoint"), *granted.every("command")]
    )
    if not command:
        raise NoCommand(f"{words.image} says no command to run", hint=f"hpcctr run {words.image} -- CMD")
    return command


def inheritable(sock: _socket.socket) -> int:
    """A descriptor of the socket above 2 that enter inherits: 0 to 2 may be closed and belong to the command."""
    import fcntl

    return fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD, 3)
