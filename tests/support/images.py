"""Images for tests, built here by recipes in tests/images with tools that know nothing of hpcctr, and kept.

The cache is /var/cache/hpcctr/images; an image's key is the digest of everything its recipe reads.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

CACHE = Path("/var/cache/hpcctr")
TESTS = Path(__file__).parent.parent
PROGRAMS_IN_IMAGE = Path("/opt/programs")
"""Where the debian images have tests/programs: PROGRAMS_IN_IMAGE/openmpi/report and so on."""

Suite = Literal["bookworm", "trixie"]


def _digest(*sources: Path | str) -> str:
    """Of names and contents of files, of all files below directories, and of words."""
    hashed = hashlib.sha256()
    for source in sources:
        if isinstance(source, str):
            hashed.update(f"word {source}\0".encode())
            continue
        files = sorted(source.rglob("*")) if source.is_dir() else [source]
        for file in files:
            if file.is_file():
                hashed.update(f"file {file.relative_to(source.parent)}\0".encode() + file.read_bytes())
    return hashed.hexdigest()[:20]


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    lock.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _built(kind: str, name: str, digest: str, build: Callable[[Path], Sequence[str | Path]]) -> Path:
    """The cached thing; when missing, `build` gives the command that makes it at a temporary path."""
    finished = CACHE / kind / f"{name}-{digest}"
    if finished.exists():
        return finished
    with _alone(CACHE / kind / f"{name}.lock"):
        if finished.exists():
            return finished
        unfinished = finished.with_name(f"{finished.name}.unfinished")
        _remove(unfinished)
        command = [str(word) for word in build(unfinished)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        for old in finished.parent.glob(f"{name}-*"):
            if old != unfinished:
                _remove(old)
        unfinished.rename(finished)
    return finished


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def busybox() -> str:
    """`oci:DIRECTORY:latest`, a layout directory with a few megabytes; made without network."""
    recipe = TESTS / "images/busybox"
    digest = _digest(recipe, Path("/bin/busybox").resolve())
    return f"oci:{_built('images', 'busybox', digest, lambda output: [recipe / 'build', output])}:latest"


def debian_mpi(suite: Suite) -> str:
    """`oci-archive:FILE:latest`, that Debian with Open MPI, MPICH and tests/programs compiled against both."""
    recipe, programs = TESTS / "images/debian-mpi", TESTS / "programs"
    archive = _built(
        "images",
        f"{suite}-mpi",
        _digest(recipe, programs, suite),
        lambda output: [recipe / "build", suite, programs, output],
    )
    return f"oci-archive:{archive}:latest"


def wheel_mpi(wheel: str) -> str:
    """`oci-archive:FILE:latest`, a Debian 13 with Python, mpi4py, in /opt/mpi the MPI of a package of PyPI's, as
    `mpich==4.3.2`, and tests/programs compiled with it.
    """
    recipe, programs = TESTS / "images/wheel-mpi", TESTS / "programs"
    archive = _built(
        "images",
        f"wheel-{wheel.replace('==', '-')}",
        _digest(recipe, programs, wheel),
        lambda output: [recipe / "build", wheel, programs, output],
    )
    return f"oci-archive:{archive}:latest"


def musl() -> str:
    """`oci:DIRECTORY:latest`, a layout directory with the musl of Debian's package, and nothing else."""
    recipe = TESTS / "images/musl"
    return f"oci:{_built('images', 'musl', _digest(recipe), lambda output: [recipe / 'build', output])}:latest"


def debian_tools() -> str:
    """`oci-archive:FILE:latest`, a Debian with vim, less, gdb, strace and python3."""
    recipe = TESTS / "images/debian-tools"
    archive = _built("images", "debian-tools", _digest(recipe), lambda output: [recipe / "build", output])
    return f"oci-archive:{archive}:latest"


def native_programs() -> Path:
    """Directory with the same programs compiled on this host: openmpi/report, mpich/pingpong and so on."""
    programs = TESTS / "programs"
    digest = _digest(programs, Path("/etc/os-release").resolve())
    return _built("programs", "native", digest, lambda output: [programs / "compile", output])


def push(image: str, reference: str, *, certificates: Path | None = None, user: str | None = None) -> None:
    """Copy an image into a registry (`host:port/repository:tag`), over plain HTTP unless certificates are given."""
    trust = ["--dest-tls-verify=false"] if certificates is None else [f"--dest-cert-dir={certificates}"]
    credentials = [] if user is None else [f"--dest-creds={user}"]
    argv = ["skopeo", "--insecure-policy", "copy", "--quiet", *trust, *credentials, image, f"docker://{reference}"]
    subprocess.run(argv, check=True, capture_output=True)
