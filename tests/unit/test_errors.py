"""The tree of errors."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from hpcctr import errors


def _classes() -> list[type[errors.HpcctrError]]:
    return [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, errors.HpcctrError)]


def test_every_slug_belongs_to_one_class() -> None:
    slugs = [cls.slug for cls in _classes()]
    assert sorted(slugs) == sorted(set(slugs))
    assert len(slugs) > 20


@pytest.mark.parametrize("cls", _classes(), ids=lambda cls: cls.slug)
def test_a_class_is_found_by_its_slug_and_ends_with_a_status_of_ours(cls: type[errors.HpcctrError]) -> None:
    assert errors.of_slug(cls.slug) is cls
    assert cls.exit_status in (errors.FAILED, errors.REFUSED, errors.NOT_FOUND)
    assert cls.__doc__


def test_an_unknown_slug_is_the_root_of_the_tree() -> None:
    assert errors.of_slug("from-a-newer-engine") is errors.HpcctrError


def test_the_text_names_slug_what_and_hint() -> None:
    error = errors.ImageNotInStore("x:1 is not in the store", hint="hpcctr pull x:1")
    assert error.for_stderr() == "hpcctr: error[image-not-in-store]: x:1 is not in the store\nhint: hpcctr pull x:1\n"
    assert errors.DeadlinePassed("late").for_stderr() == "hpcctr: error[deadline]: late\n"


def test_every_slug_enter_prints_belongs_to_a_class_with_its_status() -> None:
    statuses = {"FAILED": errors.FAILED, "REFUSED": errors.REFUSED, "NOT_FOUND": errors.NOT_FOUND}
    found = set()
    for source in (Path(__file__).parents[2] / "src/hpcctr/enter").glob("*.[ch]"):
        for status, slug in re.findall(r'\b(FAILED|REFUSED|NOT_FOUND),\s*"([a-z-]+)"', source.read_text()):
            assert errors.of_slug(slug).slug == slug, f"{source.name}: {slug}"
            found.add((slug, statuses[status]))
    assert ("command-not-found", errors.NOT_FOUND) in found
    wrong = {
        (slug, status) for slug, status in found if errors.of_slug(slug).exit_status not in (status, errors.FAILED)
    }
    assert not wrong
