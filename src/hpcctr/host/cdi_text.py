"""JSON and YAML of CDI files as plain values, read the way the field's own library reads them.

That library is Go's sigs.k8s.io/yaml 1.4, for both suffixes: YAML 1.1 as gopkg.in/yaml.v2 resolves it, made JSON,
duplicate keys refused. So a plain ``0660`` is octal, a plain ``yes`` is a truth value, and ``name: 0`` is "0" where a
word is wanted (:func:`as_text`). Stricter here: anchors, aliases, tags and further documents are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, NoReturn, TypeAlias

if TYPE_CHECKING:
    from yaml.events import Event, ScalarEvent

Value: TypeAlias = "None | bool | int | float | str | list[Value] | dict[str, Value]"

#: Nested lists and mappings; a CDI file has eight.
_DEPTH_MAX = 16
#: Values of one file. NVIDIA's have a few thousand.
_VALUES_MAX = 200_000

#: Plain words that are values in gopkg.in/yaml.v2 (resolve.go).
_WORDS: dict[str, None | bool] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"), True),
    **dict.fromkeys(("n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"), False),
}
#: What Go's strconv.ParseInt takes with base 0, and that resolver's floats.
_INTEGER = re.compile(r"([-+]?)(?:0[xX]([0-9a-fA-F]{1,16})|0[bB]([01]{1,64})|0[oO]?([0-7]{1,22})|(0|[1-9][0-9]{0,19}))")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


class Wrong(ValueError):
    """A CDI file that is not to be used; the text says where and why."""


def parse(raw: bytes) -> Value:
    """The value of a file. Raises :class:`Wrong`."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Wrong(f"not UTF-8 at byte {error.start}") from None
    if text.lstrip().startswith("{"):
        # Go's reader takes JSON for YAML, which it is but for some corners: what JSON refuses is tried as that.
        try:
            return _of_json(text)
        except (ValueError, RecursionError):
            pass
    return _of_yaml(text)


def as_text(value: Value) -> str | None:
    """A value where a word is wanted, as the library has it; None for what is none."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value).removesuffix(".0")
    return None


def _of_json(text: str) -> Value:
    value: Value = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_no_number)
    return value


def _without_duplicates(pairs: list[tuple[str, Value]]) -> dict[str, Value]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise Wrong("a key is there twice")
    return made


def _no_number(word: str) -> NoReturn:
    raise Wrong(f"{word} is no number of JSON")


def _of_yaml(text: str) -> Value:
    # Imported by those who meet YAML: it costs more than reading all of /etc/cdi in JSON.
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return _built(yaml.parse(text, Loader=loader))
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise Wrong(f"{line}{error.problem or 'not YAML'}") from None
    except yaml.YAMLError as error:
        raise Wrong(f"not YAML: {str(error).splitlines()[0] if str(error) else 'unreadable'}") from None
    except Wrong:
        raise
    except (ValueError, OverflowError, IndexError) as error:
        # The reader in Python lets some of an impossible escape's own errors through.
        raise Wrong(f"not YAML: {error}") from None


def _built(events: Iterable[Event]) -> Value:
    """The document's value: no recursion, no anchors, so its cost is that of its length."""
    from yaml import events as kinds

    root: list[Value] = []
    #: Where the next value goes: open lists, or open mappings with the key that waits for its value.
    waiting: list[tuple[list[Value] | dict[str, Value], list[str]]] = [(root, [])]
    count = documents = 0
    for event in events:
        if isinstance(event, kinds.AliasEvent):
            raise Wrong(f"{_line(event)}an alias (*{event.anchor}); write it out")
        if isinstance(event, kinds.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise Wrong(f"{_line(event)}a second document; one file has one")
            continue
        if isinstance(event, kinds.MappingEndEvent | kinds.SequenceEndEvent):
            waiting.pop()
            continue
        if not isinstance(event, kinds.NodeEvent):
            continue
        count += 1
        if count > _VALUES_MAX:
            raise Wrong(f"more than {_VALUES_MAX} values")
        if event.anchor is not None or event.tag is not None:  # type: ignore[attr-defined]
            raise Wrong(f"{_line(event)}an anchor or a tag")
        place, keys = waiting[-1]
        value: Value
        if isinstance(event, kinds.ScalarEvent):
            value = _scalar(event)
            if isinstance(place, dict) and not keys:
                _note_key(event, value, place, keys)
                continue
        else:
            value = {} if isinstance(event, kinds.MappingStartEvent) else []
            if isinstance(place, dict) and not keys:
                raise Wrong(f"{_line(event)}a key that is no word")
            if len(waiting) > _DEPTH_MAX:
                raise Wrong(f"{_line(event)}more than {_DEPTH_MAX} levels")
            waiting.append((value, []))
        if isinstance(place, dict):
            place[keys.pop()] = value
        else:
            place.append(value)
    if not root:
        raise Wrong("empty")
    return root[0]


def _note_key(event: Event, value: Value, place: dict[str, Value], keys: list[str]) -> None:
    key = as_text(value)
    if key is None:
        raise Wrong(f"{_line(event)}a key that is no word")
    if key in place:
        raise Wrong(f"{_line(event)}{key!r} is there twice")
    keys.append(key)


def _scalar(event: ScalarEvent) -> Value:
    if not event.implicit[0]:
        return str(event.value)
    return _resolved(str(event.value))


def _resolved(plain: str) -> Value:
    """The value of a word without quotes."""
    if plain in _WORDS:
        return _WORDS[plain]
    if plain[0] not in "+-.0123456789":
        return plain
    digits = plain.replace("_", "")
    if found := _INTEGER.fullmatch(digits):
        sign, hexadecimal, binary, octal, decimal = found.groups()
        bases = ((hexadecimal, 16), (binary, 2), (octal, 8), (decimal, 10))
        number = next(int(part, base) for part, base in bases if part)
        return -number if sign == "-" else number
    if _FLOAT.fullmatch(digits):
        return float(digits)
    return plain


def _line(event: Event) -> str:
    return f"line {event.start_mark.line + 1}: " if event.start_mark else ""
