"""What is in the image file is what the layers say, but for the changes docs/store.md names."""

from __future__ import annotations

import dataclasses
import os
import stat
import subprocess
from pathlib import Path

import pytest

from hpcctr.site import Site
from tests.support.oci import (
    Compression,
    Image,
    Member,
    character_device,
    directory,
    fifo,
    file,
    hardlink,
    opaque,
    symlink,
    tar,
    whiteout,
    write_layout,
)
from tests.support.pulling import pulled, unpacked

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="unpacks owners and modes")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(store=str(tmp_path / "store"))


DEEP = "/".join(f"{number:03d}" for number in range(900))

STACKS: dict[str, list[list[Member]]] = {
    "replaced and removed": [
        [directory("d"), file("d/a", b"1"), file("d/b", b"1"), file("gone", b"1"), directory("e"), file("e/x", b"1")],
        [file("d/a", b"2"), whiteout("d/b"), whiteout("gone"), whiteout("e")],
        [directory("e"), file("e/y", b"3")],
    ],
    "opaque": [
        [directory("d"), file("d/old", b"1"), directory("d/sub"), file("d/sub/old", b"1")],
        [directory("d"), opaque("d"), file("d/new", b"2"), directory("d/sub"), file("d/sub/new", b"2")],
    ],
    "opaque last": [
        [directory("d"), file("d/old", b"1")],
        [directory("d"), file("d/new", b"2"), opaque("d")],
    ],
    "file, directory and symlink take each other's place": [
        [file("a", b"1"), directory("b"), file("b/x", b"1"), symlink("c", "a"), directory("t"), symlink("s", "t")],
        [directory("a"), file("a/x", b"2"), file("b", b"2"), file("c", b"2"), directory("s"), file("s/x", b"2")],
        [symlink("a", "b"), directory("c"), symlink("b", "c")],
    ],
    "hard links": [
        [file("a", b"1", mode=0o755), hardlink("b", "a"), directory("d"), hardlink("d/c", "b")],
        [file("a", b"2"), hardlink("d/e", "b")],
        [whiteout("b"), hardlink("f", "d/e")],
    ],
    "symlinked parents": [
        [
            directory("usr"),
            directory("usr/lib"),
            symlink("lib", "usr/lib"),
            symlink("abs", "/usr"),
            file("usr/lib/old", b"1"),
        ],
        [file("lib/x", b"2"), directory("lib/dir"), file("abs/lib/y", b"2"), whiteout("lib/old")],
        [hardlink("z", "lib/x"), symlink("lib/l", "../../../../../../etc")],
    ],
    "names": [
        [
            file(b"\xff\xfe\x80", b"1"),
            file(b"new\nline", b"1"),
            file("./dot", b"1"),
            file("/absolute", b"1"),
            directory("dir/"),
            file("d\u00e4\u00f6\u65e5\u672c", b"1"),
            file("n" * 255, b"1"),
            symlink("long link", "t/" * 1500 + "t"),
            file(b"dir/" + b"p" * 200, b"pax", long_names="pax"),
            file(b"dir/" + b"u" * 90 + b"/" + b"w" * 90, b"ustar", long_names="ustar"),
            file(b"caf\xe9", b"1", pax={"hdrcharset": b"BINARY", "path": b"caf\xe9-binary"}),
        ]
    ],
    "modes": [
        [
            file("setuid", b"1", mode=0o4755),
            file("setgid", b"1", mode=0o2711),
            file("secret", b"1", mode=0o600),
            file("program", b"1", mode=0o700),
            file("none", b"1", mode=0),
            file("open", b"1", mode=0o666),
            directory("closed", mode=0o700),
            directory("tmp", mode=0o1777),
            directory("open dir", mode=0o777),
            directory("setgid dir", mode=0o2775),
            character_device("null", 1, 3),
            fifo("fifo"),
            file("attributes", b"1", pax={"SCHILY.xattr.user.kept": b"\0\n=\xff", "SCHILY.xattr.trusted.gone": b"x"}),
        ]
    ],
    "depth": [[file(DEEP, b"deep")]],
    "empty": [[]],
    "empty layers between": [[file("a", b"1")], [], [file("b", b"2")]],
    "numbers": [
        [
            file("pax time", b"1", pax={"mtime": b"1234567890.987"}),
            file("owner", b"1", uid=2**31 + 5, gid=99999999),
            file("zero", b"", mtime=0),
            file("pax size", b"content", size=0, pax={"size": b"7"}),
        ]
    ],
}


