"""Host features of a site as launches meet them: libraries built here in a real Debian image, and /dev/fuse."""

from __future__ import annotations

import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import elfs
from tests.support.node import Node, node
from tests.support.oci import busybox, write_layout
from tests.support.scratch import scratch
from tests.support.users import User

pytestmark = [pytest.mark.root, pytest.mark.containerd]

STATIC = "local/static:1"
#: Prints what a library of the node says; an image of Debian 12 has all that both need of glibc.
PROGRAM = "int puts(const char *); const char *thing(void); int main(void) { return puts(thing()) < 0; }"


@pytest.fixture(scope="module")
def debian(debian12_mpi_image: str) -> str:
    return debian12_mpi_image


@pytest.fixture(scope="module")
def outfitted(debian: str) -> Iterator[Node]:
    """A node with a Debian, a static busybox, and profiles of libraries that only this node has."""
    with scratch("profiles") as place, node(place / "node", keys='features = ["everywhere", "nowhere"]\n') as started:
        started.pull(debian)
        started.hpcctr("pull", "--name", STATIC, f"oci:{write_layout(place / 'layout', busybox())}")
        lib = place / "lib"
        part = elfs.library(
            lib / "libpart.so.2", soname="libpart.so.2", body='const char *part(void) { return "part"; }\n'
        )
        elfs.library(
            lib / "libthing.so.1",
            soname="libthing.so.1",
            needs={part: ()},
            body='const char *part(void); const char *thing(void) { return part()[0] ? "of the node" : ""; }\n',
            runpath="$ORIGIN",
        )
        future = elfs.library(place / "future/libc.so.6", soname="libc.so.6", defines=["GLIBC_2.99"])
        elfs.library(lib / "libnewer.so.1", soname="libnewer.so.1", needs={future: ["GLIBC_2.99"]})
        elfs.program(place / "use-thing", PROGRAM, [lib / "libthing.so.1"], "-Wl,--allow-shlib-undefined")
        source = Path(__file__).parents[1] / "native/ioctl.c"
        subprocess.run(["gcc", "-std=gnu11", "-O2", "-static", "-o", place / "ioctl", source], check=True)
        profiles = place / "node/profiles.d"
        profiles.mkdir(mode=0o755)
        for name, text in {
            "thing": f'libraries = ["{lib}/libthing.so.1"]\nmemlock = "unlimited"\n[env]\nTHING = "yes"\n',
            "newer": f'libraries = ["{lib}/libnewer.so.*"]\n',
            "fuse": 'devices = ["/dev/fuse"]\n',
            "absent": 'devices = ["/dev/infiniband-of-nobody/*"]\n',
            "everywhere": '[env]\nEVERYWHERE = "1"\n',
            "nowhere": 'devices = ["/dev/infiniband-of-nobody/*"]\n[env]\nNOWHERE = "1"\n',
        }.items():
            (profiles / f"{name}.toml").write_text(text)
        for path in (place, lib):
            path.chmod(0o755)
        yield started


def _place(on: Node) -> Path:
    return on.host.root.parent


def _thing(on: Node, user: User | None, image: str, *flags: str, check: int = 0) -> tuple[str, str]:
    """What a program that is linked to the node's library prints."""
    volume = f"{_place(on)}/use-thing:/use-thing"
    done = on.run(image, "/use-thing", user=user, flags=("-v", volume, *flags), cwd="/tmp", check=check)
    return done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize("who", ["user", "root"])
def test_a_library_of_the_node_and_what_it_needs_are_found_inside(
    outfitted: Node, alice: User, debian: str, who: str
) -> None:
    user = alice if who == "user" else None
    assert _thing(outfitted, user, debian, "--feature", "thing")[0] == "of the node\n"
    assert "libthing.so.1: cannot open shared object file" in _thing(outfitted, user, debian, check=127)[1]


def test_programs_of_the_image_find_their_own_libraries_beside_those_of_the_node(
    outfitted: Node, alice: User, debian: str
) -> None:
    """The image's ldconfig reads what the node's engine wrote; every entry of the image's own is still there."""

    def cache(*flags: str) -> list[str]:
        done = outfitted.run(debian, "/sbin/ldconfig", "-p", user=alice, flags=flags, cwd="/tmp")
        return [line.strip() for line in done.stdout.decode().splitlines()[1:]]

    plain, more = cache(), cache("--feature", "thing")
    assert {line for line in plain if "=>" in line} < set(more)
    assert [line for line in more if line not in plain and "=>" in line] == [
        f"{name} (libc6,x86-64) => /.hpcctr-host/lib/{name}" for name in ("libthing.so.1", "libpart.so.2")
    ]


