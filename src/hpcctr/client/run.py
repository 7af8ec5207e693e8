"""The caller's half of a launch as a story. Ends by becoming enter, which becomes the command."""

from __future__ import annotations

from hpcctr.client import carry, connect, enter, environment
from hpcctr.errors import NoCommand
from hpcctr.request import LaunchRequest, RunWords

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from typing import NoReturn

    from hpcctr.wire import Frame


#: Tells a program, and hpcctr ps, which image it runs in.
IMAGE_VARIABLE = b"HPCCTR_IMAGE"
DIGEST_VARIABLE = b"HPCCTR_IMAGE_DIGEST"


class Launch:
    """Everything decided about one launch: what the engine granted and what the caller brings."""

    __slots__ = ("baggage", "command", "dropped", "granted", "variables")

    def __init__(self, words: RunWords, granted: Frame) -> None:
        caller = environment.of_this_process()
        self.granted = granted
        self.variables, self.dropped = environment.build(
            caller,
            image=granted.every("env"),
            host=granted.every("host-env"),
            extra_globs=granted.every("host-glob"),
            clean=words.clean_env,
            requested=words.env,
        )
        for name, field in ((IMAGE_VARIABLE, "name"), (DIGEST_VARIABLE, "digest")):
            if name not in self.variables or self.variables[name].origin != "-e":
                self.variables[name] = environment.Variable(granted.one(field), "hpcctr")
        self.baggage = _baggage(words, caller, granted.every("carry"))
        self.command = _command(words, granted)


def run(words: RunWords, sock: _socket.socket | None = None) -> NoReturn:
    """Become the command of ``words``; ``sock`` is a connection to an engine in this session (root), else the node's
    is asked.

    Raises any :class:`hpcctr.errors.HpcctrError` before that.
    """
    sock = sock or connect.connect()
    launch = prepare(words, sock)
    descriptor = _inheritable(sock)
    argv = enter.plan(
        descriptor,
        launch.baggage.mounts,
        launch.baggage.directory,
        launch.command,
        launch.variables[b"PATH"].value,
        kernel_trees=carry.KERNEL_TREES,
    )
    program = launch.granted.one("enter")
    enter.become(program, argv, {name: variable.value for name, variable in launch.variables.items()})


def prepare(words: RunWords, sock: _socket.socket) -> Launch:
    """Ask the engine and settle what the launch will be."""
    baggage = _baggage(words, environment.of_this_process(), ())
    request = LaunchRequest(
        image=words.image, targets=baggage.targets(), platform=words.platform, explain=words.explain
    )
    return Launch(words, connect.ask(sock, request.frame()))


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


def _inheritable(sock: _socket.socket) -> int:
    """A descriptor of the socket above 2 that enter inherits: 0 to 2 may be closed and belong to the command."""
    import fcntl

    return fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD, 3)
