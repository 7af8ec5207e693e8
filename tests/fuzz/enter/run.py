#!/usr/bin/env python3
"""Fuzzes the parts of enter that read what others wrote, guided by coverage: clang's libFuzzer, AddressSanitizer and
UndefinedBehaviorSanitizer.

    tests/fuzz/enter/run.py SECONDS [TARGET…] [--work DIRECTORY]

Each target is a C file beside this one that includes enter's own source and compares it with a second reading of the
same bytes. SECONDS are for all targets together; with 0 each reads its corpus and no more. One line of JSON a target:

    {"name": "plan", "seconds": 30, "executions": 140000, "edges": 500, "features": 2100, "findings": []}

Findings are files below DIRECTORY/findings, which `DIRECTORY/TARGET FILE` repeats; then the exit status is 1. Without
--work, both are in a temporary directory, removed at the end unless something was found. Inputs that were found to
reach new places are kept in DIRECTORY/corpus/TARGET, and used again.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[2] / "src/hpcctr/enter"

_LONGEST_INPUT = {"plan": 6000, "mountinfo": 20000, "control": 64, "report": 12000}
"""Bytes: a little more than the limits the target has to meet."""
_SHARE = {"plan": 4, "mountinfo": 4, "control": 1, "report": 1}
"""How the time is divided."""
TARGETS = tuple(_SHARE)

_FLAGS = (
    *("-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function"),
    "-fsanitize=fuzzer,address,undefined",
    "-fno-sanitize-recover=all",
    # enter brings a verdict of its own, and a _start, of which the C library's comes first.
    *("-fno-stack-protector", "-Wl,--allow-multiple-definition"),
)


class NoCompiler(Exception):
    """clang or its libFuzzer is missing; says what to install."""


@dataclass(frozen=True, kw_only=True)
class Fuzzed:
    """What became of one target. `edges` and `features` are libFuzzer's measures of coverage."""

    name: str
    seconds: int
    executions: int
    edges: int
    features: int
    findings: tuple[str, ...]


def build(target: str, work: Path) -> Path:
    """The fuzzer of a target, at WORK/TARGET."""
    if shutil.which("clang") is None:
        raise NoCompiler("clang is not in PATH: apt install clang libclang-rt-dev")
    program = work / target
    command = ["clang", *_FLAGS, "-I", str(SOURCES), str(HERE / f"{target}.c"), "-o", str(program)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if "libclang_rt" in ended.stderr:
        raise NoCompiler("clang has no libFuzzer: apt install libclang-rt-dev (Debian 12: libclang-rt-14-dev)")
    if ended.returncode != 0:
        raise RuntimeError(f"{target}.c does not compile\n{ended.stderr}")
    return program


def fuzz(target: str, seconds: int, work: Path) -> Fuzzed:
    """Build and run one target; 0 seconds: only its corpus."""
    program = build(target, work)
    grown, findings = work / "corpus" / target, work / "findings"
    grown.mkdir(parents=True, exist_ok=True)
    findings.mkdir(exist_ok=True)
    before = set(findings.iterdir())
    dictionary = HERE / f"{target}.dict"
    ended = subprocess.run(
        [
            program,
            *(["-runs=0"] if seconds == 0 else [f"-max_total_time={seconds}"]),
            f"-max_len={_LONGEST_INPUT[target]}",
            *("-timeout=10", "-print_final_stats=1", f"-artifact_prefix={findings}/{target}-"),
            *([f"-dict={dictionary}"] if dictionary.exists() else []),
            *(grown, HERE / "corpus" / target),
        ],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    found = sorted(str(file) for file in set(findings.iterdir()) - before)
    if ended.returncode != 0 and not found:
        raise RuntimeError(f"{target} ended with {ended.returncode}\n{ended.stderr[-4000:]}")
    return Fuzzed(
        name=target,
        seconds=seconds,
        executions=_last(r"number_of_executed_units: (\d+)", ended.stderr),
        edges=_last(r" cov: (\d+) ", ended.stderr),
        features=_last(r" ft: (\d+) ", ended.stderr),
        findings=tuple(found),
    )


def _last(pattern: str, text: str) -> int:
    numbers = re.findall(pattern, text)
    return int(numbers[-1]) if numbers else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz enter, guided by coverage.")
    parser.add_argument("seconds", type=int, help="for all targets together; 0: only what is in the corpus")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all without")
    parser.add_argument("--work", type=Path, help="directory for programs, corpus and findings; kept")
    asked = parser.parse_args()
    targets: list[str] = asked.targets or list(TARGETS)
    if unknown := set(targets) - set(TARGETS):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    work = asked.work or Path(tempfile.mkdtemp(prefix="hpcctr-fuzz."))
    work.mkdir(parents=True, exist_ok=True)
    shares = sum(_SHARE[target] for target in targets)
    has_findings = False
    try:
        for target in targets:
            seconds = max(1, asked.seconds * _SHARE[target] // shares) if asked.seconds else 0
            fuzzed = fuzz(target, seconds, work)
            has_findings = has_findings or bool(fuzzed.findings)
            print(json.dumps(asdict(fuzzed)), flush=True)
    except NoCompiler as missing:
        print(f"run.py: {missing}", file=sys.stderr)
        return 2
    finally:
        if asked.work is None and not has_findings:
            shutil.rmtree(work)
    return 1 if has_findings else 0


if __name__ == "__main__":
    sys.exit(main())
