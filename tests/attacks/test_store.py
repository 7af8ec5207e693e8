"""Attacks on the store: names that are paths, another's images by path and digest, stores that somebody else could have
written, and filesystems that lie about who did."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import hpcctr
from hpcctr.wire import ENGINE_SOCKET
from tests.support import engine
from tests.support.node import Node, node
from tests.support.oci import busybox, file, tar, write_layout, write_oci_archive
from tests.support.polling import wait_until
from tests.support.scratch import scratch
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]

OWNER = 61930
SITE, SECRET = "localhost/site:1", "localhost/secret:1"


@pytest.fixture(scope="module")
def attacked(alice: User) -> Iterator[Node]:
    """A node whose store belongs to a service account, with an image of the site's and one of alice's own."""
    with scratch("stores") as place, node(place, linger_seconds=0) as started:
        os.chown(started.site.store, OWNER, OWNER)
        _bring(started, "site")
        archive = write_oci_archive(place / "x.tar", busybox(layers=[tar(file("etc/edition", b"secret"))]))
        started.hpcctr("pull", "--name", SECRET, f"oci-archive:{archive}", user=alice)
        yield started


def _bring(on: Node, edition: str) -> None:
    image = busybox(layers=[tar(file("etc/edition", edition.encode()))])
    layout = write_layout(on.host.root / f"layout-{edition}", image)
    on.hpcctr("pull", "--name", f"localhost/{edition}:1", f"oci:{layout}")


def _private(on: Node, alice: User) -> Path:
    (directory,) = (on.site.store / f"users/{alice.uid}/images").iterdir()
    return directory


def _everything(on: Node, *, but: str = "") -> dict[str, bytes]:
    """Names and images of the store, outside of what begins like ``but``; not the marks of nodes, which come and go."""
    top = on.site.store
    paths = [path for part in ("names", "images", "users", "shared") for path in (top / part).rglob("*")]
    return {
        str(path.relative_to(top)): path.read_bytes() if path.name.endswith(".json") else b""
        for path in paths
        if "uses" not in path.parts and (not but or not str(path.relative_to(top)).startswith(but))
    }


# names


def test_a_private_image_is_reached_by_no_path_digest_or_beginning_of_one(
    attacked: Node, alice: User, bob: User
) -> None:
    directory = _private(attacked, alice)
    digest = directory.name.replace("-", ":", 1)
    store = attacked.site.store
    words = [
        digest,
        digest[:19],
        f"localhost/secret@{digest}",
        f"localhost/secret:1@{digest}",
        f"localhost/site:1@{digest}",
        str(directory),
        str(directory / "root.squashfs"),
        f"oci:{directory}",
        f"oci-archive:{directory}/root.squashfs",
        f"docker-archive:{directory}/root.squashfs",
        f"users/{alice.uid}/localhost/secret:1",
        f"../users/{alice.uid}/names/localhost/secret:1",
        f"private/{SECRET}",
        f"@{alice.name}/secret:1",
        f"@{alice.uid}/{digest}",
        f"oci:{store}/users/{alice.uid}",
        f"localhost/../users/{alice.uid}/images:1",
    ]
    for word in words:
        done = attacked.run(word, "cat", "/etc/edition", user=bob, flags=["--pull", "never"], check=False)
        assert done.returncode == 125 and done.stdout == b"", (word, done)
        # And nothing tells whether there is one.
        none = word.replace(digest[7:19], "0" * 12)
        other = attacked.run(none, "cat", "/etc/edition", user=bob, flags=["--pull", "never"], check=False)
        assert other.stderr == done.stderr.replace(word.encode(), none.encode()).replace(
            digest[7:19].encode(), b"0" * 12
        ), (word, done, other)
    for path in (directory, directory / "root.squashfs", store / "users" / str(alice.uid)):
        done = attacked.run(SITE, "ls", "/x", user=bob, flags=["-v", f"{path}:/x"], check=False)
        assert done.returncode and b"ermission denied" in done.stderr, done
    assert attacked.run(SECRET, "cat", "/etc/edition", user=alice).stdout == b"secret"


NAMES = [
    "../../names/localhost/site:1",
    "localhost/../../x:1",
    "localhost/.hidden:1",
    "localhost/Site:1",
    "LOCALHOST/Site:1",
    "localhost/s%69te:1",
    "localhost/site%2f..:1",
    "localhost/\uff53ite:1",
    "localhost/s\u0456te:1",
    "localhost/site\u200b:1",
    "localhost/site:1\u0000",
    "localhost/site:../1",
    "localhost/site:1/../../x",
    "localhost/site:1.amd64",
    "localhost/site:1 ",
    "localhost/site:@sha256-" + "0" * 64,
    "localhost//site:1",
    "localhost/a/b/../../site:1",
    "/etc/passwd",
    "docker.io/library/" + "n" * 300,
    "localhost/" + "a/" * 200 + "b:1",
]
IMPORT = f"""
import socket, sys
sys.path.insert(0, sys.argv[1])
from hpcctr.wire import Frame
engine = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
engine.connect({ENGINE_SOCKET!r})
name = sys.argv[3].encode().decode("unicode_escape").encode("latin-1").decode()
words = [("task", "import"), ("image", "oci-archive"), ("name", name), ("source", "x")]
packet = b"hpcctr/1 store\\0" + b"".join(k.encode() + b"=" + v.encode() + b"\\0" for k, v in words)
engine.sendall(packet)
packet, descriptors, _, _ = socket.recv_fds(engine, 65536, 1)
if not descriptors:
    print(packet)
    sys.exit()
