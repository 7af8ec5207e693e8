"""Pulling for tests: into a store of the test's own, in this process."""

from __future__ import annotations

import subprocess
from pathlib import Path

from hpcctr.image.pull import PullResult, pull
from hpcctr.image.reference import ImageRef
from hpcctr.site import Site
from tests.support.oci import Image, directory, file, tar

SMALL = Image(layers=(tar(directory("etc"), file("etc/motd", b"hello\n")),))


def pulled(text: str, site: Site, **options: object) -> PullResult:
    """What `hpcctr pull TEXT` does."""
    return pull(ImageRef.parse(text), site=site, **options)  # type: ignore[arg-type]


def unpacked(result: PullResult, target: Path) -> Path:
    """The tree of an image file."""
    command = ["unsquashfs", "-no-progress", "-quiet", "-d", str(target), result.image.path]
    subprocess.run(command, check=True, capture_output=True)
    return target


def nothing_is_left(site: Site) -> bool:
    """Whether a store that refused an image is as if nothing had happened."""
    top = Path(site.store)
    return not any(list((top / name).iterdir()) for name in ("images", "names", "tmp"))
