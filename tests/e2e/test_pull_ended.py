"""Pulls that end early, and who does what in them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hpcctr.errors import (
    StoreUnusable,
)
from hpcctr.image.store import Store
from hpcctr.site import Site
from tests.support.oci import (
    Image,
    busybox,
    file,
    tar,
    write_oci_archive,
)
from tests.support.pulling import nothing_is_left, pulled
from tests.support.users import User

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="unpacks owners and modes")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(store=str(tmp_path / "store"))


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounts a small tmpfs")
    archive = write_oci_archive(tmp_path / "app.tar", Image(layers=(tar(file("big", os.urandom(3 << 20))),)))
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=755", "tmpfs", str(small)], check=True)
    try:
        site = Site(store=str(small / "store"))
        with pytest.raises(StoreUnusable, match="no space left") as caught:
            pulled(f"oci-archive:{archive}", site)
        assert "free space" in caught.value.hint
        assert nothing_is_left(site)
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_pull_that_is_ended_leaves_nothing(tmp_path: Path, site: Site, number: signal.Signals) -> None:
    archive = write_oci_archive(
        tmp_path / "app.tar",
        Image(layers=(tar(*(file(f"f{n}", os.urandom(1 << 20)) for n in range(64))),), compression="none"),
    )
    code = f"""
        import sys, time
        from hpcctr.image.pull import pull
        from hpcctr.image.reference import ImageRef
        from hpcctr.site import Site
        def slow(progress):
            if progress.stage == "write":
                print("writing", flush=True)
                time.sleep(60)
        pull(ImageRef.parse({f"oci-archive:{archive}"!r}), site=Site(store={site.store!r}), progress=slow)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"writing\n"
    child.send_signal(number)
    assert child.wait(timeout=30) == (-number if number == signal.SIGINT else 128 + number)
    child.stdout.close()
    assert nothing_is_left(site)


@as_root
def test_an_ordinary_user_pulls_into_a_store_of_their_own_and_not_into_ours(place: Path, alice: User) -> None:
    archive = write_oci_archive(place / "app.tar", busybox())
    archive.chmod(0o644)
    Store.open(str(place / "ours"), writable=True)
    code = f"""
        import sys
        from hpcctr.errors import StoreUnusable
        from hpcctr.image.pull import pull
        from hpcctr.image.reference import ImageRef
        from hpcctr.image.store import Store
        from hpcctr.site import Site
        ref = ImageRef.parse({f"oci-archive:{archive}"!r})
        image = pull(ref, site=Site(store=sys.argv[1])).image
        print(image.record.file_digest, Store.open(sys.argv[1]).open_image_file(image) > 0)
        try:
            pull(ref, site=Site(store={str(place / "ours")!r}))
        except StoreUnusable as error:
            print(error)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(alice.home / "store")],
        user=alice.uid,
        group=alice.gid,
        extra_groups=alice.groups,
        cwd="/",
        env={"PATH": os.environ["PATH"], "HOME": str(alice.home), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    first, second = run.stdout.splitlines() or [run.stderr, ""]
    digest, opened = first.split()
    assert opened == "True"
    assert "not writable for uid" in second
    # Nobody's identity is in the file: root's pull gives the same.
    assert pulled(f"oci-archive:{archive}", Site(store=str(place / "ours"))).image.record.file_digest == digest
