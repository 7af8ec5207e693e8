"""The site's rules, as launches meet them, and hpcctr engine check, which says the same beforehand."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcctr.cli.engine_check import WhatIf, read, would_decide
from tests.support.node import Node, node
from tests.support.oci import busybox, file, tar, write_layout
from tests.support.scratch import scratch
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]

APP, OTHER = "registry.example.org/project-a/app:1", "quay.io/org/app:1"


@pytest.fixture(scope="module")
def ruled(busybox_image: str) -> Iterator[Node]:
    """A node with two images of two registries, and a directory for everyone."""
    with scratch("policy") as place, node(place, carry=["/var/tmp"]) as started:
        other = write_layout(place / "other", busybox(layers=[tar(file("etc/other", b"x"))]))
        started.hpcctr("pull", "--name", APP, busybox_image)
        started.hpcctr("pull", "--name", OTHER, f"oci:{other}")
        started.site.policy_directory.mkdir(mode=0o755)
        for name in ("scratch", "scratch2"):
            (place / name).mkdir(mode=0o777)
        yield started


@pytest.fixture(autouse=True)
def no_rules(ruled: Node) -> None:
    for path in ruled.site.policy_directory.iterdir():
        path.unlink()


def _rules(on: Node, text: str, *, name: str = "20-project.toml") -> None:
    (on.site.policy_directory / name).write_text(text)


def _refusal(on: Node, user: User, image: str, *flags: str, status: int = 126) -> str:
    return on.run(image, "true", user=user, flags=flags, check=status, cwd="/tmp").stderr.decode()


def _check(on: Node, *words: str, status: int = 0) -> str:
    """What engine check prints for the node."""
    return on.hpcctr("engine", "check", *words, check=status).stdout.decode()


# The example of docs/site.md.
EXAMPLE = """
[[rule]]
name = "no-nightlies"
action = "deny"
images = ["*:nightly"]

