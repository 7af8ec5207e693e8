"""One target under atheris (libFuzzer over Python): `python coverage_guided.py TARGET [LIBFUZZER OPTION…] CORPUS…`.

Runs in the virtualenv of scripts/fuzz alone. Ends as libFuzzer does: 77 and a file for a finding.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import atheris  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[2]
#: Seconds of processor time one input may take, the instrumentation included; the largest inputs take hundredths.
SECONDS_MAX = 2.0

sys.path[:0] = [str(ROOT), str(ROOT / "src")]
with atheris.instrument_imports(include=["hpcctr", "tomllib"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    run = TARGETS[sys.argv[1]]

    def one(data: bytes) -> None:
        begin = time.process_time()
        run(data)
        if time.process_time() - begin > SECONDS_MAX:
            raise AssertionError(f"{time.process_time() - begin:.1f} s for one input of {len(data)} bytes")

    atheris.Setup([sys.argv[0], *sys.argv[2:]], one, enable_python_coverage=True)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
