"""Image mounts of one engine."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcctr.engine import imagemount
from hpcctr.engine.imagemount import ImageMounts
from hpcctr.engine.mounts import unmount
from hpcctr.errors import DeadlinePassed, ImageMountFailed
from hpcctr.mounttable import read_mounts
from tests.support.mount_namespace import in_private_mounts
from tests.support.scratch import scratch
from tests.support.squashfs import make_squashfs

pytestmark = pytest.mark.root

DIGEST = "sha256:" + "a" * 64


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory with two image files, root.squashfs and other.squashfs."""
    with scratch("imagemount") as directory:
        for name in ("root", "other"):
            make_squashfs(directory / f"{name}.squashfs")
        yield directory


def _mounted(mounts: ImageMounts) -> list[str]:
    return [entry.target for entry in read_mounts() if entry.target.startswith(mounts.directory + "/")]


def _take(mounts: ImageMounts, file: str, digest: str = DIGEST) -> str:
    image = os.open(file, os.O_RDONLY)
    try:
        return mounts.take(image, image_digest=digest)
    finally:
        os.close(image)


def counting(place: str) -> list[object]:
    mounts = ImageMounts(f"{place}/counting")
    first, second = _take(mounts, f"{place}/root.squashfs"), _take(mounts, f"{place}/root.squashfs")
    mounted = len(_mounted(mounts))
    release = os.path.exists(f"{mounts.path(first)}/etc/os-release")
    mounts.release(first)
    after_one = len(_mounted(mounts))
    mounts.release(second)
    return [first == second, mounted, release, after_one, _mounted(mounts), os.listdir(mounts.directory)]


def test_a_file_is_mounted_once_and_until_its_last_user_goes(place: Path) -> None:
    assert in_private_mounts(counting, place) == [True, 1, True, 1, [], []]


def identities(place: str) -> list[str]:
    mounts = ImageMounts(f"{place}/identities")
    os.symlink("root.squashfs", f"{place}/link.squashfs")
    names = [_take(mounts, f"{place}/{name}.squashfs") for name in ("root", "link", "other")]
    names.append(_take(mounts, f"{place}/root.squashfs", "sha256:" + "b" * 64))
    return names


def test_a_mount_is_known_by_the_file_and_not_by_what_is_claimed_of_it(place: Path) -> None:
    root, link, other, other_digest = in_private_mounts(identities, place)
    assert root == link
    assert len({root, other, other_digest}) == 3


def taking_while_others_release(place: str) -> list[object]:
    mounts = ImageMounts(f"{place}/busy")
    problems: list[str] = []

    def work() -> None:
        for _ in range(15):
            name = _take(mounts, f"{place}/root.squashfs")
            if not os.path.exists(f"{mounts.path(name)}/etc/os-release"):
                problems.append("not mounted while it is used")
            mounts.release(name)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [problems, _mounted(mounts), os.listdir(mounts.directory)]


def test_whoever_uses_it_finds_it_mounted_whatever_others_do(place: Path) -> None:
    assert in_private_mounts(taking_while_others_release, place) == [[], [], []]


def after_a_restart(place: str) -> list[object]:
    earlier = ImageMounts(f"{place}/restart")
    used, unused = _take(earlier, f"{place}/root.squashfs"), _take(earlier, f"{place}/other.squashfs")
    mounts = ImageMounts(f"{place}/restart")
    mounts.adopt(used)
    mounts.sweep()
    left = _mounted(mounts) == [mounts.path(used)]
    try:
        mounts.adopt(unused)
    except ImageMountFailed:
        refused = True
    mounts.release(used)
    mounts.sweep()
    return [left, refused, _mounted(mounts), os.listdir(mounts.directory)]


def test_after_a_restart_mounts_in_use_stay_and_others_go(place: Path) -> None:
    assert in_private_mounts(after_a_restart, place) == [True, True, [], []]


def unmounted_by_hand(place: str) -> bool:
    mounts = ImageMounts(f"{place}/hand")
    name = _take(mounts, f"{place}/root.squashfs")
    unmount(mounts.path(name))
    _take(mounts, f"{place}/root.squashfs")
    return os.path.exists(f"{mounts.path(name)}/etc/os-release")


def test_an_image_an_administrator_unmounted_is_mounted_again(place: Path) -> None:
    assert in_private_mounts(unmounted_by_hand, place)


def what_is_no_image(place: str) -> list[str]:
    mounts = ImageMounts(f"{place}/bad")
    Path(f"{place}/empty").touch()
    Path(f"{place}/text").write_text("#!/bin/sh\n")
    Path(f"{place}/broken").write_bytes(b"hsqs" + bytes(9000))
    messages = []
    for name in ("empty", "text", "broken"):
        try:
            _take(mounts, f"{place}/{name}")
        except ImageMountFailed as error:
            messages.append(f"{error.message}|{error.hint}")
    try:
        mounts.take(os.open(place, os.O_RDONLY), image_digest=DIGEST)
    except ImageMountFailed as error:
        messages.append(error.message)
    assert _mounted(mounts) == []
    assert os.listdir(mounts.directory) == []
    return messages


def test_what_is_no_image_is_refused_with_a_remedy_and_leaves_nothing(place: Path) -> None:
    empty, text, broken, directory = in_private_mounts(what_is_no_image, place)
    assert empty == text == f"image {DIGEST}: its file is not a squashfs|hpcctr rm {DIGEST}, then pull it again"
    assert broken.startswith(f"image {DIGEST} cannot be mounted: ")
    assert directory == f"image {DIGEST}: what the store opened is not a file"


def unlinked(place: str) -> list[str]:
    mounts = ImageMounts(f"{place}/unlinked")
    os.link(f"{place}/other.squashfs", f"{place}/gone.squashfs")
    image = os.open(f"{place}/gone.squashfs", os.O_RDONLY)
    os.unlink(f"{place}/gone.squashfs")
    name = mounts.take(image, image_digest=DIGEST)
    os.close(image)
    return sorted(os.listdir(mounts.path(name)))


def test_the_opened_file_is_mounted_even_without_a_name(place: Path) -> None:
    assert "bin" in in_private_mounts(unlinked, place)


def while_another_hangs(place: str) -> list[object]:
    imagemount._MOUNT_SECONDS = 0.05
    mounts = ImageMounts(f"{place}/hang")
    name = _take(mounts, f"{place}/root.squashfs")
    mounts._mounts[name].lock.acquire()
    try:
        _take(mounts, f"{place}/root.squashfs")
    except DeadlinePassed as error:
        message = error.message
    other = _take(mounts, f"{place}/other.squashfs")
    mounts._mounts[name].lock.release()
    mounts.release(name)
    mounts.release(other)
    return [message, _mounted(mounts), os.listdir(mounts.directory)]


def test_a_mount_that_hangs_ends_the_launches_that_wait_for_it_and_no_others(place: Path) -> None:
    message, mounted, left = in_private_mounts(while_another_hangs, place)
    assert message.startswith(f"image {DIGEST} was not mounted within ")
    assert (mounted, left) == ([], [])