[[rule]]
name = "project-a"
action = "allow"
users = ["@hpcctr-project"]
registries = ["registry.example.org"]
targets = ["/home", "/tmp", "/var/lib/hpcctr-test"]
"""


def test_an_ordinary_launch_is_allowed_by_the_rule_of_its_project(ruled: Node, alice: User) -> None:
    _rules(ruled, EXAMPLE)
    assert ruled.run(APP, "echo", "in", user=alice, cwd=alice.home).stdout == b"in\n"
    explained = ruled.hpcctr("run", "--explain", APP, "true", user=alice, cwd=alice.home).stdout.decode()
    assert re.search(r'^allowed by +20-project.toml, rule "project-a"$', explained, re.MULTILINE)


def test_what_the_site_carries_in_needs_no_rule(ruled: Node, alice: User) -> None:
    _rules(ruled, EXAMPLE)
    script = "grep -q ' /var/tmp ' /proc/self/mounts && echo carried"
    assert ruled.run(APP, "sh", "-c", script, user=alice, cwd="/tmp").stdout == b"carried\n"


def test_a_refusal_names_the_rule_and_what_it_is_about(ruled: Node, alice: User) -> None:
    place = ruled.host.root
    _rules(ruled, EXAMPLE)
    assert f"{OTHER}: no rule allows it: none that is about you is about this image" in _refusal(ruled, alice, OTHER)
    text = _refusal(ruled, alice, APP, "-v", f"{place}/scratch:/data")
    assert 'no rule allows it with mount target /data, which 20-project.toml, rule "project-a" does not cover' in text
    _rules(
        ruled,
        f'[[rule]]\nname = "no-scratch"\naction = "deny"\ntargets = ["{place}/scratch"]\n'
        '[[rule]]\nname = "rest"\naction = "allow"\n',
    )
    text = _refusal(ruled, alice, APP, "-v", f"{place}/scratch")
    assert f'{APP}, with mount target {place}/scratch: denied by 20-project.toml, rule "no-scratch"' in text
    ruled.run(APP, "true", user=alice, flags=["-v", f"{place}/scratch2"])
    assert "hpcctr: error[policy-denied]" in _refusal(ruled, alice, APP, "--explain", "-v", f"{place}/scratch")


def test_every_decision_is_a_line_with_its_rule(ruled: Node, alice: User) -> None:
    _rules(ruled, EXAMPLE)
    ruled.run(APP, "true", user=alice, cwd="/tmp")
    _refusal(ruled, alice, APP, "-v", "/usr:/data")
    _rules(ruled, '[[rule]]\nname = "closed"\naction = "deny"\n')
    _refusal(ruled, alice, APP)
    lines = [line for line in ruled.engine.log().splitlines() if f"uid={alice.uid} " in line][-3:]
    assert " granted " in lines[0] and """rule='20-project.toml, rule "project-a"'""" in lines[0]
    assert " refused " in lines[1] and 'mount target /data, which 20-project.toml, rule "project-a"' in lines[1]
    assert " refused " in lines[2] and 'denied by 20-project.toml, rule "closed"' in lines[2]


def test_an_edit_counts_from_the_next_launch_on_and_a_broken_one_denies_everything(ruled: Node, alice: User) -> None:
    _rules(ruled, '[[rule]]\nname = "open"\naction = "allow"\n')
    ruled.run(APP, "true", user=alice)
    _rules(ruled, '[[rule]]\nname = "shut"\naction = "deny" \n')
    assert 'rule "shut"' in _refusal(ruled, alice, APP)
    _rules(ruled, '[[rule]]\nname = "open"\naction = "allow"\n')
    ruled.run(APP, "true", user=alice)
    _rules(ruled, "[[rule]]\nname = 'new'\naction = 'allow'\nusers = ['']\n", name="90-new.toml")
    text = _refusal(ruled, alice, APP)
    assert "90-new.toml, rule 'new': users: '' is empty" in text and "hint: " in text


LAUNCHES = [
    (APP, ()),
    (OTHER, ()),
    (APP, ("/home/x",)),
    (APP, ("/home/x", "/data")),
    (OTHER, ("/scratch2",)),
    (OTHER, ("/scratch/a",)),
]
POLICIES = [
    "",
    EXAMPLE,
    '[[rule]]\nname = "a"\naction = "deny"\ntargets = ["/scratch", "/data"]\n[[rule]]\nname = "b"\naction = "allow"\n',
    '[[rule]]\nname = "a"\naction = "allow"\nregistries = ["quay.io"]\nusers = ["hpcctr-a"]\n',
    '[[rule]]\nname = "a"\naction = "deny"\nusers = ["@hpcctr-render"]\nregistries = ["quay.io"]\n'
    '[[rule]]\nname = "b"\naction = "allow"\ntargets = ["/tmp", "/scratch2"]\n',
]


@pytest.mark.parametrize("text", POLICIES)
def test_engine_check_says_what_the_engine_does(ruled: Node, alice: User, text: str) -> None:
    _rules(ruled, text)
    for image, targets in LAUNCHES:
        asked = WhatIf(user=alice.name, image=image, targets=(*targets, "/tmp"))
        told = would_decide(read(str(ruled.site.file)), asked)
        flags = [word for target in targets for word in ("-v", f"{ruled.host.root}/scratch:{target}")]
        done = ruled.run(image, "true", user=alice, flags=["--no-home", *flags], cwd="/tmp", check=False)
        assert (done.returncode == 0) == told.is_allowed, (image, targets, told, done.stderr)
        if done.returncode != 0:
            assert done.stderr.decode().startswith(f"hpcctr: error[policy-denied]: {told.text}\n")


def test_engine_check_takes_a_site_a_policy_file_or_a_policy_directory(ruled: Node, tmp_path: Path) -> None:
    _rules(ruled, EXAMPLE)
    site, directory = str(ruled.site.file), str(ruled.site.policy_directory)
    for what in (site, directory, f"{directory}/20-project.toml"):
        rows = json.loads(_check(ruled, what, "--format", "json"))
        assert [row["rule"] for row in rows] == ["no-nightlies", "project-a"]
        assert rows[1]["targets"] == ["/home", "/tmp", "/var/lib/hpcctr-test"] and rows[1]["devices"] is None
    table = _check(ruled, directory).splitlines()
    assert table[0].split()[:3] == ["ACTION", "RULE", "FILE"] and table[1].split()[:2] == ["deny", "no-nightlies"]
    (tmp_path / "x.toml").write_text("[[rule]\n")
    assert "x.toml: not TOML" in ruled.hpcctr("engine", "check", str(tmp_path / "x.toml"), check=126).stderr.decode()


def test_engine_check_tells_of_a_rule_that_never_decides(ruled: Node) -> None:
    _rules(ruled, '[[rule]]\nname = "all"\naction = "allow"\n' + EXAMPLE)
    said = ruled.hpcctr("engine", "check", str(ruled.site.file)).stderr.decode()
    assert (
        'warning: 20-project.toml, rule "no-nightlies" never decides: 20-project.toml, rule "all" does before it'
        in said
    )


def test_engine_check_decides_about_features_devices_groups_and_private_images(ruled: Node, alice: User) -> None:
    _rules(
        ruled,
        '[[rule]]\nname = "own"\naction = "deny"\nimages = ["private/*"]\n'
        '[[rule]]\nname = "gpu"\naction = "allow"\nusers = ["@61987"]\n'
        'features = ["mpi*"]\ndevices = ["v.com/gpu=*"]\n',
    )
    site = str(ruled.site.file)
    who = (site, "--as", alice.name, "--image", APP)
    assert "none is about you" in _check(ruled, *who, status=126)
    group = (*who, "--group", "61987", "--feature", "mpich", "--device", "v.com/gpu=0")
    assert _check(ruled, *group) == f'{APP}: allowed by 20-project.toml, rule "gpu"\n'
    assert "with feature gdr" in _check(ruled, *group, "--feature", "gdr", status=126)
    own = _check(ruled, *group, "--private", status=126)
    assert own == f'private/{APP}: denied by 20-project.toml, rule "own"\n'
    told = _check(ruled, site, "--as", "4711", "--group", "61987", "--image", APP, "--format", "json")
    text = f'{APP}: allowed by 20-project.toml, rule "gpu"'
    assert json.loads(told) == {"decision": "allow", "rule": "gpu", "file": "20-project.toml", "text": text}


def test_somebody_who_is_not_root_can_try_out_what_is_to_become_policy(ruled: Node, alice: User, place: Path) -> None:
    draft = place / "draft.toml"
    draft.write_text(EXAMPLE)
    os.chown(draft, alice.uid, alice.gid)
    words = ("engine", "check", str(draft), "--as", alice.name, "--image", APP)
    assert ruled.hpcctr(*words, user=alice).stdout.decode() == f'{APP}: allowed by draft.toml, rule "project-a"\n'
    assert "only root can write" in ruled.hpcctr(*words, check=126).stderr.decode()
