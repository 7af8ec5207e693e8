"""What the site adds, made in the upper layer over plain directories."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hpcctr.engine.furnishing import CACHE_MAX, Furnishing, covered, room
from hpcctr.engine.union import Union
from hpcctr.errors import FeatureUnusable
from hpcctr.host.edits import (
    MOUNTS_MAX,
    CacheEntry,
    FileEdit,
    HookEdit,
    HostEdits,
    LinkEdit,
    MountEdit,
)
from hpcctr.host.ldcache import listed, merged
from hpcctr.host.trusted import Look, Trusted
from hpcctr.mounttable import MountEntry
from hpcctr.request import Target
from hpcctr.spec.mounts import BindMount

FILE = "/usr/bin/env"
ENTRY = CacheEntry(soname="libx.so.1", path="/.hpcctr-host/lib/libx.so.1", flags=0x303, origin="profile")


@dataclass(kw_only=True)
class Place:
    """An image tree, the upper layer over it, and directories of the host's."""

    image: Path
    upper: Path
    host: Path
    union: Union

    def make(self, *edits: Any, targets: tuple[Target, ...] = (), look: Look | None = None) -> tuple[BindMount, ...]:
        furnishing = Furnishing(union=self.union, image="img", targets=targets, look=look or _Anybodys())
        return furnishing.make(_edits(*edits))

    def made(self) -> set[str]:
        return {str(path.relative_to(self.upper)) for path in self.upper.rglob("*") if not path.is_dir()}


class _Anybodys(Look):
    """Of whose the sources are, tests/unit/host/test_trusted.py tells."""

    def require(self, path: str, *, origin: str = "") -> Trusted:
        if not os.path.exists(path):
            raise FeatureUnusable(f"{origin}: {path}: no such file")
        return Trusted(path=os.path.realpath(path), kind="d" if os.path.isdir(path) else "f", identity="1:2:3:4")


def _edits(*several: Any) -> HostEdits:
    def of(kind: type) -> tuple[Any, ...]:
        return tuple(edit for edit in several if isinstance(edit, kind))

    return HostEdits(
        mounts=of(MountEdit), links=of(LinkEdit), files=of(FileEdit), hooks=of(HookEdit), cache=of(CacheEntry)
    )


def _mount(target: str, source: str | Path = FILE, **changes: Any) -> MountEdit:
    kind = "d" if os.path.isdir(source) else "f"
    return MountEdit(**{"source": str(source), "target": target, "kind": kind, "origin": "profile", **changes})


def _link(path: str, target: str = "/elsewhere") -> LinkEdit:
    return LinkEdit(path=path, target=target, origin="profile")


def _file(path: str, content: bytes = b"made") -> FileEdit:
    return FileEdit(path=path, content=content, origin="profile")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    image, upper, host = tmp_path / "image", tmp_path / "upper", tmp_path / "host"
    for name in ("usr/lib", "etc", "opt", "home"):
        (image / name).mkdir(parents=True)
    (image / "lib").symlink_to("usr/lib")
    (image / "lib64").symlink_to("/lib")
    (image / "usr/lib/libx.so.1").symlink_to("libx.so.1.0")
    (image / "usr/lib/libx.so.1.0").write_text("of the image")
    (image / "to-proc").symlink_to("proc/self/root")
    (image / "up").symlink_to("../../../..")
    (host / "tree/sub").mkdir(parents=True)
    (host / "tree/sub/file").write_text("x")
    (host / "tree/link").symlink_to("sub")
    upper.mkdir()
    (upper / "etc").mkdir()
    descriptors = [os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (image, upper)]
    yield Place(image=image, upper=upper, host=host, union=Union(image=descriptors[0], upper=descriptors[1]))
    for descriptor in descriptors:
        os.close(descriptor)


def test_nothing_makes_nothing(place: Place) -> None:
    assert place.make() == ()
    assert place.made() == set()


def test_a_mount_point_is_a_plain_empty_file_where_the_links_of_the_image_lead(place: Place) -> None:
    binds = place.make(_mount("/lib64/libx.so.1"), _mount("/.hpcctr-host/lib/liby.so"), _mount("/up/opt/a/b"))
    assert [bind.target for bind in binds] == ["/usr/lib/libx.so.1", "/.hpcctr-host/lib/liby.so", "/opt/a/b"]
    assert place.made() == {"usr/lib/libx.so.1", ".hpcctr-host/lib/liby.so", "opt/a/b"}
    point = place.upper / "usr/lib/libx.so.1"
    assert (point.is_symlink(), point.read_bytes()) == (False, b"")
    assert (place.image / "usr/lib/libx.so.1.0").read_text() == "of the image"


