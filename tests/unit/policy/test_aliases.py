"""Other names of an image that was asked for by its digest."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from hpcctr.image.publish import set_name
from hpcctr.image.reference import ImageRef
from hpcctr.image.store import Store
from hpcctr.policy.aliases import other_names
from hpcctr.policy.rules import Rule
from tests.support.values import a_stored_image, publish_for_test

DENY = (Rule(name="d", action="deny", images=("*:nightly",)), Rule(name="a", action="allow"))
DIGEST = "sha256:" + "a" * 64


@pytest.fixture
def store(tmp_path: Path) -> str:
    """One image by three names, two in one repository; one of them has gone on to another image."""
    path = str(tmp_path / "store")
    image = a_stored_image(name="quay.io/org/app:1", digest=DIGEST)
    publish_for_test(path, image)
    opened = Store.open(path, writable=True)
    for name in ("quay.io/org/app:nightly", "quay.io/other/app:2"):
        set_name(opened, ImageRef.parse(name), image.record.platform, DIGEST)
    publish_for_test(path, a_stored_image(name="quay.io/org/app:nightly", digest="sha256:" + "b" * 64))
    return path


def test_a_digest_alone_has_every_name_the_image_has_or_had(store: str) -> None:
    assert other_names(DENY, store, Store.open(store).find(DIGEST)) == (
        "quay.io/org/app:1",
        "quay.io/org/app:nightly",
        "quay.io/other/app:2",
    )


def test_a_name_with_a_digest_has_the_tags_of_its_repository(store: str) -> None:
    found = Store.open(store).find(f"quay.io/org/app@{DIGEST}")
    assert found.name == f"quay.io/org/app@{DIGEST}"
    assert other_names(DENY, store, found) == ("quay.io/org/app:1", "quay.io/org/app:nightly")


def test_a_tag_is_the_name_that_counts(store: str) -> None:
    assert other_names(DENY, store, Store.open(store).find("quay.io/org/app:1")) == ()


def test_nothing_is_looked_at_where_no_rule_denies_a_name_or_the_image_is_private(store: str) -> None:
    image = Store.open(store).find(DIGEST)
    nowhere = store + "/gone"
    assert other_names((Rule(name="a", action="allow", images=("*:1",)),), nowhere, image) == ()
    assert other_names((Rule(name="d", action="deny", users=("bob",)),), nowhere, image) == ()
    assert other_names(DENY, nowhere, msgspec.structs.replace(image, is_private=True)) == ()


def test_a_registry_that_is_denied_is_a_name_as_well(store: str) -> None:
    rules = (Rule(name="d", action="deny", registries=("quay.io",)),)
    assert other_names(rules, store, Store.open(store).find(DIGEST))
