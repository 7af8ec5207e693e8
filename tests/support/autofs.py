"""Debian's automounter with one indirect map: directories that exist once somebody walks into them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.support.host import Host
from tests.support.polling import wait_until


@contextlib.contextmanager
def automounts(host: Host, point: Path, exports: Mapping[str, Path]) -> Iterator[None]:
    """POINT/NAME stands for the directory of each export until the end. Needs a Host of its own."""
    maps = point.with_name(f"{point.name}.map")
    maps.write_text("".join(f"{name} -fstype=bind :{export}\n" for name, export in exports.items()))
    master = point.with_name(f"{point.name}.master")
    master.write_text(f"{point} {maps} --timeout=600\n")
    log = point.with_name(f"{point.name}.log")
    with log.open("wb") as output:
        daemon = host.popen(
            ["automount", "--foreground", "--pid-file", f"{point}.pid", str(master)], stdout=output, stderr=output
        )
    try:
        wait_until(
            lambda: any(mount.target == str(point) and mount.kind == "autofs" for mount in host.mounts()),
            what=lambda: f"the automounter; {log.read_text()}",
        )
        yield
    finally:
        daemon.terminate()
        daemon.wait(30)
