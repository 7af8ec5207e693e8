"""Pulling, what tests/e2e/test_images.py does not show: names, nothing done twice, signals put back."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from pathlib import Path

import pytest

from hpcctr.errors import ConversionFailed, ImageBroken, ReferenceWrong, UsageWrong
from hpcctr.image import convert
from hpcctr.image.pull import pull
from hpcctr.image.reference import ImageRef
from hpcctr.image.store import Store
from hpcctr.site import Site
from tests.support.oci import Image, file, tar, write_layout

IMAGE = Image(layers=(tar(file("etc/passwd", b"root:x:0:0::/:/bin/sh\n")),), config={"Labels": {"a": "b"}})


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(store=str(tmp_path / "store"))


@pytest.fixture
def ref(tmp_path: Path) -> ImageRef:
    return ImageRef.parse(f"oci:{write_layout(tmp_path / 'layout', IMAGE, ref='v1')}:v1")


def test_the_record_tells_everything_of_the_image(ref: ImageRef, site: Site) -> None:
    record = pull(ref, site=site).image.record
    assert (record.digest, record.source, record.schema) == (IMAGE.digest, str(ref), 1)
    assert record.passwd == b"root:x:0:0::/:/bin/sh\n"
    assert record.config.labels == {"a": "b"}
    assert (record.entries, record.content_size) == (3, 22)
    assert record.created.endswith("Z")


def test_what_is_stored_needs_no_writer(ref: ImageRef, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not pull(ref, site=site).was_stored
    monkeypatch.setattr(convert, "_PATH", "/nonexistent")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert pull(ref, site=site).was_stored
    again = pull(ref, site=site, name="other:1")
    assert (again.was_stored, again.name) == (True, "docker.io/library/other:1")


def test_a_missing_writer_is_said_before_anything_is_read(
    ref: ImageRef, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "_PATH", "/nonexistent")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConversionFailed, match="installed"):
        pull(ref, site=site)


@pytest.mark.parametrize(
    ("name", "error"), [("oci:x", UsageWrong), ("a@sha256:" + "0" * 64, UsageWrong), ("A", ReferenceWrong)]
)
def test_names_that_cannot_be_given_are_refused(ref: ImageRef, site: Site, name: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        pull(ref, site=site, name=name)


def test_a_name_moves_to_the_new_image(tmp_path: Path, ref: ImageRef, site: Site) -> None:
    first = pull(ref, site=site)
    write_layout(tmp_path / "layout", dataclasses.replace(IMAGE, config={}), ref="v1")
    second = pull(ref, site=site)
    assert first.name == second.name
    assert Store.open(site.store).find(first.name).record.digest == second.image.record.digest
    assert Store.open(site.store).find(first.image.record.digest).record == first.image.record


def test_a_layer_that_changes_while_it_is_pulled_is_refused(tmp_path: Path, site: Site) -> None:
    # So large that its end is read long after the first word of progress, and then once more.
    large = Image(layers=(tar(file("large", os.urandom(64 << 20))),), compression="none")
    layout = write_layout(tmp_path / "large", large)
    (layer,) = [path for path in (layout / "blobs/sha256").iterdir() if path.stat().st_size > 1 << 20]
    changed: list[bool] = []

    def change(progress: object) -> None:
        if getattr(progress, "stage", "") == "read" and getattr(progress, "done", 0) and not changed:
            changed.append(True)
            with layer.open("r+b") as writer:
                writer.seek(-(1 << 20), os.SEEK_END)
                writer.write(b"changed")

    with pytest.raises(ImageBroken):
        pull(ImageRef.parse(f"oci:{layout}"), site=site, progress=change)
    assert changed
    assert not os.listdir(f"{site.store}/images")


def test_signals_are_as_before_afterwards(ref: ImageRef, site: Site) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    pull(ref, site=site)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)] == before


def test_a_thread_may_pull(ref: ImageRef, site: Site) -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(pull(ref, site=site)))
    thread.start()
    thread.join(60)
    assert results[0].name == "localhost/layout:v1"


def test_two_pulls_at_once_end_with_one_image(ref: ImageRef, site: Site) -> None:
    results = []
    threads = [threading.Thread(target=lambda: results.append(pull(ref, site=site))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [result.image.record for result in results] == [results[0].image.record] * 4
    assert Store.open(site.store).digests() == [IMAGE.digest]
    assert not os.listdir(f"{site.store}/tmp")
