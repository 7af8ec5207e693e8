"""Attacks on sharing: what a user may run of another's is what that user shares, and nothing tells of the rest."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import hpcctr
from tests.support.node import Node, node
from tests.support.oci import busybox, file, tar, write_oci_archive
from tests.support.scratch import scratch
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]

OWNER = 61905
#: Speaks to the engine as no command of hpcctr's does, and prints the answers.
CLIENT = """
import os, socket, sys
sys.path.insert(0, sys.argv[1])
from hpcctr.wire import ENGINE_SOCKET, Frame
def ask(verb, *fields):
    engine = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    engine.connect(ENGINE_SOCKET)
    engine.sendall(Frame(verb, [(key, word.encode()) for key, word in fields]).pack())
    packet, descriptors, _, _ = socket.recv_fds(engine, 65536, 1)
    if not descriptors:
        return packet.decode()
    with socket.socket(fileno=descriptors[0]) as peer:
        return peer.makefile().read()
"""


@pytest.fixture(scope="module")
def attacked(alice: User, bob: User) -> Iterator[Node]:
    """A node where alice has an image that is nobody else's, and one that bob may run since its second meaning."""
    with scratch("sharing") as place, node(place, more="[limits]\nshares-per-uid = 3\n") as started:
        os.chown(started.site.store, OWNER, OWNER)
        for name, edition in (("secret", "secret"), ("app", "first"), ("app", "second")):
            archive = write_oci_archive(place / "x.tar", busybox(layers=[tar(file("etc/edition", edition.encode()))]))
            started.hpcctr("pull", "--name", f"localhost/{name}:1", f"oci-archive:{archive}", user=alice)
        record = next((started.site.store / f"users/{alice.uid}/names/localhost/app").iterdir())
        # The two meanings are days apart.
        newest, _, oldest = record.read_text().rpartition('"since"')
        record.write_text(f'{newest}"since"{oldest.replace("202", "201", 1)}')
        started.hpcctr("share", "localhost/app:1", "--user", bob.name, user=alice)
        yield started


def _say(on: Node, user: User, code: str) -> str:
    """What a client prints."""
    argv = ["/usr/bin/python3", "-c", CLIENT + code, str(Path(hpcctr.__file__).parents[1])]
    return on.host.run(argv, user=user).stdout.decode(errors="replace")


def _files(on: Node) -> dict[str, bytes]:
    """Everything in the store that is about shares and names."""
    return {str(path): path.read_bytes() for path in on.site.store.rglob("*.json")}


def _digests(on: Node, alice: User) -> set[str]:
    directory = on.site.store / f"users/{alice.uid}/images"
    return {path.name.replace("-", ":", 1) for path in directory.iterdir()}


def test_neither_a_digest_nor_a_moment_leads_to_what_was_before_the_share(
    attacked: Node, alice: User, bob: User
) -> None:
    """The first meaning of the shared name, and the image that is not shared, whatever is asked for."""
    shared = f"@{alice.name}/localhost/app:1"
    assert attacked.run(shared, "cat", "/etc/edition", user=bob).stdout == b"second"
    for moment in ("0", "2016-01-01T00:00:00Z", "2030-01-01T00:00:00Z", "now"):
        done = attacked.run(shared, "cat", "/etc/edition", user=bob, env={"HPCCTR_AS_OF": moment})
        assert done.stdout == b"second", moment
    found = set()
    for digest in _digests(attacked, alice):
        for image in (f"@{alice.name}/{digest}", f"{shared}@{digest}", f"@{alice.uid}/{digest[:20]}", digest):
            done = attacked.run(image, "cat", "/etc/edition", user=bob, flags=["--pull", "never"], check=False)
            found.add(done.stdout)
    assert found == {b"", b"second"}


