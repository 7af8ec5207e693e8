"""Attacks on device descriptions: by files a user could write or put in place, and by what such files may be."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cdi import a_file, write
from tests.support.node import Node, node
from tests.support.scratch import scratch
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]

OWNER = 61101
#: Of a launch, however much the file is; what it costs is bounded by its size.
SECONDS = 30


@pytest.fixture(scope="module")
def described(busybox_image: str) -> Iterator[tuple[Node, Path]]:
    """A node, and the directory whose ``cdi`` describes its devices."""
    with (
        scratch("described") as place,
        node(place / "node", more=f'[cdi]\ndirectories = ["{place}/way/cdi"]\n') as started,
    ):
        place.chmod(0o755)
        started.hpcctr("pull", "--name", "local/small:1", busybox_image)
        yield started, place


@pytest.fixture
def way(described: tuple[Node, Path]) -> Iterator[Path]:
    """The directory above ``cdi``, which has one file that is right."""
    directory = described[1] / "way"
    write(directory / "cdi", "good.json", _file("good"))
    for path in (directory, directory / "cdi"):
        path.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def run(described: tuple[Node, Path], way: Path, alice: User) -> Callable[..., str]:
    """Launch as alice with a device; what is said, or what the program printed."""

    def launch(name: str, *command: str, check: int = 0) -> str:
        flags = ("--device", f"vendor.com/device={name}")
        done = described[0].run(
            "local/small:1", *command, user=alice, flags=flags, cwd="/tmp", check=check, timeout=SECONDS
        )
        return (done.stderr if check else done.stdout).decode()

    return launch


def _file(name: str, **edits: Any) -> dict[str, Any]:
    return a_file(devices=[{"name": name, "containerEdits": {"env": ["DESCRIBED=by-a-file"]} | edits}])


def _users(way: Path) -> None:
    os.chown(write(way / "cdi", "bad.json", _file("bad")), OWNER, OWNER)


def _others_may_write(way: Path) -> None:
    write(way / "cdi", "bad.json", _file("bad")).chmod(0o646)


def _link_of_a_user(way: Path) -> None:
    write(way, "elsewhere.json", _file("bad"))
    (way / "cdi/bad.json").symlink_to("../elsewhere.json")
    os.lchown(way / "cdi/bad.json", OWNER, OWNER)


def _link_of_roots_to_a_users_file(way: Path) -> None:
    os.chown(write(way, "elsewhere.json", _file("bad")), OWNER, OWNER)
    (way / "cdi/bad.json").symlink_to("../elsewhere.json")


def _link_of_roots_through_a_users_directory(way: Path) -> None:
    write(way / "home", "mine.json", _file("bad"))
    os.chown(way / "home", OWNER, OWNER)
    (way / "cdi/bad.json").symlink_to("../home/mine.json")


def _link_of_roots_to_a_place_where_all_may_write(way: Path) -> None:
    write(way / "tmp", "roots.json", _file("bad"))
    (way / "tmp").chmod(0o1777)
    (way / "cdi/bad.json").symlink_to("../tmp/roots.json")


def _fifo(way: Path) -> None:
    os.mkfifo(way / "cdi/bad.json", 0o644)


def _endless_device(way: Path) -> None:
    (way / "cdi/bad.json").symlink_to("/dev/zero")


def _huge(way: Path) -> None:
    path = write(way / "cdi", "bad.yaml", json.dumps(_file("bad")))
    with path.open("r+b") as file:
        file.truncate(1 << 40)


def _bomb(way: Path) -> None:
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    write(way / "cdi", "bad.yaml", "\n".join(lines) + "\ncdiVersion: 0.5.0\n")


def _deep(way: Path) -> None:
    write(way / "cdi", "bad.yaml", "[" * 1_000_000)


def _object_of_python(way: Path) -> None:
    text = f"!!python/object/apply:os.system ['touch {way}/owned']\n"
    write(way / "cdi", "bad.yaml", text)


@pytest.mark.parametrize(
    "put",
    [
        _users,
        _others_may_write,
        _link_of_a_user,
        _link_of_roots_to_a_users_file,
        _link_of_roots_through_a_users_directory,
        _link_of_roots_to_a_place_where_all_may_write,
        _fifo,
        _endless_device,
        _huge,
        _bomb,
        _deep,
        _object_of_python,
    ],
)
def test_a_file_that_is_not_to_be_believed_takes_nothing_else_with_it(
    way: Path, run: Callable[..., str], put: Callable[[Path], None]
) -> None:
    put(way)
    said = run("bad", "true", check=125)
    assert "error[feature]: device vendor.com/device=bad: no CDI file of this node describes it" in said
    assert f"{way}/cdi/bad." in said and "is not used" in said
    assert run("good", "sh", "-c", "echo $DESCRIBED") == "by-a-file\n"
    assert not (way / "owned").exists()


@pytest.mark.parametrize("whose", ["directory", "all may write", "all may add", "above", "link"])
def test_a_directory_a_user_could_fill_describes_nothing(way: Path, run: Callable[..., str], whose: str) -> None:
    directory = way / "cdi"
    if whose == "directory":
        os.chown(directory, OWNER, OWNER)
    elif whose == "all may write":
        directory.chmod(0o777)
    elif whose == "all may add":
        directory.chmod(0o1777)
    elif whose == "above":
        os.chown(way, OWNER, OWNER)
    else:
        directory.rename(way / "real")
        directory.symlink_to("real")
        os.lchown(directory, OWNER, OWNER)
    said = run("good", "true", check=125)
    assert "error[feature]: device vendor.com/device=good: no CDI file of this node describes it" in said
    assert "only root can write" in said or "symbolic link of uid" in said


def test_a_user_is_not_shown_what_only_a_directory_of_roots_hides(way: Path, run: Callable[..., str]) -> None:
    (way / "closed").mkdir(mode=0o700)
    (way / "closed/secret").write_text("hidden\n")
    (way / "pipes").mkdir()
    (way / "pipes").chmod(0o1777)
    mount = {"hostPath": f"{way}/pipes/daemon", "containerPath": "/seen"}
    write(way / "cdi", "daemon.json", _file("daemon", mounts=[mount]))
    write(way / "cdi", "service.json", _file("service", mounts=[mount | {"options": ["noexec"]}]))
    os.symlink("../closed/secret", way / "pipes/daemon")
    os.lchown(way / "pipes/daemon", OWNER, OWNER)
    assert "error[feature-unusable]: " in (said := run("daemon", "cat", "/seen", check=125))
    assert f"{way}/pipes/daemon" in said
    assert run("service", "sh", "-c", "cat /seen; echo $DESCRIBED") == "by-a-file\n"


def test_a_program_of_a_file_is_not_run_for_anybody(way: Path, run: Callable[..., str]) -> None:
    program = way / "hook"
    program.write_text(f"#!/bin/sh\ntouch {way}/ran\n")
    program.chmod(0o755)
    hooks = [{"hookName": stage, "path": str(program)} for stage in ("createRuntime", "poststop")]
    for number, hook in enumerate(hooks):
        write(way / "cdi", f"{number}.json", _file(f"hook{number}", hooks=[hook]))
        said = run(f"hook{number}", "true", check=125)
        assert f"wants a program run as root: {program}" in said and "[cdi] of site.toml" in said
    assert not (way / "ran").exists()
