"""Host edits of a site."""

from __future__ import annotations

from hpcctr.host.edits import of_site
from hpcctr.site import Site


def test_the_sites_variables_are_edits_with_their_origin() -> None:
    edits = of_site(Site(env={"A": "1"}))
    assert [(edit.name, edit.value, edit.origin) for edit in edits.env] == [("A", "1", "site.toml [env]")]


def test_equal_edits_have_equal_keys_and_others_do_not() -> None:
    assert of_site(Site(env={"A": "1"})).key() == of_site(Site(env={"A": "1"})).key()
    assert of_site(Site(env={"A": "1"})).key() != of_site(Site(env={"A": "2"})).key()