@pytest.mark.parametrize("make", ["link", "pipe", "file", "nothing"])
def test_whatever_is_in_the_place_of_a_file_is_hidden(place: Place, make: str) -> None:
    victim = place.image / "opt/x"
    if make == "link":
        victim.symlink_to("/etc/shadow")
    elif make == "pipe":
        os.mkfifo(victim)
    elif make == "file":
        victim.write_text("of the image")
    place.make(_mount("/opt/x"))
    assert (place.upper / "opt/x").read_bytes() == b""
    assert place.made() == {"opt/x"}


def test_a_directory_is_mounted_on_the_images_or_on_a_new_one_and_never_through_a_link(place: Place) -> None:
    tree = place.host / "tree"
    binds = place.make(_mount("/opt", tree), _mount("/srv/x", tree), _mount("/lib", tree))
    assert [(bind.target, bind.kind) for bind in binds] == [("/opt", "d"), ("/lib", "d"), ("/srv/x", "d")]
    assert not (place.upper / "opt").exists()
    assert (place.upper / "lib").is_dir() and not (place.upper / "lib").is_symlink()


def test_two_edits_that_links_lead_to_one_place_are_one_mount_the_later(place: Place) -> None:
    (bind,) = place.make(_mount("/lib/a"), _mount("/lib64/a", "/usr/bin/id"))
    assert (bind.target, bind.source) == ("/usr/lib/a", os.path.realpath("/usr/bin/id"))


@pytest.mark.parametrize(
    ("target", "source", "reason"),
    [
        ("/usr/lib", FILE, "it is a directory in the image, not a file"),
        ("/usr/lib/libx.so.1.0", "/usr/lib", "it is a file in the image, where a directory is to be mounted"),
        ("/usr/lib/libx.so.1.0/y", FILE, "/usr/lib/libx.so.1.0 is a file in the image"),
        ("/to-proc/etc/x", FILE, r"/proc, /sys and /dev are the caller's own, where a link of the image leads"),
        ("/dev/nvidia0", FILE, "/proc, /sys and /dev are the caller's own"),
        ("/proc", "/usr/lib", "the caller's own"),
        ("/sys/x", FILE, "the caller's own"),
        ("/.hpcctr-anchor", FILE, "the caller's own"),
        ("/", "/usr/lib", "not a plain absolute path"),
        ("/a/../b", FILE, "not a plain absolute path"),
        ("/a//b", FILE, "not a plain absolute path"),
        ("/a/", FILE, "not a plain absolute path"),
        ("/" + "x" * 256, FILE, "a name too long"),
        ("/x" * 70, FILE, "directories deep"),
    ],
)
def test_a_place_that_cannot_be_is_named_with_feature_and_image(
    place: Place, target: str, source: str, reason: str
) -> None:
    with pytest.raises(FeatureUnusable, match=reason) as raised:
        place.make(_mount(target, source))
    assert raised.value.message.startswith(f"profile: {target[:200]}: ")
    assert raised.value.message.endswith(" (image img)")


@pytest.mark.parametrize("target", ["relative", "", "/a\0b", "/a\udcff"])
def test_a_target_that_is_no_path_is_refused(place: Place, target: str) -> None:
    with pytest.raises(FeatureUnusable, match="^profile: "):
        place.make(_mount(target))


def test_a_source_of_another_kind_or_that_has_changed_is_refused(place: Place) -> None:
    with pytest.raises(FeatureUnusable, match="is a directory"):
        place.make(_mount("/a", "/usr/lib", kind="f"))
    with pytest.raises(FeatureUnusable, match="has just changed") as raised:
        place.make(_mount("/a", identity="1:2:3:5"))
    assert raised.value.hint == "try again"
    assert place.make(_mount("/a", identity="1:2:3:4"))[0].identity == "1:2:3:4"


def test_what_the_host_forbids_for_a_file_stays_forbidden(place: Place) -> None:
    class Restricted(_Anybodys):
        def require(self, path: str, *, origin: str = "") -> Trusted:
            return Trusted(path=path, kind="f", identity="1", options=frozenset({"ro", "noexec"}))

    (bind,) = place.make(_mount("/a", is_read_only=False), look=Restricted())
    assert (bind.is_read_only, bind.is_noexec) == (True, True)
    (bind,) = place.make(_mount("/a", is_read_only=False))
    assert (bind.is_read_only, bind.is_noexec) == (False, False)


