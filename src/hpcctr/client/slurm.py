"""``hpcctr slurm-task``: a task of ``srun --container=IMAGE``, as Slurm's oci.conf(5) starts it; see docs/slurm.md.

Slurm hands a task to a runtime as text for /bin/sh, with slurmd's environment. Its pattern for the command quotes words
with single quotes in a way no shell undoes, and does not quote the container's name at all. So the shell is given both
behind a ``#``, where it reads nothing, and they are taken apart here:

    … # 'WORD' 'WORD'…,IMAGE

Slurm before 23.02 has no such way; there the words are in the config.json it writes, and the name in an annotation of
the bundle's.
"""

from __future__ import annotations

import os
import sys

from hpcctr.client.enter import become
from hpcctr.errors import SlurmTaskWrong, UsageWrong

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

#: How Slurm writes a single quote inside a word: _pattern_argv() in src/slurmd/slurmstepd/container.c.
_QUOTE = b"'\"'\"''"
_BEGIN = b" # "
#: Key of the annotation that names the image in a bundle's config.json.
IMAGE_ANNOTATION = "hpcctr.image"
#: Where Slurm before 23.02 tells a runtime to mount the batch script, and what etc/slurm/task-prolog leaves.
_SCRIPT_INSIDE = "/tmp/slurm/startup"  # noqa: S108 - Slurm's name
_TASK_ENVIRONMENT = "hpcctr-environment"


def run(arguments: Sequence[str]) -> NoReturn:
    """Become ``hpcctr run IMAGE -- WORD…`` with the task's environment. Raises :class:`SlurmTaskWrong`."""
    if len(arguments) != 2:
        raise UsageWrong("slurm-task is for Slurm's oci.conf", hint="srun --container=IMAGE CMD; docs/slurm.md")
    if arguments[0] == "--bundle":
        image, words, environment = of_bundle(arguments[1])
    else:
        environment = variables(_read(arguments[0]))
        image, words = parse(os.fsencode(arguments[1]))
        words[0] = as_typed(words[0], environment.get(b"PATH", b""))
    if not image or image.startswith(b"-"):
        raise SlurmTaskWrong(
            f"--container={os.fsdecode(image)}: not the name of an image", hint="srun --container=IMAGE; hpcctr images"
        )
    program = os.fsencode(sys.argv[0])
    become(program, [program, b"run", image, b"--", *words], environment)


def parse(said: bytes) -> tuple[bytes, list[bytes]]:
    """(the image, the words of the command) in the text Slurm gave the shell."""
    rest = said.partition(_BEGIN)[2]
    words = []
    while rest.startswith(b"'"):
        word, rest = _word(rest[1:])
        words.append(word)
        if rest.startswith(b" "):
            rest = rest[1:]
        elif rest.startswith(b","):
            return rest[1:], words
        else:
            break
    raise SlurmTaskWrong("what Slurm said of the task cannot be read", hint="take oci.conf from hpcctr's etc/slurm")


def _word(rest: bytes) -> tuple[bytes, bytes]:
    """A word whose opening quote has been read, and what follows it."""
    word = b""
    while True:
        part, quote, behind = rest.partition(b"'")
        word += part
        if not quote:
            raise SlurmTaskWrong("a word of the command has no end", hint="take oci.conf from hpcctr's etc/slurm")
        if not rest[len(part) :].startswith(_QUOTE):
            return word, behind
        word += b"'"
        rest = rest[len(part) + len(_QUOTE) :]


def variables(untrusted: bytes) -> dict[bytes, bytes]:
    """An environment written with a NUL after each variable; of a name that occurs twice the first, as getenv(3)."""
    found: dict[bytes, bytes] = {}
    for entry in untrusted.split(b"\0"):
        name, sign, value = entry.partition(b"=")
        if sign and name:
            found.setdefault(name, value)
    return found


def as_typed(program: bytes, path: bytes) -> bytes:
    """The command as it was typed: Slurm looks a word without a slash up in the host's PATH, and inside it is the
    image's PATH that counts (_build_path() in src/slurmd/slurmstepd/task.c).

    Somebody who typed just that path cannot be told apart; the image's PATH decides for them too.
    """
    directory, _, name = program.rpartition(b"/")
    for entry in path.split(b":"):
        candidate = entry + b"/" + name
        if entry and name and os.path.exists(candidate) and not os.path.isdir(candidate):
            return name if entry == directory else program
    return program


def of_bundle(directory: str) -> tuple[bytes, list[bytes], dict[bytes, bytes]]:
    """(image, words, environment) from what Slurm before 23.02 puts into a bundle it has made for a task.

    Its variables are the step's; those of the task, as its rank, are in a file that etc/slurm/task-prolog writes.
    Changes to the directory the step was started in: Slurm has forgotten it.
    """
    import json

    file = os.path.join(directory, _TASK_ENVIRONMENT)
    environment = variables(_read(file))
    # Slurm removes the directory only when it is empty.
    os.unlink(file)
    try:
        config = json.loads(_read(os.path.join(directory, "config.json")))
        image = os.fsencode(config["annotations"][IMAGE_ANNOTATION])
        words = [os.fsencode(word) for word in config["process"]["args"]]
        scripts = [mount["source"] for mount in config["mounts"] if mount["destination"] == _SCRIPT_INSIDE]
    except (ValueError, KeyError, TypeError):
        raise SlurmTaskWrong(
            f"{directory}config.json: not of a bundle that names an image", hint="etc/slurm/make-bundles; docs/slurm.md"
        ) from None
    if scripts and words[:1] == [os.fsencode(_SCRIPT_INSIDE)]:
        words[0] = os.fsencode(scripts[0])
    where = environment.get(b"PWD") or environment.get(b"SLURM_SUBMIT_DIR", b"/")
    try:
        os.chdir(where)
    except OSError as error:
        raise SlurmTaskWrong(
            f"{os.fsdecode(where)}: {error.strerror}", hint="start srun in another directory"
        ) from None
    return image, words, environment


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise SlurmTaskWrong(
            f"{path}: {error.strerror}",
            hint="an administrator sets CreateEnvFile and TaskProlog as in hpcctr's etc/slurm; docs/slurm.md",
        ) from None
