"""Where a path leads in image and upper layer together."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcctr.engine.union import DEPTH_MAX, LINKS_MAX, Names, PathLost, Union


@pytest.fixture
def image(tmp_path: Path) -> Path:
    image = tmp_path / "image"
    for name in ("usr/lib/deep", "etc", "opt"):
        (image / name).mkdir(parents=True)
    (image / "usr").chmod(0o711)
    (image / "usr/lib").chmod(0o6775)
    (image / "usr/file").write_text("of the image")
    for name, text in (
        ("lib", "usr/lib"),
        ("lib64", "/lib"),
        ("usr/lib64", "../lib64/"),
        ("out", "../../../../../opt"),
        ("magic", "/proc/self/root/etc"),
        ("loop", "loop"),
        ("one", "two"),
        ("two", "one/x"),
        ("dangling", "/no/such/place"),
        ("to-file", "usr/file"),
    ):
        (image / name).symlink_to(text)
    return image


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    upper = tmp_path / "upper"
    upper.mkdir()
    return upper


@pytest.fixture
def union(image: Path, upper: Path) -> Iterator[Union]:
    descriptors = [os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (image, upper)]
    yield Union(image=descriptors[0], upper=descriptors[1])
    for descriptor in descriptors:
        os.close(descriptor)


def _follow(union: Union, path: str, mounted: tuple[Names, ...] = ()) -> str:
    place, rest = union.follow(path.encode(), mounted=mounted)
    return "/" + "/".join(os.fsdecode(name) for name in place) + "".join(f"|{os.fsdecode(name)}" for name in rest)


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("/usr/lib/x", "/usr/lib/x"),
        ("/lib/x", "/usr/lib/x"),
        ("/lib64/x", "/usr/lib/x"),
        ("/usr/lib64/deep/new/x", "/usr/lib/deep/new/x"),
        ("/out/x", "/opt/x"),
        ("/dangling/x", "/no/such/place/x"),
        ("/magic/x", "/proc/self/root/etc/x"),
        # The last name is where something is to be, whatever is there.
        ("/lib", "/lib"),
        ("/loop", "/loop"),
        ("/to-file", "/to-file"),
    ],
)
def test_links_are_followed_below_the_root_of_the_image_but_for_the_last(union: Union, path: str, place: str) -> None:
    assert _follow(union, path) == place
    assert _follow(union, path) == place


@pytest.mark.parametrize("path", ["/loop/x", "/one/x", "/loop/a/b/c"])
def test_links_without_end_lead_nowhere(union: Union, path: str) -> None:
    with pytest.raises(PathLost, match=f"more than {LINKS_MAX} symbolic links"):
        union.follow(path.encode())


def test_as_many_links_as_the_kernel_follows_are_followed(union: Union, image: Path) -> None:
    for number in range(LINKS_MAX):
        (image / f"l{number}").symlink_to(f"l{number + 1}" if number < LINKS_MAX - 1 else "opt")
    assert _follow(union, "/l0/x") == "/opt/x"
    (image / "first").symlink_to("l0")
    with pytest.raises(PathLost):
        union.follow(b"/first/x")


@pytest.mark.parametrize("path", ["/usr/file/x", "/to-file/x/y"])
def test_a_file_on_the_way_ends_it(union: Union, path: str) -> None:
    with pytest.raises(PathLost, match="/usr/file is a file in the image"):
        union.follow(path.encode())


def test_a_path_deeper_than_anybodys_is_not_followed(union: Union) -> None:
    with pytest.raises(PathLost, match="directories deep"):
        union.follow(b"/a" * (DEPTH_MAX + 2))


def test_what_lies_in_a_mounted_directory_is_told_apart(union: Union) -> None:
    mounted = ((b"opt",), (b"usr", b"lib", b"deep"))
    assert _follow(union, "/opt/a/b", mounted) == "/opt|a|b"
    assert _follow(union, "/out/a", mounted) == "/opt|a"
    assert _follow(union, "/lib64/deep/a", mounted) == "/usr/lib/deep|a"
    assert _follow(union, "/opt", mounted) == "/opt"


def test_the_upper_layer_hides_what_the_image_has(union: Union, image: Path, upper: Path) -> None:
    (upper / "lib").mkdir()
    (upper / "usr").mkdir()
    (upper / "usr/file").symlink_to("/opt")
    assert _follow(union, "/lib/deep/x") == "/lib/deep/x"
    assert _follow(union, "/usr/file/x") == "/opt/x"
    found = union.look((b"usr", b"lib"))
    assert found is not None
    assert found.kind == "d"
    # The directory that hides the link shows nothing of where the link led.
    assert union.look((b"lib", b"deep")) is None


def test_a_name_that_is_not_there_is_nothing(union: Union) -> None:
    assert union.look((b"usr", b"none")) is None
    assert union.look((b"usr", b"file", b"x")) is None


@pytest.mark.root
def test_a_name_that_the_overlay_takes_for_deleted_is_nothing(union: Union, image: Path) -> None:
    os.mknod(image / "opt/gone", stat.S_IFCHR, os.makedev(0, 0))
    assert union.look((b"opt", b"gone")) is None


def test_parents_are_made_with_the_images_modes_and_without_set_id_bits(union: Union, upper: Path) -> None:
    names = (b"usr", b"lib", b"new", b"x")
    union.make_parents(names)
    union.write(names, b"content")
    union.make_parents((b"usr", b"lib", b"other"))
    modes = [stat.S_IMODE((upper / name).stat().st_mode) for name in ("usr", "usr/lib", "usr/lib/new", "usr/lib/new/x")]
    assert [oct(mode) for mode in modes] == ["0o711", "0o775", "0o755", "0o644"]
    assert (upper / "usr/lib/new/x").read_bytes() == b"content"


def test_files_and_links_replace_each_other_in_the_upper_layer_alone(union: Union, image: Path, upper: Path) -> None:
    union.link((b"lib",), b"/elsewhere")
    union.write((b"lib",), b"1")
    union.write((b"lib",), b"2")
    assert (upper / "lib").read_bytes() == b"2"
    union.link((b"lib",), b"/elsewhere")
    assert os.readlink(upper / "lib") == "/elsewhere"
    union.clear((b"lib",))
    union.clear((b"lib",))
    assert not os.path.lexists(upper / "lib")
    assert os.readlink(image / "lib") == "usr/lib"


def test_nothing_is_made_through_a_link_of_the_upper_layers(union: Union, upper: Path) -> None:
    outside = upper.parent / "outside"
    outside.mkdir()
    (upper / "way").symlink_to(outside)
    for make in (union.write, union.link):
        with pytest.raises(OSError):
            make((b"way", b"x"), b"content")
    with pytest.raises(OSError):
        union.make_directory((b"way", b"x"), 0o755)
    assert list(outside.iterdir()) == []