@pytest.mark.parametrize(
    "fields",
    [
        '("task", "share"), ("image", "localhost/app:1"), ("grantees", "uid-0")',
        '("task", "share"), ("image", "@ALICE/localhost/secret:1"), ("grantees", "uid-BOB")',
        '("task", "unshare"), ("image", "@ALICE/localhost/app:1"), ("grantees", "uid-BOB")',
        '("task", "shares"), ("image", "@ALICE/localhost/app:1")',
        '("task", "remove"), ("image", "@ALICE/localhost/app:1")',
        '("task", "share"), ("image", "../../ALICE/names/localhost/secret:1"), ("grantees", "uid-BOB")',
        '("task", "share"), ("image", "oci-archive:/etc/shadow"), ("grantees", "uid-BOB")',
        '("task", "share"), ("image", "localhost/x:1"), ("grantees", "uid-BOB"), ("uid", "ALICE")',
        '("task", "inspect"), ("image", "@ALICE/localhost/secret:1"), ("grantees", "uid-ALICE")',
        '("task", "inspect"), ("image", "@ALICE/../names/localhost/secret:1")',
    ],
)
def test_an_errand_changes_and_shows_nothing_of_another_users(
    attacked: Node, alice: User, bob: User, fields: str
) -> None:
    before = _files(attacked)
    words = fields.replace("ALICE", str(alice.uid)).replace("BOB", str(bob.uid))
    printed = _say(attacked, bob, f'print(ask("store", {words}))')
    assert '"type":"failed"' in printed or printed.startswith("hpcctr/1 error"), printed
    assert not [digest for digest in _digests(attacked, alice) if digest in printed]
    assert _files(attacked) == before


@pytest.mark.parametrize(
    "grantees",
    [
        "uid",
        "uid--1",
        "uid-1/../../x",
        "../uid-1",
        "gid-4294967296",
        "uid-1 uid-2",
        "uid-1\\t",
        ",".join(["uid-1"] * 65),
        "root",
    ],
)
def test_whom_to_share_with_is_numbers_or_refused(attacked: Node, alice: User, grantees: str) -> None:
    before = _files(attacked)
    fields = f'("task", "share"), ("image", "localhost/secret:1"), ("grantees", "{grantees}")'
    printed = _say(attacked, alice, f'print(ask("store", {fields}))')
    assert '"type":"failed"' in printed or printed.startswith("hpcctr/1 error"), printed
    assert _files(attacked) == before


def test_a_user_fills_nobodys_list_without_end(attacked: Node, alice: User) -> None:
    words = ["share", "localhost/app:1", *(f"--user={number}" for number in range(5000, 5010))]
    done = attacked.hpcctr(*words, user=alice, check=125)
    assert b"error[store]" in done.stderr and b"shares-per-uid" in done.stderr


@pytest.mark.parametrize("moment", ["-1", "1e3", "99999999999999999999", "x", " 1"])
def test_a_moment_that_is_no_number_is_refused_before_anything_is_looked_at(
    attacked: Node, bob: User, moment: str
) -> None:
    printed = _say(attacked, bob, f'print(ask("run", ("image", "x:1"), ("as-of", "{moment}")))')
    assert printed.startswith("hpcctr/1 error\0slug=protocol\0message=as-of")


def test_the_request_does_not_say_who_asks(attacked: Node, alice: User, bob: User) -> None:
    for key in ("uid", "gid", "group", "owner", "grantees"):
        fields = f'("image", "@{alice.name}/localhost/secret:1"), ("{key}", "{alice.uid}")'
        assert _say(attacked, bob, f'print(ask("run", {fields}))').startswith("hpcctr/1 error\0slug=protocol")


def test_shares_and_their_index_are_closed_to_everybody_but_the_owner(attacked: Node, alice: User, bob: User) -> None:
    store = attacked.site.store
    for path in (store / "shared", store / f"users/{alice.uid}/shares"):
        assert path.is_dir()
        for user in (alice, bob):
            for argv in (["ls", str(path)], ["touch", f"{path}/x"], ["ls", f"{path}/uid-{bob.uid}"]):
                assert attacked.host.run(argv, user=user, check=False).returncode != 0, argv


def test_a_name_in_the_environment_of_ones_program_opens_nothing(attacked: Node, alice: User, bob: User) -> None:
    """exec asks policy about the name that the program has in its environment, which is the user's to write."""
    shared = f"@{alice.name}/localhost/app:1"
    claim = f"HPCCTR_IMAGE=@{alice.name}/localhost/secret:1"
    with attacked.popen(
        "run", "-e", claim, shared, "--", "sh", "-c", "echo $$; exec cat", user=bob, stdin=-1, stdout=subprocess.PIPE
    ) as running:
        assert running.stdout is not None
        pid = running.stdout.readline().decode().strip()
        done = attacked.hpcctr("exec", pid, "--", "cat", "/etc/edition", user=bob, check=False)
        assert b"secret" not in done.stdout
        running.communicate(timeout=30)
