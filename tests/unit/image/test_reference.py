"""Image names: docker's rules, and a canonical text that means the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcctr.errors import ReferenceWrong
from hpcctr.image.reference import ImageRef, is_digest, is_digest_or_prefix

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("typed", "canonical"),
    [
        ("python", "docker.io/library/python:latest"),
        ("python:3.12", "docker.io/library/python:3.12"),
        ("docker://python", "docker.io/library/python:latest"),
        ("org/app", "docker.io/org/app:latest"),
        ("docker.io/python", "docker.io/library/python:latest"),
        ("index.docker.io/python", "docker.io/library/python:latest"),
        ("quay.io/org/team/app:1.0", "quay.io/org/team/app:1.0"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest"),
        ("registry:5000/app", "registry:5000/app:latest"),
        ("[::1]:5000/app", "[::1]:5000/app:latest"),
        ("QUAY.io/app", "quay.io/app:latest"),
        ("a__b/c--d/e.f_g", "docker.io/a__b/c--d/e.f_g:latest"),
        (f"python@{DIGEST}", f"docker.io/library/python@{DIGEST}"),
        (f"quay.io/app:1@{DIGEST}", f"quay.io/app:1@{DIGEST}"),
        ("app:_x.Y-z", "docker.io/library/app:_x.Y-z"),
        ("oci-archive:/x/app.tar", "oci-archive:/x/app.tar"),
        ("oci-archive:app.tar:docker.io/x:1", "oci-archive:app.tar:docker.io/x:1"),
        ("oci:/x/dir:v1", "oci:/x/dir:v1"),
        ("docker-archive:/x/a:b.tar", "docker-archive:/x/a:b.tar"),
    ],
)
def test_what_is_typed_has_one_canonical_text(typed: str, canonical: str) -> None:
    assert str(ImageRef.parse(typed)) == canonical
    assert ImageRef.parse(canonical) == ImageRef.parse(typed)


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "docker://",
        "Python",
        "org/App",
        "a//b",
        "/a",
        "a/",
        "./a",
        "../a",
        "a/../b",
        "-a",
        "a-",
        "a___b",
        "a..b",
        "a:",
        "a:-x",
        "a:b:c",
        "a:" + "t" * 129,
        "a@",
        "a@sha256:12",
        "a@md5:" + "0" * 32,
        f"a@{DIGEST.upper()}",
        f"a@{DIGEST}x",
        "a b",
        "a\nb",
        "a\0b",
        "quay.io/",
        "quay..io/a",
        "quay.io:port/a",
        "caf\u00e9",
        "a:\u0661",
        "x" * 260,
        "oci:",
        "oci-archive:",
        "oci-archive::ref",
        "oci:dir:",
        "docker-archive:",
        "http://quay.io/a",
    ],
)
def test_what_is_no_name_is_refused_with_a_hint(typed: str) -> None:
    with pytest.raises(ReferenceWrong) as caught:
        ImageRef.parse(typed)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


_component = st.from_regex(r"[a-z0-9]{1,8}([._-][a-z0-9]{1,5})?", fullmatch=True)
_registry = st.one_of(
    st.just(""),
    st.from_regex(r"[a-z][a-z0-9]{0,8}\.[a-z]{2,5}(:[0-9]{1,5})?/", fullmatch=True),
    st.just("localhost/"),
    st.just("[::1]:5000/"),
)
_tag = st.one_of(st.just(""), st.from_regex(r":[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True))
_digest = st.one_of(st.just(""), st.from_regex(r"@sha256:[0-9a-f]{64}", fullmatch=True))
_registry_text = st.builds(
    lambda registry, path, tag, digest: registry + "/".join(path) + tag + digest,
    _registry,
    st.lists(_component, min_size=1, max_size=3),
    _tag,
    _digest,
)
_path = st.text(st.characters(exclude_characters="\0\n:", exclude_categories=["Cs"]), min_size=1, max_size=20)
_file_text = st.builds(
    lambda kind, path, ref: f"{kind}:{path}{ref}", st.sampled_from(["oci", "oci-archive"]), _path, _tag
)


@given(st.one_of(_registry_text, _file_text, _path.map("docker-archive:{}".format)))
def test_the_canonical_text_parses_to_an_equal_value(typed: str) -> None:
    ref = ImageRef.parse(typed)
    assert ImageRef.parse(str(ref)) == ref
    assert ImageRef.parse(ref.familiar) == ref
    named = ref.name_in_store()
    assert ImageRef.parse(str(named)) == named
    assert not named.is_file


@given(st.text(max_size=60))
def test_any_text_is_a_name_or_refused(text: str) -> None:
    try:
        ref = ImageRef.parse(text)
    except ReferenceWrong:
        return
    named = ref.name_in_store()
    # These become path components of the store.
    for part in (named.registry, *named.repository.split("/"), *([named.tag] if named.tag else [])):
        assert part not in ("", ".", "..")
        assert "/" not in part
        assert part.isprintable()


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("python:3.12", "docker.io/library/python:3.12"),
        (f"python:3.12@{DIGEST}", f"docker.io/library/python@{DIGEST}"),
        ("oci-archive:/x/App 1.tar", "localhost/app-1:latest"),
        ("oci-archive:/x/app.tar:docker.io/y/z:2.0", "localhost/app:2.0"),
        ("docker-archive:app.tar.gz", "localhost/app:latest"),
        ("docker-archive:app.tgz", "localhost/app:latest"),
        ("oci:/x/layout/:v1", "localhost/layout:v1"),
        ("oci:/", "localhost/image:latest"),
        ("oci-archive:/x/\u65e5\u672c.tar", "localhost/image:latest"),
        ("oci-archive:/x/.tar", "localhost/tar:latest"),
    ],
)
def test_the_name_in_the_store_comes_from_what_was_typed(typed: str, name: str) -> None:
    assert str(ImageRef.parse(typed).name_in_store()) == name


def test_a_relative_path_is_one_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    ref = ImageRef.parse("oci-archive:app.tar:v1")
    assert str(ref.absolute()) == f"oci-archive:{tmp_path}/here/app.tar:v1"
    (tmp_path / "here").rmdir()
    for act in (ref.absolute, ref.name_in_store):
        with pytest.raises(ReferenceWrong, match="working directory"):
            act()


def test_the_familiar_text_is_the_shortest() -> None:
    assert ImageRef.parse("docker.io/library/python:3.12").familiar == "python:3.12"
    assert ImageRef.parse("docker.io/org/app:1").familiar == "org/app:1"
    assert ImageRef.parse("quay.io/app:1").familiar == "quay.io/app:1"


def test_a_repository_that_looks_like_a_registry_keeps_its_registry() -> None:
    ref = ImageRef.parse("docker.io/foo.bar/app:1")
    assert ref.familiar == "docker.io/foo.bar/app:1"


def test_digests_and_their_beginnings() -> None:
    assert is_digest(DIGEST)
    assert not is_digest(DIGEST[:-1])
    assert not is_digest(DIGEST + "\n")
    assert is_digest_or_prefix(DIGEST[: 7 + 12])
    assert not is_digest_or_prefix(DIGEST[: 7 + 11])
    assert not is_digest_or_prefix("sha256:xyz")
