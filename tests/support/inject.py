"""Launches of the program enter in which one system call fails or only claims success: tests/native/inject.c, compiled
with this machine's compiler and spoken to.

    with Injector.start(world, argv, account=ALICE) as injector:
        clean = injector.run()
        injector.run(7, -errno.EIO)
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.enter import SOCKET, Account, World, go_into

_NATIVE = Path(__file__).parent.parent / "native"
HUNG = 1000


def compiled(name: str, directory: Path) -> Path:
    """A program of tests/native in DIRECTORY, for everyone to run; static, so that any root directory will do."""
    program = directory / name
    source = _NATIVE / f"{name}.c"
    subprocess.run(["gcc", "-std=gnu11", "-O2", "-static", "-Wall", "-Wextra", "-o", program, source], check=True)
    program.chmod(0o755)
    return program


def system_call_names() -> dict[int, str]:
    """Number to name, from the kernel's headers for this machine."""
    macros = subprocess.run(
        ["gcc", "-E", "-dM", "-include", "asm/unistd.h", "-x", "c", "/dev/null"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return {int(number): name for name, number in re.findall(r"^#define __NR_(\w+) (\d+)$", macros, re.MULTILINE)}


@dataclass(frozen=True, kw_only=True)
class Call:
    """One system call of a launch, by its place (from 1), with the effective capabilities before and after it (None:
    it did not come back)."""

    place: int
    name: str
    argument: int
    before: int
    after: int | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """How one launch ended: a status, negative after a signal. `where` is the command's mount namespace: `own`,
    `container`, `host`, or `none` when no command was executed."""

    status: int
    where: str
    calls: tuple[Call, ...]
    outside: str
    out: str
    err: str

    @property
    def ran(self) -> bool:
        return self.where != "none"


@dataclass(frozen=True, kw_only=True)
class Injector:
    process: subprocess.Popen[bytes]
    names: dict[int, str]

    @classmethod
    @contextlib.contextmanager
    def start(
        cls,
        world: World,
        tools: Path,
        argv: Sequence[str | bytes],
        *,
        account: Account,
        container: int | None = None,
        refusal: int = 0,
    ) -> Iterator[Injector]:
        """The tool at TOOLS/inject for launches with this plan; `refusal` is the engine's answer instead of a view."""
        answer = world.container if container is None else container
        numbers = [str(number) for number in (world.listener.fileno(), answer, refusal, account.uid)]
        process = subprocess.Popen(
            [tools / "inject", *numbers, SOCKET, world.program, *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[world.listener.fileno(), answer],
            preexec_fn=lambda: go_into(world.host.holder.pid),
        )
        made = cls(process=process, names=system_call_names())
        try:
            yield made
        finally:
            process.communicate(timeout=30)
        assert process.returncode == 0

    def run(self, place: int = 0, value: int = 0) -> Run:
        """A launch whose call at `place` is not carried out and returns `value`; 0: nothing is changed, all is told."""
        return self._ask(place, value)

    def run_without(self, name: str, value: int) -> Run:
        """A launch in which no call of this name is carried out and each returns `value`, as with a seccomp filter."""
        (number,) = (number for number, known in self.names.items() if known == name)
        return self._ask(-number - 1, value)

    def _ask(self, place: int, value: int) -> Run:
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"%d %d\n" % (place, value))
        process.stdin.flush()
        status, where, *lengths = process.stdout.readline().decode().split()
        calls, outside, out, err = (process.stdout.read(int(length)).decode(errors="replace") for length in lengths)
        return Run(
            status=int(status),
            where=where,
            calls=tuple(self._call(place, line) for place, line in enumerate(calls.splitlines(), 1)),
            outside=outside,
            out=out,
            err=err,
        )

    def _call(self, place: int, line: str) -> Call:
        number, argument, before, after = line.split()
        return Call(
            place=place,
            name=self.names[int(number)],
            argument=int(argument),
            before=int(before, 16),
            after=None if after == "-" else int(after, 16),
        )