def test_a_directory_with_an_unbindable_mount_below_is_refused(place: Place) -> None:
    class Covered(_Anybodys):
        def mounts(self) -> list[MountEntry]:
            point = str(place.host / "tree/sub")
            return [
                MountEntry(
                    target=point,
                    options=frozenset(),
                    super_options=(),
                    propagation=("unbindable",),
                    kind="tmpfs",
                    source="x",
                )
            ]

    with pytest.raises(FeatureUnusable, match="unbindable mount at .*/tree/sub"):
        place.make(_mount("/a", place.host / "tree"), look=Covered())
    place.make(_mount("/a", place.host / "tree/link"), look=_Anybodys())


def test_below_a_directory_of_the_hosts_a_target_must_be_there_already(place: Place) -> None:
    tree = place.host / "tree"
    binds = place.make(_mount("/opt/t", tree), _mount("/opt/t/sub/file"), _mount("/opt/t/sub", place.host / "tree/sub"))
    assert [bind.target for bind in binds] == ["/opt/t", "/opt/t/sub", "/opt/t/sub/file"]
    assert place.made() == set()
    for target, source in (
        ("/opt/t/none", FILE),
        ("/opt/t/sub", FILE),
        ("/opt/t/sub/file", "/usr/lib"),
        ("/opt/t/link", "/usr/lib"),
        ("/opt/t/link/file", FILE),
    ):
        with pytest.raises(FeatureUnusable, match=f"lies in /opt/t, which is {tree} of the host"):
            place.make(_mount("/opt/t", tree), _mount(target, source))
    assert sorted(path.name for path in tree.iterdir()) == ["link", "sub"]


def test_a_link_of_the_image_may_lead_into_a_directory_of_the_hosts(place: Place) -> None:
    (place.image / "way").symlink_to("opt/t/sub")
    (place.image / "back").symlink_to("opt/t/sub/../../..")
    tree = place.host / "tree"
    assert place.make(_mount("/opt/t", tree), _mount("/way/file"))[1].target == "/opt/t/sub/file"
    with pytest.raises(FeatureUnusable, match="leads out of /opt/t"):
        place.make(_mount("/opt/t", tree), _mount("/back/file"))


def test_links_and_files_replace_what_the_image_has_but_no_directory(place: Place) -> None:
    place.make(_link("/lib64/libx.so.1", "libx.so.535"), _link("/usr/lib/libx.so.1.0"), _file("/etc/new/conf"))
    assert os.readlink(place.upper / "usr/lib/libx.so.1") == "libx.so.535"
    assert os.readlink(place.upper / "usr/lib/libx.so.1.0") == "/elsewhere"
    assert (place.upper / "etc/new/conf").read_bytes() == b"made"
    for edit in (_link("/usr/lib"), _file("/opt")):
        with pytest.raises(FeatureUnusable, match="it is a directory in the image"):
            place.make(edit)
    for path in ("/proc/x", "/to-proc/x", "/.hpcctr-anchor", "/a/../b"):
        with pytest.raises(FeatureUnusable):
            place.make(_link(path))


@pytest.mark.parametrize("text", ["", "x" * 4096, "a\0b"])
def test_a_link_that_no_filesystem_holds_is_refused(place: Place, text: str) -> None:
    with pytest.raises(FeatureUnusable, match="cannot hold such a text"):
        place.make(_link("/opt/l", text))


def test_a_mount_counts_more_than_a_link_in_its_place_and_is_found_through_others(place: Place) -> None:
    binds = place.make(_link("/opt/cuda", "cuda-12"), _link("/opt/x"), _mount("/opt/x"), _mount("/opt/cuda/lib/y"))
    assert [bind.target for bind in binds] == ["/opt/x", "/opt/cuda-12/lib/y"]
    assert not (place.upper / "opt/x").is_symlink()


def test_a_link_below_a_mounted_directory_must_be_there_as_it_is(place: Place) -> None:
    tree = place.host / "tree"
    place.make(_mount("/opt/t", tree), _link("/opt/t/link", "sub"))
    for edit in (_link("/opt/t/link", "other"), _link("/opt/t/new"), _file("/opt/t/sub/file")):
        with pytest.raises(FeatureUnusable, match="and is something else there"):
            place.make(_mount("/opt/t", tree), edit)


def test_what_the_callers_own_mounts_cover_is_not_made(place: Place) -> None:
    targets = (Target("d", b"/home/u"), Target("d", b"/usr/lib"), Target("f", b"/opt/x"))
    binds = place.make(
        _mount("/home/u/x"),
        _mount("/lib/x"),
        _mount("/opt/x"),
        _mount("/home/other"),
        _link("/home/u/l"),
        targets=targets,
    )
    assert [bind.target for bind in binds] == ["/home/other"]
    assert place.made() == {"home/other"}


