"""The text of a policy file."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcctr.errors import PolicyUnusable
from hpcctr.policy.rules import Rule
from hpcctr.policy.written import BYTES_MAX, RULES_MAX, parse

HEAD = '[[rule]]\nname = "r"\naction = "allow"\n'
PATH = "/etc/hpcctr/policy.d/10-x.toml"


def test_a_rule_is_read_with_all_its_words() -> None:
    text = HEAD + (
        'users = ["@staff", "alice", "4711", "EXAMPLE\\\\bob"]\nimages = ["docker.io/library/*", "*:nightly"]\n'
        'registries = ["docker.io", "registry.example.org:5000", "localhost"]\ntargets = ["/", "/scratch/é x"]\n'
        'features = []\ndevices = ["vendor.com/gpu=*"]\n'
    )
    assert parse(text.encode(), PATH) == (
        Rule(
            name="r",
            action="allow",
            users=("@staff", "alice", "4711", "EXAMPLE\\bob"),
            images=("docker.io/library/*", "*:nightly"),
            registries=("docker.io", "registry.example.org:5000", "localhost"),
            targets=("/", "/scratch/é x"),
            features=(),
            devices=("vendor.com/gpu=*",),
            file="10-x.toml",
        ),
    )


@pytest.mark.parametrize(
    "pattern",
    [
        "*", "*:nightly", "docker.io/library/python:3.12", "docker.io/library/*", "private/*", "quay.io/a/b@sha256:*",
        "private/localhost/app:1", "sha256:" + "a" * 64, "sha256:*", "registry.example.org:5000/*", "localhost/app:*",
        "docker.io/library/x@sha256:" + "a" * 64, "*/root-*", "[[]::1]:5000/*",
    ],
)  # fmt: skip
def test_a_glob_that_can_match_a_name_is_taken(pattern: str) -> None:
    parse(f"{HEAD}images = ['{pattern}']".encode(), PATH)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("images = ['python:3.12']", "docker.io/library/python:3.12"),
        ("images = ['library/python:*']", "begins with no registry"),
        ("images = ['docker.io/python:3.12']", "docker.io/library/python:3.12"),
        ("images = ['docker.io/library/python']", "docker.io/library/python:latest"),
        ("images = ['docker://docker.io/library/python:1']", "docker.io/library/python:1"),
        ("images = ['index.docker.io/*']", "docker.io is"),
        ("images = ['Quay.io/*']", "quay.io is"),
        ("images = ['@alice/app:1']", "is no name"),
        ("images = ['sha256:abc']", "is no name"),
        ("images = ['private/app:1']", "private/docker.io/library/app:1"),
        ("images = ['oci-archive:/x.tar']", "is no name"),
        ("images = []", "images is empty"),
        ("users = []", "users is empty"),
        ("users = ['']", "is empty"),
        ("users = [' alice']", "begins or ends with a blank"),
        ("users = ['proj*']", "is no user"),
        ("users = ['@*']", "is no user"),
        ("users = ['@']", "names no group"),
        ("users = ['alice,bob']", "is no name of a user"),
        ("users = 'alice'", "array"),
        ("users = [4711]", "str"),
        ('users = ["a\\u0000"]', "control character"),
        ('users = ["a\\u202e"]', "cannot be printed"),
        ("registries = []", "registries is empty"),
        ("registries = ['docker']", "docker is not HOST[:PORT]"),
        ("registries = ['Docker.io']", "docker.io is"),
        ("registries = ['index.docker.io']", "docker.io is"),
        ("registries = ['docker.io/library']", "is not HOST[:PORT]"),
        ("registries = ['*.example.org']", "is not HOST[:PORT]"),
        ("registries = ['private']", "is not HOST[:PORT]"),
        ("registries = ['https://docker.io']", "is not HOST[:PORT]"),
        ("targets = ['scratch']", "is not an absolute path"),
        ("targets = ['/a/../b']", "is not a plain path"),
        ("targets = ['/a/']", "is not a plain path"),
        ("targets = ['//a']", "is not a plain path"),
        ("targets = ['/a/./b']", "is not a plain path"),
        ('targets = ["/a\\nb"]', "control character"),
        ("features = ['']", "is empty"),
        ("file = 'other.toml'", "unknown field"),
        ("colour = 1", "unknown field"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_file_rule_reason_and_remedy(words: str, problem: str) -> None:
    with pytest.raises(PolicyUnusable) as raised:
        parse(f"{HEAD}{words}\n".encode(), PATH)
    assert raised.value.message.startswith(f"{PATH}, rule 'r': ") and problem in raised.value.message
    assert raised.value.hint


@pytest.mark.parametrize("key", ["targets", "features", "devices"])
def test_a_deny_rule_about_nothing_is_refused(key: str) -> None:
    with pytest.raises(PolicyUnusable, match=f"{key} is empty"):
        parse(f'[[rule]]\nname = "r"\naction = "deny"\n{key} = []\n'.encode(), PATH)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"[", "not TOML"),
        (b"\xff", "not text in UTF-8"),
        (b"rule = " + b"9" * 5000, "not TOML"),
        (b"rule = " + b"[" * 5000, "not TOML"),
        (b"rule = 3", "not a list of tables"),
        (b"rule = [3]", "rule 1"),
        (b"[[rule]]\n", "rule 1: Object missing required field `name`"),
        (b"[[rule]]\nname = ''\naction = 'allow'", "rule 1: name: '' is empty"),
        (b"[[rule]]\nname = 'r'\naction = 'ask'", "rule 'r': Invalid enum value 'ask'"),
        (b"[[rule]]\nname = 'r'", "missing required field `action`"),
        (b'[[rule]]\nname = "a\\u001b[2J"\naction = "allow"', "control character"),
        (b"[[rule]]\nname = '" + b"n" * 129 + b"'\naction = 'allow'", "longer than 128"),
        (HEAD.encode() * 2, "another rule of this file has its name"),
        (b"store = '/x'", "has a key 'store' beside its rules"),
        (b"#" * (BYTES_MAX + 1), "larger than"),
        (b"rule = [" + b"{name='a',action='deny'}," * (RULES_MAX + 1) + b"]", "1001 rules"),
        (HEAD.encode() + b"users = [" + b"'a'," * 1001 + b"]", "1001 entries"),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason(raw: bytes, problem: str) -> None:
    with pytest.raises(PolicyUnusable) as raised:
        parse(raw, PATH)
    assert raised.value.message.startswith(PATH) and problem in raised.value.message
    assert len(raised.value.message) < 1000 and raised.value.message.isprintable()


TEXTS = st.text(st.characters(min_codepoint=33, max_codepoint=0x24F, exclude_characters="*:/,@"), min_size=1).filter(
    str.isprintable
)
PATHS = st.just("/") | st.lists(TEXTS.filter(lambda part: part.strip(".")), min_size=1, max_size=3).map(
    lambda parts: "/" + "/".join(parts)
)
WRITTEN = st.builds(
    Rule,
    name=TEXTS.filter(lambda name: len(name) <= 128),
    action=st.just("allow"),
    users=st.lists(TEXTS, min_size=1, max_size=3).map(tuple),
    images=st.lists(st.sampled_from(["*", "quay.io/*", "docker.io/library/debian:12"]), min_size=1).map(tuple),
    registries=st.none() | st.just(("quay.io", "localhost:5000")),
    targets=st.none() | st.lists(PATHS, max_size=3).map(tuple),
    features=st.none() | st.lists(TEXTS, max_size=3).map(tuple),
    devices=st.none() | st.lists(TEXTS, max_size=3).map(tuple),
    file=st.just("10-x.toml"),
)


@given(rules=st.lists(WRITTEN, max_size=4, unique_by=lambda rule: rule.name))
def test_what_is_written_is_what_is_read(rules: list[Rule]) -> None:
    text = ""
    for rule in rules:
        text += "[[rule]]\n"
        for key in ("name", "action", "users", "images", "registries", "targets", "features", "devices"):
            value = getattr(rule, key)
            # Strings and lists of strings are written alike in JSON and TOML.
            text += "" if value is None else f"{key} = {json.dumps(value)}\n"
    assert parse(text.encode(), PATH) == tuple(rules)