def expected_mode(mode: int) -> int:
    """The rule of docs/store.md, for what umoci unpacked."""
    if stat.S_ISLNK(mode):
        return 0
    bits = stat.S_IMODE(mode)
    if stat.S_ISDIR(mode):
        return (bits & 0o1777 if bits & stat.S_ISVTX else bits & 0o755) | 0o555
    return bits & 0o755 | 0o444 | (0o111 if bits & 0o111 else 0)


def facts_of(root: Path, *, normalise: bool) -> dict[bytes, tuple[object, ...]]:
    """Every name below a root with type, mode, times, content, and the names it is one file with."""
    facts: dict[bytes, tuple[object, ...]] = {}
    together: dict[int, set[bytes]] = {}
    found: list[tuple[bytes, os.stat_result, bytes]] = []

    def walk(directory: int, prefix: bytes) -> None:
        for name in os.listdir(directory):
            raw = os.fsencode(name)
            status = os.stat(raw, dir_fd=directory, follow_symlinks=False)
            path = prefix + raw
            content = b""
            if stat.S_ISLNK(status.st_mode):
                content = os.fsencode(os.readlink(raw, dir_fd=directory))
            elif stat.S_ISREG(status.st_mode):
                descriptor = os.open(raw, os.O_RDONLY, dir_fd=directory)
                with open(descriptor, "rb") as opened:
                    content = opened.read()
            found.append((path, status, content))
            if stat.S_ISDIR(status.st_mode):
                inner = os.open(raw, os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
                # Deeper than the kernel takes paths, and than descriptors last: one level at a time.
                try:
                    walk(inner, path + b"/")
                finally:
                    os.close(inner)

    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        walk(top, b"")
    finally:
        os.close(top)
    for path, status, _ in found:
        if stat.S_ISREG(status.st_mode):
            together.setdefault(status.st_ino, set()).add(path)
    for path, status, content in found:
        kind = stat.S_IFMT(status.st_mode)
        if normalise and kind not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
            continue
        mode = (
            expected_mode(status.st_mode) if normalise else 0 if kind == stat.S_IFLNK else stat.S_IMODE(status.st_mode)
        )
        when = int(status.st_mtime) if kind == stat.S_IFREG else 0
        facts[path] = (kind, oct(mode), when, content, frozenset(together.get(status.st_ino, ())))
    return facts


@as_root
@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_the_file_holds_what_umoci_unpacks(tmp_path: Path, site: Site, name: str, compression: Compression) -> None:
    stack = STACKS[name]
    layers = tuple(tar(*members) for members in stack)
    gzipped = Image(layers=layers)
    write_layout(tmp_path / "umoci", gzipped, ref="x")
    subprocess.run(
        ["umoci", "unpack", "--image", f"{tmp_path}/umoci:x", str(tmp_path / "bundle")], check=True, capture_output=True
    )
    image = dataclasses.replace(gzipped, compression=compression)
    result = pulled(f"oci:{write_layout(tmp_path / 'ours', image)}", site)
    ours = facts_of(unpacked(result, tmp_path / "tree"), normalise=False)
    theirs = facts_of(tmp_path / "bundle/rootfs", normalise=True)
    assert ours == theirs
    assert result.image.record.entries == len(ours) + 1


def test_what_conversion_changes_is_counted(tmp_path: Path, site: Site) -> None:
    image = Image(layers=tuple(tar(*members) for members in STACKS["modes"]))
    changed = pulled(f"oci:{write_layout(tmp_path / 'x', image)}", site).image.record.changed
    assert (changed.setuid_bits, changed.device_nodes, changed.xattrs) == (3, 2, 1)
    # setgid file, secret, program, none, closed; open, open dir, setgid dir.
    assert (changed.made_readable, changed.write_bits) == (5, 3)


@as_root
def test_only_user_attributes_are_kept(tmp_path: Path, site: Site) -> None:
    image = Image(layers=tuple(tar(*members) for members in STACKS["modes"]))
    tree = unpacked(pulled(f"oci:{write_layout(tmp_path / 'x', image)}", site), tmp_path / "tree")
    assert os.listxattr(tree / "attributes") == ["user.kept"]
    assert os.getxattr(tree / "attributes", "user.kept") == b"\0\n=\xff"
    assert all(entry.stat(follow_symlinks=False).st_uid == 0 for entry in os.scandir(tree))