with socket.socket(fileno=descriptors[0]) as peer:
    try:
        peer.sendall(open(sys.argv[2], "rb").read())
        peer.shutdown(socket.SHUT_WR)
    except OSError:
        pass
    print(peer.makefile().read())
"""


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_whatever_a_user_calls_an_image_nothing_of_the_sites_or_anothers_changes(
    attacked: Node, bob: User, name: str
) -> None:
    """A client of the user's own making: what hpcctr pull would refuse goes to the engine."""
    before = _everything(attacked, but=f"users/{bob.uid}")
    archive = attacked.host.root / "evil.tar"
    if not archive.exists():
        write_oci_archive(archive, busybox(layers=[tar(file("etc/edition", b"evil"))]))
    escaped = "".join(f"\\x{byte:02x}" for byte in name.encode())
    words = [str(Path(hpcctr.__file__).parents[1]), str(archive), escaped]
    done = attacked.host.run(["/usr/bin/python3", "-c", IMPORT, *words], user=bob)
    assert b"failed" in done.stdout or b"hpcctr/1 error" in done.stdout or b'"pulled"' in done.stdout, done
    assert _everything(attacked, but=f"users/{bob.uid}") == before
    # Whatever it is called now lies where bob's images lie, and nowhere above.
    part = attacked.site.store / f"users/{bob.uid}"
    for path in part.rglob("*.json") if part.exists() else ():
        assert path.relative_to(part).parts[0] in ("names", "images"), path


def test_a_name_of_a_users_that_is_a_sites_means_that_to_nobody_else(attacked: Node, alice: User, bob: User) -> None:
    archive = write_oci_archive(attacked.host.root / "own.tar", busybox(layers=[tar(file("etc/edition", b"evil"))]))
    before = _everything(attacked, but=f"users/{bob.uid}")
    attacked.hpcctr("pull", "--name", SITE, f"oci-archive:{archive}", user=bob)
    assert _everything(attacked, but=f"users/{bob.uid}") == before
    for user, edition in ((bob, b"evil"), (alice, b"site"), (None, b"site")):
        assert attacked.run(SITE, "cat", "/etc/edition", user=user).stdout == edition
    attacked.hpcctr("rm", SITE, user=bob)
    assert attacked.run(SITE, "cat", "/etc/edition", user=bob).stdout == b"site"


# who may have written it


@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("", "everybody"),
        ("", "group"),
        ("images", "everybody"),
        ("images", "sticky"),
        ("images/DIGEST", "everybody"),
        ("images/DIGEST", "theirs"),
        ("images/DIGEST/root.squashfs", "everybody"),
        ("images/DIGEST/root.squashfs", "theirs"),
    ],
)
def test_where_others_could_have_written_an_image_nothing_is_mounted(
    attacked: Node, alice: User, what: str, how: str
) -> None:
    store = attacked.site.store
    digest = json.loads(attacked.hpcctr("inspect", "--format", "json", SITE).stdout)["digest"].replace(":", "-")
    path = store / what.replace("DIGEST", digest)
    path = path.resolve()
    status = path.stat()
    wait_until(lambda: not [mount for mount in attacked.host.mounts() if mount.kind == "squashfs"], what="no mounts")
    try:
        if how == "theirs":
            os.chown(path, alice.uid, alice.gid)
        else:
            path.chmod({"everybody": 0o777, "group": 0o775, "sticky": 0o1777}[how])
        done = attacked.run(SITE, "true", user=alice, check=125)
        assert b"hpcctr: error[store]" in done.stderr and b"can be changed by others" in done.stderr, done
        assert str(path).encode() in done.stderr
        assert not [mount for mount in attacked.host.mounts() if mount.kind == "squashfs"]
    finally:
        os.chown(path, status.st_uid, status.st_gid)
        path.chmod(status.st_mode & 0o7777)
    assert attacked.run(SITE, "cat", "/etc/edition", user=alice).stdout == b"site"


