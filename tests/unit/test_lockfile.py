"""Lock files: read as they were written, changed as a person would."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcctr.errors import ImageNotLocked, LockFileWrong, ReferenceWrong
from hpcctr.image.reference import ImageRef
from hpcctr.lockfile import Locked, full_name, locked_image, parse, read, updated
from hpcctr.processor import machine

A, B = ("sha256:" + letter * 64 for letter in "ab")
HERE = f"linux/{machine()}"
APP = Locked(name="docker.io/library/app:1", digest=A, platform=HERE)

_word = st.text("abz019", min_size=1, max_size=4)
_name = st.builds(
    lambda registry, parts, tag: f"{registry}{'/'.join(parts)}{tag}",
    st.sampled_from(["", "docker://", "quay.io/", "localhost/", "LOCALHOST:5000/", "[::1]:80/", "index.docker.io/"]),
    st.lists(_word, min_size=1, max_size=3),
    st.sampled_from(["", ":1", ":latest", f"@{A}", f":1@{A}"]),
)


@given(_name)
def test_a_name_is_completed_as_the_store_completes_it(text: str) -> None:
    try:
        wanted = str(ImageRef.parse(text).name_in_store())
    except ReferenceWrong:
        return
    assert full_name(text) == wanted
    assert full_name(f"@alice/{text}") == f"@alice/{wanted}"


@given(st.text(max_size=40))
def test_any_text_is_completed_to_something(text: str) -> None:
    assert full_name(text)


def test_what_is_written_is_read_and_launched_by_its_digest(tmp_path: Path) -> None:
    path = str(tmp_path / "images.lock")
    shared = Locked(name="@alice/localhost/app:1", digest=B, platform=HERE)
    by_index = Locked(name=f"quay.io/org/app@{B}", digest=A, platform=HERE)
    alone = Locked(name=B, digest=B, platform=HERE)
    Path(path).write_text(updated("", [APP, shared, by_index, alone], path))
    assert parse(read(path), path) == [APP, shared, by_index, alone]
    for text, launched in (
        ("app:1", f"docker.io/library/app:1@{A}"),
        ("@alice/localhost/app:1", f"@alice/localhost/app:1@{B}"),
        (f"quay.io/org/app@{B}", f"quay.io/org/app@{A}"),
        (B, f"@alice/localhost/app:1@{B}"),
    ):
        assert locked_image(path, text) == launched


def test_comments_and_the_order_of_lines_survive() -> None:
    text = f"# for the paper\n\ndocker.io/library/app:1 {A} linux/arm64\n{APP.line()}  # as of May\n# end\n"
    newer = Locked(name=APP.name, digest=B, platform=HERE)
    other = Locked(name="quay.io/x/y:2", digest=A, platform=HERE)
    assert updated(text, [newer, other], "f") == (
        f"# for the paper\n\ndocker.io/library/app:1 {A} linux/arm64\n{newer.line()}  # as of May\n# end\n"
        f"{other.line()}\n"
    )
    assert updated(text, [APP], "f") == text
    assert updated(text.rstrip("\n"), [], "f") == text


def test_the_platform_that_is_wanted_decides(tmp_path: Path) -> None:
    path = tmp_path / "images.lock"
    path.write_text(f"{APP.name} {A} linux/arm/v7\n{APP.name} {B} linux/s390x\n")
    assert locked_image(str(path), "app:1", "linux/arm") == f"{APP.name}@{A}"
    assert locked_image(str(path), "app:1", "linux/s390x") == f"{APP.name}@{B}"
    with pytest.raises(ImageNotLocked, match="for linux/arm/v7, linux/s390x, not for") as caught:
        locked_image(str(path), "app:1")
    assert caught.value.hint == f"hpcctr pull --platform {HERE} --lock {path} app:1"


def test_what_is_not_in_the_file_is_named_with_the_command_that_puts_it_there(tmp_path: Path) -> None:
    path = tmp_path / "images.lock"
    path.write_text(APP.line())
    for text in ("app:2", "other", B, "@alice/app:1", "oci-archive:app.tar"):
        with pytest.raises(ImageNotLocked) as caught:
            locked_image(str(path), text)
        assert (str(caught.value), caught.value.hint) == (
            f"image {text} is not in {path}",
            f"hpcctr pull --lock {path} {text}",
        )


@pytest.mark.parametrize(
    "line",
    [
        "app:1",
        f"app:1 {A}",
        f"app:1 {A} {HERE} x",
        f"app:1 {A[:-1]} {HERE}",
        f"app:1 {A.upper()} {HERE}",
        f"a\x1b {A} x",
    ],
)
def test_a_line_that_is_none_is_named_by_its_number(line: str) -> None:
    with pytest.raises(LockFileWrong, match="images.lock, line 3"):
        parse(f"# x\n\n{line}\n", "images.lock")


def test_two_lines_for_one_image_are_refused() -> None:
    with pytest.raises(LockFileWrong, match="line 2: .* twice"):
        parse(f"{APP.line()}\n{APP.line()}\n", "f")


def test_a_file_that_is_no_lock_file_is_refused(tmp_path: Path) -> None:
    for content, match in ((b"\xff", "UTF-8"), (bytes(2**20 + 1), "larger")):
        (tmp_path / "f").write_bytes(content)
        with pytest.raises(LockFileWrong, match=match):
            read(str(tmp_path / "f"))
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(LockFileWrong):
            read(str(path))
