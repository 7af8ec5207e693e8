"""What Slurm says of a task, taken apart: words and names that no shell has read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcctr.client.slurm import as_typed, of_bundle, parse, variables
from hpcctr.errors import SlurmTaskWrong

BEFORE = b"/bin/sh-cset -f; IFS=; exec /opt/hpcctr/bin/hpcctr slurm-task /spool/environment $(tr); exit 127 # "


def as_slurm_writes(words: list[bytes], image: bytes) -> bytes:
    """Slurm's pattern ``%@,%b``: src/slurmd/slurmstepd/container.c, a single quote is written twice."""
    return BEFORE + b" ".join(b"'" + word.replace(b"'", b"'\"'\"''") + b"'" for word in words) + b"," + image


@given(
    words=st.lists(st.binary().map(lambda word: word.replace(b"\0", b"'")), min_size=1),
    image=st.binary().map(lambda name: name.replace(b"\0", b"'")),
)
def test_every_word_and_name_comes_back_as_it_was(words: list[bytes], image: bytes) -> None:
    assert parse(as_slurm_writes(words, image)) == (image, words)


@pytest.mark.parametrize("word", [b"'", b"''", b"' '", b"',x", b"it's", b"'\"'\"''", b"", b"\n", b" # "])
@pytest.mark.parametrize("image", [b"image:1", b",'x'", b" # 'y',z", b"'", b"\n"])
def test_quotes_commas_and_marks_are_only_characters(word: bytes, image: bytes) -> None:
    for words in ([word], [b"sh", b"-c", word], [word, word, b"x"]):
        assert parse(as_slurm_writes(words, image)) == (image, words)


@pytest.mark.parametrize(
    "said", [b"", BEFORE, BEFORE + b"'a", BEFORE + b"'a'", BEFORE + b"'a' b,c", BEFORE + b"a,b", b"'a',b"]
)
def test_anything_else_is_an_error(said: bytes) -> None:
    with pytest.raises(SlurmTaskWrong):
        parse(said)


def test_variables_keep_every_byte_and_the_first_of_a_name_counts() -> None:
    assert variables(b"A=1\0B=two\nlines\0A=2\0C=\0=x\0D\0\xff=\xfe=\0") == {
        b"A": b"1", b"B": b"two\nlines", b"C": b"", b"\xff": b"\xfe=",
    }  # fmt: skip


def test_a_command_slurm_has_looked_up_is_the_word_again(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "two/solver").touch()
    (tmp_path / "one/other").mkdir()
    (tmp_path / "two/other").touch()
    first, second = os.fsencode(tmp_path / "one"), os.fsencode(tmp_path / "two")
    path = b":".join([b"", b"/nowhere", first, second])
    assert as_typed(second + b"/solver", path) == b"solver"
    # A directory is no command, for Slurm neither.
    assert as_typed(second + b"/other", path) == b"other"
    assert as_typed(first + b"/solver", path) == first + b"/solver"
    for word in (b"solver", b"./solver", b"/elsewhere/solver", b"/", b"", b"missing"):
        assert as_typed(word, path) == word
    assert as_typed(second + b"/solver", b"") == second + b"/solver"


def _bundle(directory: Path, **changes: object) -> str:
    config = {
        "annotations": {"hpcctr.image": "solver:1.2"},
        "process": {"args": ["sh", "-c", "it's"]},
        "mounts": [{"destination": "/tmp/slurm/stdout", "source": "/x"}],
        **changes,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "hpcctr-environment").write_bytes(b"PWD=%b\0RANK=1\0" % os.fsencode(directory))
    return f"{directory}/"


def test_an_older_slurms_bundle_says_image_words_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    image, words, environment = of_bundle(_bundle(tmp_path))
    assert (image, words, environment[b"RANK"]) == (b"solver:1.2", [b"sh", b"-c", b"it's"], b"1")
    assert Path.cwd() == tmp_path
    # Or Slurm could not remove the directory.
    assert not (tmp_path / "hpcctr-environment").exists()


def test_a_batch_script_is_where_slurm_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    mounts = [{"destination": "/tmp/slurm/startup", "source": "/spool/slurm_script"}]
    bundle = _bundle(tmp_path, process={"args": ["/tmp/slurm/startup", "a"]}, mounts=mounts)
    assert of_bundle(bundle)[1] == [b"/spool/slurm_script", b"a"]


@pytest.mark.parametrize("changes", [{"annotations": {}}, {"process": {}}, {"process": []}, {"mounts": [1]}])
def test_a_bundle_of_something_else_is_an_error(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(SlurmTaskWrong, match="names an image"):
        of_bundle(_bundle(tmp_path, **changes))


def test_without_the_task_prolog_nothing_is_run(tmp_path: Path) -> None:
    bundle = _bundle(tmp_path)
    (tmp_path / "hpcctr-environment").unlink()
    with pytest.raises(SlurmTaskWrong) as raised:
        of_bundle(bundle)
    assert "TaskProlog" in raised.value.hint