def test_other_names_of_an_image_file_give_nobody_a_way_to_write_it(attacked: Node, alice: User) -> None:
    digest = json.loads(attacked.hpcctr("inspect", "--format", "json", SITE).stdout)["digest"].replace(":", "-")
    stored = attacked.site.store / "images" / digest / "root.squashfs"
    other = attacked.host.root / "theirs"
    other.mkdir(exist_ok=True)
    os.chown(other, alice.uid, alice.gid)
    os.link(stored, other / "linked")
    try:
        for command in (f"echo x >> {other}/linked", f"truncate -s 0 {other}/linked", f"chmod 666 {other}/linked"):
            assert attacked.host.run(["sh", "-c", command], user=alice, check=False).returncode != 0
        assert attacked.run(SITE, "cat", "/etc/edition", user=alice).stdout == b"site"
    finally:
        (other / "linked").unlink()


@pytest.fixture
def lying(alice: User) -> Iterator[Node]:
    """A node whose store does not exist yet, in a directory everybody may write, as /scratch is; where alice was first
    and has mounted a filesystem of her own that says all in it is root's."""
    with scratch("lying") as place:
        common = place / "common"
        common.mkdir()
        common.chmod(0o1777)
        with node(place) as made:
            _bring(made, "site")
            theirs = alice.home / "store"
            shutil.copytree(made.site.store, theirs, symlinks=True)
            subprocess.run(["chown", "-R", f"{alice.uid}:{alice.gid}", theirs], check=True)
            made.engine.stop()
            text = made.site.file.read_text().replace(str(made.site.store), f"{common}/store")
            made.site.file.write_text(text)
            made.engine = engine.start(made.host, made.site)
            conf = place / "fuse.conf"
            conf.write_text("user_allow_other\n")
            made.host.run(["sh", "-c", f"touch /etc/fuse.conf; mount --bind {conf} /etc/fuse.conf"])
            made.host.run(["mkdir", f"{common}/store"], user=alice)
            try:
                yield made
            finally:
                made.host.run(["fusermount3", "-u", "-z", f"{common}/store"], user=alice, check=False)
                subprocess.run(["rm", "-rf", theirs], check=True)


def test_a_filesystem_that_a_user_serves_is_never_given_to_the_kernel_whoever_it_says_owns_the_files(
    lying: Node, alice: User
) -> None:
    store = lying.host.root / "common/store"
    options = ["-u", "root", "-g", "root", "-p", "0644,a+X,og-w", "-o", "allow_other"]
    lying.host.run(["bindfs", *options, str(alice.home / "store"), str(store)], user=alice)
    seen = lying.host.run(["sh", "-c", f"stat -c '%u %a' {store} {store}/images/*/root.squashfs"]).stdout
    assert seen == b"0 755\n0 644\n"
    done = lying.run(SITE, "cat", "/etc/edition", user=alice, check=False)
    assert done.returncode == 125 and b"hpcctr: error[" in done.stderr, done
    assert b"served for a user" in done.stderr
    assert not [mount for mount in lying.host.mounts() if mount.kind == "squashfs"]


def test_a_filesystem_of_a_users_that_root_may_not_look_into_ends_in_a_named_error(lying: Node, alice: User) -> None:
    store = lying.host.root / "common/store"
    lying.host.run(["bindfs", "--no-allow-other", str(alice.home / "store"), str(store)], user=alice)
    done = lying.run(SITE, "cat", "/etc/edition", user=alice, check=False)
    assert done.returncode == 125 and b"hpcctr: error[store]" in done.stderr, done
    assert lying.engine.process.poll() is None


def test_a_store_that_a_user_was_first_to_make_in_a_directory_of_everybodys_is_refused(
    lying: Node, alice: User
) -> None:
    store = lying.host.root / "common/store"
    shutil.rmtree(store)
    subprocess.run(["cp", "-a", alice.home / "store", store], check=True)
    done = lying.run(SITE, "cat", "/etc/edition", user=alice, check=125)
    assert b"hpcctr: error[store]" in done.stderr and b"can be changed by others" in done.stderr


@pytest.mark.parametrize("what", ["names/**/*.json", "images/*/image.json"])
@pytest.mark.parametrize("how", ["theirs", "everybodys"])
def test_a_record_that_others_could_have_written_is_not_believed(
    attacked: Node, alice: User, bob: User, what: str, how: str
) -> None:
    path = next(attacked.site.store.glob(what))
    status = path.stat()
    try:
        os.chown(path, *(bob.uid, bob.gid) if how == "theirs" else (OWNER, OWNER))
        path.chmod(0o644 if how == "theirs" else 0o666)
        done = attacked.run(SITE, "true", user=alice, flags=["--pull", "never"], check=125)
        assert b"hpcctr: error[store]" in done.stderr and str(path).encode() in done.stderr, done
    finally:
        os.chown(path, status.st_uid, status.st_gid)
        path.chmod(status.st_mode & 0o7777)
    assert attacked.run(SITE, "cat", "/etc/edition", user=alice).stdout == b"site"
