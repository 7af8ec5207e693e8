"""A finding as doctor prints it in JSON."""

from __future__ import annotations

from dataclasses import asdict

from hpcctr.cli.finding import Finding


def test_a_good_finding_has_no_remedy_unless_it_is_given_one() -> None:
    assert asdict(Finding(thing="a", is_good=True, what="b")) == {
        "thing": "a",
        "is_good": True,
        "what": "b",
        "remedy": "",
    }
