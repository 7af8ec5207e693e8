"""What the client of exec reads of the process it goes to."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from hpcctr.client.exec import image_name, working_directory
from tests.support.polling import wait_until


def _started(directory: Path, **environment: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        ["/bin/sh", "-c", "echo; exec cat"],
        cwd=directory,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_the_image_is_named_as_the_process_has_it(tmp_path: Path) -> None:
    process = _started(tmp_path, A="HPCCTR_IMAGE=no", HPCCTR_IMAGE="docker.io/library/debian:12")
    # Popen returns when the descriptors of the old program are closed, a moment before the new one has its environment.
    assert wait_until(lambda: image_name(process.pid)) == "docker.io/library/debian:12"
    process.communicate()
    assert image_name(process.pid) == ""
    assert image_name(2**22) == ""


def test_it_starts_where_the_process_stands(tmp_path: Path) -> None:
    process = _started(tmp_path)
    assert working_directory(process.pid) == os.fsencode(tmp_path)
    process.communicate()


def test_it_starts_at_the_root_when_that_has_gone(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    process = _started(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert working_directory(process.pid) == b"/"
    (tmp_path / "gone (deleted)").mkdir()
    assert working_directory(process.pid) == b"/"
    process.communicate()
    assert working_directory(2**22) == b"/"