def test_variables_of_a_profile_are_set_and_a_low_limit_is_told(outfitted: Node, alice: User, debian: str) -> None:
    script = 'ulimit -l 64; exec "$@"'
    words = ["run", "--feature", "thing", debian, "--", "sh", "-c", "echo $THING"]
    from tests.support.engine import HPCCTR

    done = outfitted.host.run(
        ["sh", "-c", script, "sh", str(HPCCTR), *words], user=alice, env=outfitted.environment(), cwd="/tmp"
    )
    assert done.stdout == b"yes\n"
    assert b"hpcctr: warning: thing: you may lock 65536 bytes of memory" in done.stderr


def test_default_features_come_where_the_node_has_them(outfitted: Node, alice: User) -> None:
    done = outfitted.run(STATIC, "sh", "-c", "echo $EVERYWHERE-$NOWHERE", user=alice, cwd="/tmp")
    assert (done.stdout, done.stderr) == (b"1-\n", b"")


def _refused(on: Node, user: User, image: str, *flags: str, status: int) -> str:
    return on.run(image, "true", user=user, flags=flags, cwd="/tmp", check=status).stderr.decode()


def test_a_library_that_needs_a_newer_glibc_is_refused_before_anything_starts(
    outfitted: Node, alice: User, debian: str
) -> None:
    text = _refused(outfitted, alice, debian, "--feature", "newer", status=126)
    assert "error[libraries-unfit]: libnewer.so.1 of the node needs GLIBC_2.99 of libc.so.6" in text
    assert "the image has glibc 2.36" in text and "hint: use an image with glibc 2.99 or newer" in text


def test_libraries_for_an_image_of_static_programs_are_refused(outfitted: Node, alice: User) -> None:
    text = _refused(outfitted, alice, STATIC, "--feature", "thing", status=126)
    assert "error[libraries-unfit]: the image has no dynamic loader" in text


def test_what_the_node_lacks_of_a_feature_is_named(outfitted: Node, alice: User, debian: str) -> None:
    text = _refused(outfitted, alice, debian, "--feature", "absent", status=125)
    assert "error[feature-unusable]: host feature absent: this node has no /dev/infiniband-of-nobody/*" in text


def test_a_real_driver_answers_through_a_profiles_device(outfitted: Node, alice: User) -> None:
    assert stat.S_ISCHR(Path("/dev/fuse").stat().st_mode)
    flags = ("--feature", "fuse", "-v", f"{_place(outfitted)}/ioctl:/ioctl")
    done = outfitted.run(STATIC, "/ioctl", "fuse", "/dev/fuse", user=alice, flags=flags, cwd="/tmp")
    assert done.stdout in (b"fuse: Operation not permitted\n", b"fuse: Invalid argument\n")


def test_a_library_that_is_updated_is_new_for_the_next_launch(outfitted: Node, alice: User, debian: str) -> None:
    library = _place(outfitted) / "lib/libthing.so.1"
    before = library.read_bytes()
    assert _thing(outfitted, alice, debian, "--feature", "thing")[0] == "of the node\n"
    try:
        new = elfs.library(
            library.with_name("new.so"),
            soname="libthing.so.1",
            body='const char *thing(void) { return "updated"; }\n',
        )
        new.rename(library)
        assert _thing(outfitted, alice, debian, "--feature", "thing")[0] == "updated\n"
    finally:
        new.unlink(missing_ok=True)
        old = library.with_name("old.so")
        old.write_bytes(before)
        old.chmod(0o755)
        old.rename(library)


def test_a_program_joins_a_container_with_libraries_of_the_node(outfitted: Node, alice: User, debian: str) -> None:
    with outfitted.held(
        debian, user=alice, flags=("--feature", "thing", "-v", f"{_place(outfitted)}/use-thing:/use-thing")
    ) as held:
        done = outfitted.hpcctr("exec", str(held.pid), "--", "/use-thing", user=alice)
    assert done.stdout == b"of the node\n"
