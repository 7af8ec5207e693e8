"""JSON and YAML of CDI files."""

from __future__ import annotations

import json
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hpcctr.host.cdi_text import Value, Wrong, as_text, parse

#: What gopkg.in/yaml.v2 makes of plain words, and that as a word.
PLAIN: list[tuple[str, Value, str | None]] = [
    ("word", "word", "word"),
    ("0", 0, "0"),
    ("0660", 0o660, "432"),
    ("0o660", 0o660, "432"),
    ("0x1F", 31, "31"),
    ("0b101", 5, "5"),
    ("1_000", 1000, "1000"),
    ("-12", -12, "-12"),
    ("08", 8.0, "8"),
    ("1.50", 1.5, "1.5"),
    (".5", 0.5, "0.5"),
    ("1e3", 1000.0, "1000"),
    ("yes", True, "true"),
    ("On", True, "true"),
    ("y", True, "true"),
    ("NO", False, "false"),
    ("~", None, None),
    ("null", None, None),
    ("0.5.0", "0.5.0", "0.5.0"),
    ("_1", "_1", "_1"),
    ("0:0", "0:0", "0:0"),
    ("60:30", "60:30", "60:30"),
    ("2001-12-14", "2001-12-14", "2001-12-14"),
    ('"0"', "0", "0"),
    ("'yes'", "yes", "yes"),
]


@pytest.mark.parametrize(("written", "value", "text"), PLAIN)
def test_plain_words_are_what_the_fields_own_library_takes_them_for(
    written: str, value: Value, text: str | None
) -> None:
    found = parse(f"a: {written}\n".encode())
    assert found == {"a": value} and type(found["a"]) is type(value)
    assert as_text(found["a"]) == text
    assert parse(f"- {written}\n".encode()) == [value]


def test_a_key_is_a_word_whatever_it_looks_like() -> None:
    assert parse(b"0: a\nyes: b\n'1': c\n") == {"0": "a", "true": "b", "1": "c"}


def test_json_is_read_as_json_with_tabs_and_byte_order_mark() -> None:
    assert parse(b'\xef\xbb\xbf{\n\t"a": [1,\t"0660", true, null]\n}\n') == {"a": [1, "0660", True, None]}


def test_yaml_in_braces_is_yaml() -> None:
    assert parse(b"{a: 0660, b: [yes]}") == {"a": 0o660, "b": [True]}


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (b"a: 1\nb: 2\na: 3\n", "line 3: 'a' is there twice"),
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
        (b"a: &x 1\nb: *x\n", "line 1: an anchor or a tag"),
        (b"a: !!str 1\n", "line 1: an anchor or a tag"),
        (b"a: !!python/object/apply:os.system [id]\n", "an anchor or a tag"),
        (b"- 1\n---\n- 2\n", "line 2: a second document"),
        (b"[a]: b\n", "a key that is no word"),
        (b"~: b\n", "a key that is no word"),
        (b"", "empty"),
        (b"# nothing\n", "empty"),
        (b"a: \xff\n", "not UTF-8 at byte 3"),
        (b"a: [\n", "line 2: "),
        (b"a:\n\t- b\n", "line 2: "),
        (b"[" * 100000, "line 1: "),
        (b"{a: " * 100000, "more than 16 levels"),
        (b'{"a":' * 100000, "more than 16 levels"),
        (b"- " * 100000, "more than 16 levels"),
        (b"[" + b"1," * 300000 + b"]", "more than 200000 values"),
        (b'"\\ud800"', "line 1: "),
    ],
)
def test_what_is_refused_is_said_with_its_line(written: bytes, text: str) -> None:
    begin = time.process_time()
    with pytest.raises(Wrong) as raised:
        parse(written)
    assert text in str(raised.value) and len(str(raised.value)) < 300
    assert time.process_time() - begin < 10


def test_a_bomb_of_aliases_is_refused_at_its_first_anchor() -> None:
    lines = ["a0: &a0 [lol, lol]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40))]
    with pytest.raises(Wrong, match="line 1: an anchor"):
        parse("\n".join(lines).encode())


#: Without digits, and the words of one letter that Go takes for truth values and the emitter here does not quote.
_words = st.text(st.characters(codec="utf-8", categories=["L", "P", "Zs"])).filter(lambda word: word not in "yYnN")
_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | _words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abcdefg", min_size=2), inner, max_size=4),
    max_leaves=12,
)


@given(value=_values)
def test_what_is_written_as_json_or_yaml_is_read_again(value: Value) -> None:
    assert parse(json.dumps({"key": value}).encode()) == {"key": value}
    assert parse(yaml.safe_dump({"key": value}, allow_unicode=True).encode()) == {"key": value}


@given(raw=st.binary(max_size=200) | st.text("{}[]:,-?&*!|>'\"%@`#ab01 \n\t", max_size=60).map(str.encode))
def test_nothing_but_wrong_is_raised(raw: bytes) -> None:
    try:
        parse(raw)
    except Wrong as error:
        assert str(error)


def test_the_reader_in_python_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = "\n".join(f"k{number}: {written}" for number, (written, _, _) in enumerate(PLAIN)).encode()
    found = parse(raw)
    monkeypatch.setattr(yaml, "CSafeLoader", yaml.SafeLoader)
    assert parse(raw) == found
    for bad in (b'"\\UFFFFFFFF"', b"a: [", b"[" * 1000, b"\0"):
        with pytest.raises(Wrong):
            parse(bad)