def test_the_user_is_told_what_their_own_mounts_cover() -> None:
    targets = (Target("d", b"/home/u"), Target("d", b"/opt"))
    edits = _edits(_mount("/home/u/a"), _mount("/home/u/b"), _mount("/srv/x"), _link("/opt/l"))
    assert covered(edits, targets) == (
        "/home/u of yours is mounted over what the node puts there: /home/u/a and 1 more",
        "/opt of yours is mounted over what the node puts there: /opt/l",
    )
    assert covered(edits, ()) == ()


def test_ld_so_is_told_of_the_images_own_and_of_ours(place: Place) -> None:
    theirs = merged(b"", [CacheEntry(soname="libc.so.6", path="/lib/libc.so.6", flags=0x303, origin="")])
    (place.image / "etc/ld.so.cache").write_bytes(theirs)
    place.make(ENTRY)
    made = listed((place.upper / "etc/ld.so.cache").read_bytes())
    assert {(entry.soname, entry.path) for entry in made} == {
        ("libc.so.6", "/lib/libc.so.6"),
        ("libx.so.1", "/.hpcctr-host/lib/libx.so.1"),
    }


@pytest.mark.parametrize("kind", ["link", "pipe", "huge", "garbage"])
def test_a_cache_of_the_images_that_is_none_counts_for_nothing(place: Place, kind: str) -> None:
    cache = place.image / "etc/ld.so.cache"
    if kind == "link":
        cache.symlink_to("/etc/ld.so.cache")
    elif kind == "pipe":
        os.mkfifo(cache)
    elif kind == "huge":
        with cache.open("wb") as file:
            file.truncate(CACHE_MAX + 1)
    elif kind == "garbage":
        cache.write_bytes(b"glibc-ld.so.cache1.1" + bytes(range(256)) * 64)
    place.make(ENTRY)
    assert [entry.soname for entry in listed((place.upper / "etc/ld.so.cache").read_bytes())] == ["libx.so.1"]


def test_a_cache_that_is_mounted_is_left_alone(place: Place) -> None:
    place.make(ENTRY, _mount("/etc/ld.so.cache"))
    assert (place.upper / "etc/ld.so.cache").read_bytes() == b""


def test_everything_is_bounded(place: Place) -> None:
    for several in (
        [_mount(f"/opt/{n}") for n in range(MOUNTS_MAX + 1)],
        [_link(f"/l{n}") for n in range(MOUNTS_MAX + 1)],
    ):
        with pytest.raises(FeatureUnusable, match=f"{MOUNTS_MAX} are possible"):
            place.make(*several)
    with pytest.raises(FeatureUnusable, match="generated files of more than"):
        place.make(_file("/a", bytes(1 << 20)), _file("/b", b"x"))
    assert place.made() == set()


def test_the_room_is_enough_for_all_that_is_made(place: Place) -> None:
    several = [_mount(f"/a{n}/b/c/d/file") for n in range(50)] + [_file("/x/y", b"x" * 5000), _link("/z/l")]
    size, inodes = room(_edits(*several, ENTRY))
    place.make(*several, ENTRY)
    paths = [path for path in place.upper.rglob("*")]
    assert len(paths) <= inodes
    assert sum((path.lstat().st_size + 4095) // 4096 * 4096 for path in paths if path.is_file()) <= size
    assert room(HostEdits()) == (0, 0)


def _hook(path: str, stage: Any = "createRuntime") -> HookEdit:
    return HookEdit(stage=stage, path=path, args=(), env=(), timeout=None, origin="x.json")


def test_a_hook_is_a_program_of_roots_outside_of_the_image(place: Place) -> None:
    place.make(_hook("/usr/bin/env"), _hook("/usr/bin/env", "prestart"))
    with pytest.raises(
        FeatureUnusable, match="^x.json: hook /usr/bin/env is to run at createContainer, where runtimes"
    ):
        place.make(_hook("/usr/bin/env", "createContainer"))
    for path in ("/etc/passwd", "/usr/lib"):
        with pytest.raises(FeatureUnusable, match="is not a program"):
            place.make(_hook(path))


def test_sources_are_looked_at_by_the_rules_for_all_of_them(place: Place) -> None:
    os.chmod(place.host / "tree/sub/file", 0o666)
    for edit in (_mount("/a", place.host / "tree/sub/file"), _hook(str(place.host / "tree/sub/file"))):
        with pytest.raises(FeatureUnusable, match="not root's alone"):
            place.make(edit, look=Look())
