"""Compiles the programs `enter` and `front`: used by the package build (setup.py) and by tests.

The only need is gcc with the kernel's headers; the programs link no library.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

from hpcctr.errors import EnterNotBuilt

ENGINE_SOCKET = "/run/hpcctr/engine.sock"
SOURCES = Path(__file__).parent
FRONT_SOURCE = SOURCES.parent / "client/front.c"
LONGEST_SOCKET_PATH = 107
"""Bytes: sun_path of unix(7) without its final zero."""

_HOW_TO_GET_A_COMPILER = "apt install gcc linux-libc-dev, or: dnf install gcc kernel-headers"

_FORM = (
    "-std=gnu11",
    "-O2",
    "-ffreestanding",  # no libc: sys.h says why
    "-nostdlib",
    "-fno-builtin",  # memcpy and memset are those of sys.h
    "-fno-tree-loop-distribute-patterns",  # else the loop inside memset becomes a call of memset
    "-fno-asynchronous-unwind-tables",  # nothing unwinds
    "-fPIE",
    "-static-pie",  # the kernel places it at a random address (ASLR)
    "-fvisibility=hidden",  # every symbol is reached relative to the program counter: nothing to relocate
    "-fno-tree-switch-conversion",  # the same: no tables of pointers
)
_WARNINGS = (
    "-Werror",
    "-Wall",
    "-Wextra",
    "-Wconversion",
    "-Wsign-conversion",
    "-Wshadow",
    "-Wundef",
    "-Wvla",
    "-Wcast-align",
    "-Wcast-qual",
    "-Wstrict-prototypes",
    "-Wmissing-prototypes",
    "-Wold-style-definition",
    "-Wimplicit-fallthrough",
    "-Wnull-dereference",
    "-Wduplicated-cond",
    "-Wduplicated-branches",
    "-Wlogical-op",
    "-Wformat=2",
    "-Wtrampolines",  # no code on the stack
)
_HARDENING = (
    # Undefined behaviour becomes a trap: an index beyond its array, an overflow, a null or misaligned pointer.
    "-fsanitize=undefined",
    "-fsanitize-undefined-trap-on-error",  # the form that needs no runtime library
    "-fno-strict-aliasing",  # the stack of the start is read as words and as pointers
    "-fno-delete-null-pointer-checks",  # checks stay, even where the compiler believes them needless
    "-fno-common",
    "-fstack-protector-strong",  # enter_main draws the guard from AT_RANDOM
    "-fstack-clash-protection",
)
_HARDENING_OF_MACHINE = {
    "x86_64": (
        "-mstack-protector-guard=global",  # without libc there is no thread area to hold it
        "-fcf-protection=full",  # indirect branches and returns are checked where the kernel turns it on
        "-Wl,-z,cet-report=error",
    ),
    "aarch64": (
        "-mstack-protector-guard=sysreg",
        "-mstack-protector-guard-reg=tpidr_el0",
        "-mstack-protector-guard-offset=0",
        "-mbranch-protection=standard",
        "-Wl,-z,force-bti",  # complains of code without, and complaints are fatal
    ),
}
_IF_KNOWN = (
    "-ftrivial-auto-var-init=zero",  # gcc 12: what a system call leaves unwritten is zero, not old stack
    "-fzero-call-used-regs=used-gpr",  # gcc 11: fewer gadgets, no stale values
    "-fstrict-flex-arrays=3",  # gcc 13: an array at the end of a structure is as long as it says
    "-fzero-init-padding-bits=all",  # gcc 15
    "-Wbidi-chars=any",  # gcc 12: the text a reviewer sees is the text the compiler reads
)
_LINKING = (
    "-Wl,--fatal-warnings",
    "-Wl,--no-dynamic-linker",
    "-Wl,--build-id=none",  # the same sources give the same bytes
    "-Wl,-z,noexecstack",
    "-Wl,-z,separate-code",  # code pages hold code only
    "-Wl,-z,text",
    "-Wl,-z,defs",
    "-Wl,-z,norelro",  # a read-only part after relocation is a loader's work; there is neither
    "-s",
)
LEFT_OUT = {
    "-D_FORTIFY_SOURCE=3": "it replaces calls of a libc by checked ones, and there is no libc",
    "-D_GLIBCXX_ASSERTIONS": "of the C++ library",
    "-fexceptions": "for C++ and threads that are cancelled; nothing unwinds",
    "-fno-strict-overflow": "it defines what a signed overflow gives; here one is a trap (-fsanitize=undefined)",
    "-fwrapv": "the same",
    "-fhardened": "a name for flags that are all here; it would add _FORTIFY_SOURCE and relro",
    "-Wl,-z,relro": "makes what a loader has relocated read-only; nothing is relocated",
    "-Wl,-z,now": "binds functions of libraries at the start; there are none",
    "-Wl,-z,nodlopen": "for libraries",
    "-Wl,--as-needed": "no library is linked",
    "-Wl,--no-copy-dt-needed-entries": "no library is linked",
    "-mharden-sls=all": "against reading secrets by speculation; enter has none",
    "-mindirect-branch=thunk": "the same",
    "-flto": "one file is the whole program already",
    "-fsanitize=cfi": "of clang; the one indirect call is checked by -fcf-protection where the kernel does",
}
"""What OpenSSF's guide for C and C++, Debian's hardening=+all and checksec recommend and enter leaves out, and why."""


def _run(argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False)


def _find_compiler(cc: str | None) -> str:
    for name in [cc] if cc else ["gcc", "cc"]:
        if found := shutil.which(name):
            return found
    raise EnterNotBuilt(f"no C compiler: {cc or 'gcc'} is not in PATH", hint=_HOW_TO_GET_A_COMPILER)


def _flags_of_machine(compiler: str) -> tuple[str, ...]:
    triplet = _run([compiler, "-dumpmachine"]).stdout.strip()
    machine = triplet.partition("-")[0]
    if machine not in _HARDENING_OF_MACHINE:
        raise EnterNotBuilt(f"enter does not exist for {triplet or compiler}", hint="use gcc for x86-64 or aarch64")
    return _HARDENING_OF_MACHINE[machine]


def _is_known(compiler: str, flag: str) -> bool:
    return _run([compiler, "-Werror", flag, "-x", "c", "-fsyntax-only", "/dev/null"]).returncode == 0


def _require_plain(socket_path: str) -> None:
    """It becomes a C string, and is compared byte by byte with what getpeername(2) tells."""
    plain = socket_path.isascii() and socket_path.isprintable() and not set(socket_path) & set('"\\?% ')
    if not plain or not socket_path.startswith("/") or len(socket_path) > LONGEST_SOCKET_PATH:
        raise EnterNotBuilt(f"socket path {socket_path!r} is not a plain absolute path", hint=f"use {ENGINE_SOCKET}")


def _needs_a_loader(program: bytes) -> bool:
    """Whether the dynamic section asks for libraries or relocations (elf(5)): nothing in enter would carry them out."""
    program_headers, size, count = struct.unpack_from("<Q", program, 32)[0], *struct.unpack_from("<HH", program, 54)
    for at in range(program_headers, program_headers + size * count, size):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", program, at)
        if kind != 2:  # PT_DYNAMIC
            continue
        tags = {tag for tag, _ in struct.iter_unpack("<qQ", program[offset : offset + length])}
        # DT_NEEDED, DT_RELA, DT_REL, DT_TEXTREL, DT_JMPREL, DT_RELR
        return bool(tags & {1, 7, 17, 22, 23, 36})
    return False


def compile_enter(output: Path, *, cc: str | None = None, socket_path: str = ENGINE_SOCKET) -> None:
    """Compile enter.c to `output`, replacing it by rename; raises EnterNotBuilt with what the compiler said."""
    _require_plain(socket_path)
    _compile(SOURCES / "enter.c", output, cc, [f'-DHPCCTR_ENGINE_SOCKET="{socket_path}"'])


def compile_front(output: Path, *, cc: str | None = None) -> None:
    """Compile client/front.c to `output`, as :func:`compile_enter` does with enter."""
    # It stands on enter's headers and uses a part of them.
    _compile(FRONT_SOURCE, output, cc, ["-Wno-unused-function"])


def flags_of(compiler: str) -> list[str]:
    """What `compiler` is given for every program of enter's kind."""
    flags = [*_FORM, *_WARNINGS, *_HARDENING, *_LINKING, *_flags_of_machine(compiler)]
    return flags + [flag for flag in _IF_KNOWN if _is_known(compiler, flag)]


def _compile(source: Path, output: Path, cc: str | None, more_flags: list[str]) -> None:
    compiler = _find_compiler(cc)
    flags = flags_of(compiler)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".enter.", dir=output.parent) as directory:
        built = Path(directory) / "program"
        ended = _run([compiler, *flags, *more_flags, str(source), "-o", str(built)])
        if ended.returncode != 0:
            raise EnterNotBuilt(f"{compiler} cannot compile {source.name}\n{ended.stderr}", hint=_HOW_TO_GET_A_COMPILER)
        if _needs_a_loader(built.read_bytes()):
            raise EnterNotBuilt(f"{compiler} made a program that needs a loader", hint="use gcc 11 or newer")
        built.replace(output)
