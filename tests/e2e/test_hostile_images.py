"""Images made to do harm: each is refused by a named error that leaves nothing, or is harmless once it is in the store;
in bounded time and memory, and whatever a layer's bytes are."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Literal

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpcctr.errors import ConversionFailed, HpcctrError, ImageBroken
from hpcctr.image.pull import pull
from hpcctr.image.reference import ImageRef
from hpcctr.image.store import Store
from hpcctr.site import Site
from tests.support.oci import (
    OCI_CONFIG,
    OCI_LAYER,
    OCI_MANIFEST,
    Image,
    Member,
    character_device,
    compress,
    descriptor,
    digest_of,
    directory,
    fifo,
    file,
    hardlink,
    member_bytes,
    number,
    opaque,
    symlink,
    tar,
    whiteout,
    write_files,
    write_layout,
)

MIB = 1 << 20


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(store=str(tmp_path / "store"))


def pulled(place: Path, site: Site, *layers: bytes) -> Path:
    """The image file."""
    layout = write_layout(place / "layout", Image(layers=layers), ref="x")
    return Path(pull(ImageRef.parse(f"oci:{layout}:x"), site=site).image.path)


def files_of(site: Site) -> list[str]:
    """All files of the store, wherever they lie and whatever their names, but for the notes of who pulled what."""
    top = Path(site.store)
    paths = [path for path in top.rglob("*") if not path.is_dir()]
    return [str(path) for path in paths if path.relative_to(top).parts[0] != "claims"]


def listing(image: Path) -> dict[str, str]:
    """Path → mode and owner as ls shows them, with the target of a link."""
    done = subprocess.run(["unsquashfs", "-lln", "-UTC", image], check=True, capture_output=True, text=True)
    found = {}
    for line in done.stdout.splitlines():
        mode, owner, *rest = line.split(None, 5)
        path, _, target = rest[-1].partition(" -> ")
        found[path.removeprefix("squashfs-root").lstrip("/")] = f"{mode} {owner} {target}".strip()
    return found


def content(image: Path, path: str) -> bytes:
    return subprocess.run(["unsquashfs", "-cat", image, path], check=True, capture_output=True).stdout


def raw(name: str, size_field: bytes, kind: bytes = b"0", after: bytes = b"") -> bytes:
    """An entry whose size field is any bytes, with the right checksum."""
    header = bytearray(member_bytes(Member(name=name.encode(), type=kind))[:512])
    header[124:136] = size_field.ljust(12, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + after


DEEP = "/".join(f"{count:05d}" for count in range(660))
SPARSE = {"GNU.sparse.major": b"1", "GNU.sparse.minor": b"0", "GNU.sparse.realsize": b"99999999999"}

REFUSED: dict[str, tuple[list[bytes], str]] = {
    "climbs": ([tar(file("../../etc/cron.d/x", b"evil"))], "'..'"),
    "climbs within": ([tar(directory("a"), file("a/../../x", b"evil"))], "'..'"),
    "climbs in a directory": ([tar(directory("a/.."))], "'..'"),
    "climbs by pax": ([tar(file("x", b"evil", pax={"path": b"../x"}))], "'..'"),
    "hard link out": ([tar(hardlink("x", "../../../etc/shadow"))], "'..'"),
    "hard link to nothing of its own": ([tar(hardlink("x", "/etc/shadow"))], "which is nothing"),
    "hard link through a link out": ([tar(symlink("e", "/etc"), hardlink("x", "e/shadow"))], "which is nothing"),
    "hard link to a directory": ([tar(directory("d"), hardlink("x", "d"))], "which is a directory"),
    "hard link to what is hidden": ([tar(file("a", b"1")), tar(whiteout("a"), hardlink("b", "a"))], "which is nothing"),
    "whiteout of .": ([tar(directory("d")), tar(file("d/.wh.."))], "whiteout of nothing"),
    "whiteout of ..": ([tar(directory("d")), tar(file("d/.wh..."))], "whiteout of nothing"),
    "whiteout of nothing": ([tar(directory("d")), tar(file("d/.wh."))], "whiteout of nothing"),
    "whiteout out": ([tar(directory("d")), tar(file("../.wh.etc"))], "'..'"),
    "path of 5000": ([tar(file("n/" * 2500 + "x"))], "too long"),
    "name of 256": ([tar(file("n" * 256))], "too long"),
    "path of 1 MiB": ([tar(file("n" * MIB, long_names="gnu"))], "1048576 are possible|too long"),
    "link to 1 MiB": ([tar(symlink("l", "n" * 70_000))], "symbolic link with a target"),
    "deep by links": (
        [tar(directory(DEEP), symlink("l", DEEP), symlink(f"{DEEP}/m", "/l"), file("l/" + "d/" * 300 + "x"))],
        "has a path of",
    ),
    "loop of links": ([tar(symlink("a", "b"), symlink("b", "a"), file("a/x"))], "loop"),
    "below a file": ([tar(file("a", b"1")), tar(file("a/b"))], "not a directory"),
    "below a device": ([tar(character_device("a", 1, 3), file("a/b"))], "not a directory"),
    "unknown type": ([tar(Member(name=b"x", type=b"V"))], "unknown tar type"),
    "old GNU sparse": ([tar(Member(name=b"x", type=b"S"))], "sparse"),
    "pax sparse": ([tar(file("x", b"1", pax=SPARSE))], "sparse"),
    "negative size": ([tar(file("x", size=-1))], "negative size"),
    "negative pax size": ([tar(file("x", pax={"size": b"-1"}))], "no file can have"),
    "huge pax size": ([tar(file("x", pax={"size": b"9" * 30}))], "invalid number"),
    "size of 2^62": ([tar(file("x", size=2**62))], "more than 1099511627776 bytes"),
    "size beyond 64 bits": ([raw("x", number(2**80, 12)) + bytes(1024)], "more than 1099511627776 bytes"),
    "base-256 of ones": ([raw("x", b"\xff" * 12) + bytes(1024)], "negative size"),
    "size that is no number": ([raw("x", b"0x10") + bytes(1024)], "no valid number"),
    "size with digits of no octal": ([raw("x", b"00000000888") + bytes(1024)], "no valid number"),
    "size beyond the end": ([raw("x", b"00000010000", after=b"short")], "cut off"),
    "a name header of 1 GiB": ([raw("x", number(1 << 30, 12), b"L")], "1048576 are possible"),
    "pax record that lies": ([tar(Member(name=b"p", type=b"x", content=b"999 path=x\n"), file("x"))], "invalid pax"),
    "pax record without end": ([tar(Member(name=b"p", type=b"x", content=b"12 path=x" + b"y" * 99), file("x"))], "pax"),
    "extensions of nothing": ([tar(Member(name=b"p", type=b"L", content=b"name\0"))], "cut off"),
    "cut in a header": ([tar(file("a", b"1"))[:300]], "cut off"),
    "cut in a content": ([tar(file("a", b"1" * 2000))[:1100]], "cut off"),
    "zero block amid": ([bytes(512) + tar(file("a"))], "zero block"),
    "garbage": ([random.Random(1).randbytes(100_000)], "no valid header|no valid number"),
    "text": ([b"<html>not found</html>" * 1000], "not a tar stream"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_by_name_and_leaves_nothing(tmp_path: Path, site: Site, case: str) -> None:
    layers, says = REFUSED[case]
    with pytest.raises(ImageBroken, match=says):
        pulled(tmp_path, site, *layers)
    assert files_of(site) == []


HARMLESS: dict[str, tuple[list[bytes], dict[str, str]]] = {
    "absolute names": ([tar(file("/etc/passwd", b"x"))], {"etc": "drwxr-xr-x 0/0", "etc/passwd": "-rw-r--r-- 0/0"}),
    "links lead anywhere and are followed inside": (
        [tar(symlink("e", "/etc"), symlink("u", "../../../../etc"), file("e/x", b"1"), file("u/y", b"2"))],
        {
            "e": "lrwxrwxrwx 0/0 /etc",
            "u": "lrwxrwxrwx 0/0 ../../../../etc",
            "etc": "drwxr-xr-x 0/0",
            "etc/x": "-rw-r--r-- 0/0",
            "etc/y": "-rw-r--r-- 0/0",
        },
    ),
    "setuid and everybody's": (
        [tar(file("su", b"x", mode=0o6777, uid=0), directory("d", mode=0o2777, uid=7), directory("t", mode=0o7777))],
        {"su": "-rwxr-xr-x 0/0", "d": "drwxr-xr-x 0/0", "t": "drwxrwxrwt 0/0"},
    ),
    "unreadable": (
        [tar(file("f", b"x", mode=0), directory("d", mode=0), file("d/f", b"x", mode=0o100))],
        {"f": "-r--r--r-- 0/0", "d": "dr-xr-xr-x 0/0", "d/f": "-r-xr-xr-x 0/0"},
    ),
    "device nodes": (
        [tar(character_device("mem", 1, 1), Member(name=b"sda", type=b"4", device=(8, 0)), fifo("p"))],
        {},
    ),
    "a device with two names": ([tar(character_device("mem", 1, 1), hardlink("x", "mem"))], {}),
    "attributes": (
        [tar(file("f", b"x", pax={"SCHILY.xattr.security.capability": b"\1\0\0\2", "SCHILY.acl.access": b"u::rwx"}))],
        {"f": "-rw-r--r-- 0/0"},
    ),
    "duplicates": ([tar(*(file("f", b"%d" % count) for count in range(50)))], {"f": "-rw-r--r-- 0/0"}),
    "file, directory, link": (
        [
            tar(file("p", b"1"), directory("q"), file("q/x", b"1"), symlink("r", "q")),
            tar(directory("p"), file("p/y", b"2"), symlink("q", "p"), directory("r"), file("r/z", b"2")),
            tar(symlink("p", "/"), file("q", b"3"), file("r", b"3")),
        ],
        {"p": "lrwxrwxrwx 0/0 /", "q": "-rw-r--r-- 0/0", "r": "-rw-r--r-- 0/0"},
    ),
    "nested opaque marks": (
        [
            tar(file("d/e/old", b"1"), file("d/old", b"1"), file("k/old", b"1")),
            tar(opaque("d/e"), opaque("d"), file("d/e/new", b"2"), opaque("d"), opaque("d/e"), opaque("none")),
            tar(opaque("d"), opaque("d"), directory("d/e"), opaque("d/e")),
        ],
        {"d": "drwxr-xr-x 0/0", "d/e": "drwxr-xr-x 0/0", "k": "drwxr-xr-x 0/0", "k/old": "-rw-r--r-- 0/0"},
    ),
    "whiteouts through links": (
        [tar(file("d/x", b"1"), symlink("l", "/d"), file("etc/x", b"1")), tar(whiteout("l/x"))],
        {"d": "drwxr-xr-x 0/0", "l": "lrwxrwxrwx 0/0 /d", "etc": "drwxr-xr-x 0/0", "etc/x": "-rw-r--r-- 0/0"},
    ),
    "a path of 4000": ([tar(file(DEEP + "/x", b"1"))], {DEEP: "drwxr-xr-x 0/0", DEEP + "/x": "-rw-r--r-- 0/0"}),
    "a directory with a size": (
        [raw("d", b"00000001000", b"5") + tar(file("x", b"1"))],
        {"d": "drwxr-xr-x 0/0", "x": "-rw-r--r-- 0/0"},
    ),
    "a size that swallows a header": ([tar(file("a", b"1" * 512, size=700), file("b"))], {"a": "-rw-r--r-- 0/0"}),
    "nothing at all": ([b""], {}),
    "only the end": ([bytes(1024)], {}),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_it_is_harmless_in_the_store(tmp_path: Path, site: Site, case: str) -> None:
    layers, expected = HARMLESS[case]
    found = listing(pulled(tmp_path, site, *layers))
    assert found.pop("").split()[1] == "0/0"
    if case == "a path of 4000":
        found = {path: line for path, line in found.items() if path.startswith(DEEP)}
    assert found == expected
    assert len(Store.open(site.store).digests()) == 1


# bombs and floods


def write_blob(place: Path, blob: bytes, diff_id: str, compression: str) -> str:
    """A layout with one layer that is only there in its compressed form; how it is referred to."""
    config = Image(layers=()).config_bytes().replace(b'"diff_ids": []', b'"diff_ids": ["%s"]' % diff_id.encode())
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "config": descriptor(config, OCI_CONFIG),
            "layers": [descriptor(blob, f"{OCI_LAYER}+{compression}")],
        }
    ).encode()
    index = {"schemaVersion": 2, "manifests": [descriptor(manifest, OCI_MANIFEST)]}
    files = {f"blobs/{digest_of(part).replace(':', '/')}": part for part in (config, manifest, blob)}
    write_files(place, {"index.json": json.dumps(index).encode(), "oci-layout": b"{}", **files})
    return f"oci:{place}"


def bomb(head: bytes, zeros: int, compression: str) -> tuple[bytes, str]:
    """A blob of ``head`` and so many MiB of zeros, and its diff id."""
    if compression == "gzip":
        blob = gzip.compress(head, 1) + gzip.compress(bytes(64 * MIB), 9) * (zeros // 64)
    else:
        stream = zstandard.ZstdCompressor(level=1).compressobj()
        blob = b"".join(stream.compress(piece) for piece in (head, *[bytes(64 * MIB)] * (zeros // 64))) + stream.flush()
    digest = hashlib.sha256(head)
    for _ in range(zeros // 64):
        digest.update(bytes(64 * MIB))
    return blob, f"sha256:{digest.hexdigest()}"


def measured(text: str, site: Site) -> dict[str, float]:
    """A pull in a process of its own: MiB of the puller, and of the largest process it had."""
    code = f"""
        import json, resource
        from hpcctr.image.pull import pull
        from hpcctr.image.reference import ImageRef
        from hpcctr.site import Site
        pull(ImageRef.parse({text!r}), site=Site(store={site.store!r}))
        # Not RUSAGE_SELF, which knows this process from before its exec (getrusage(2)).
        (ours,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")]
        theirs = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        print(json.dumps({{"puller": int(ours) / 1024, "converter": theirs / 1024}}))
    """
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    argv = [sys.executable, "-c", textwrap.dedent(code)]
    run = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=150)
    assert run.returncode == 0, run.stderr
    return dict(json.loads(run.stdout))


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_4_gib_of_zeros_in_4_mib_are_a_small_file_and_little_memory(
    tmp_path: Path, site: Site, compression: str
) -> None:
    blob, diff_id = bomb(member_bytes(file("zeros", size=4096 * MIB)), 4096, compression)
    assert len(blob) < 5 * MIB
    used = measured(write_blob(tmp_path / "layout", blob, diff_id, compression), site)
    assert used["puller"] < 100
    assert used["converter"] < 150
    (image,) = [path for path in files_of(site) if path.endswith(".squashfs")]
    assert os.stat(image).st_size < 2 * MIB


def test_zeros_after_the_end_cost_time_and_nothing_else(tmp_path: Path, site: Site) -> None:
    blob, diff_id = bomb(tar(file("a", b"1")), 1024, "zstd")
    assert measured(write_blob(tmp_path / "layout", blob, diff_id, "zstd"), site)["converter"] < 150


def test_a_hundred_thousand_entries_need_little_memory(tmp_path: Path, site: Site) -> None:
    layer = tar(*(file(f"d{count // 500}/file{count}", b"x" * (count % 2)) for count in range(100_000)))
    layout = write_layout(tmp_path / "layout", Image(layers=(layer,)), ref="x")
    used = measured(f"oci:{layout}:x", site)
    assert used["puller"] < 100
    assert used["converter"] < 100


def test_marks_without_end_do_not_take_for_ever(tmp_path: Path, site: Site) -> None:
    """Each opaque mark hides what is below, and might look at all of it."""
    lower = tar(*(file(f"d/f{count}") for count in range(20_000)))
    upper = tar(*(file(f"d/f{count}") for count in range(20_000)), *[opaque("d"), opaque(""), whiteout("d")] * 10_000)
    assert len(listing(pulled(tmp_path, site, lower, upper))) == 20_002


def test_links_to_links_do_not_take_for_ever(tmp_path: Path, site: Site) -> None:
    links = [symlink("l0", "./" * 2000 + "d")]
    links += [symlink(f"l{count}", "./" * 2000 + f"l{count - 1}") for count in range(1, 250)]
    with pytest.raises(ImageBroken, match="more steps"):
        pulled(tmp_path, site, tar(*links, *(file(f"l249/e{count}/x") for count in range(1000))))
    assert files_of(site) == []


def test_attributes_without_end_are_refused_or_carried(tmp_path: Path, site: Site) -> None:
    many = {f"SCHILY.xattr.user.{count}": b"v" for count in range(2000)}
    large = {"SCHILY.xattr.user.large": b"v" * 65_000}
    try:
        image = pulled(tmp_path, site, tar(file("many", b"x", pax=many), file("large", b"x", pax=large)))
    except ConversionFailed as error:
        assert "tar2sqfs" in error.message
        assert files_of(site) == []
    else:
        assert listing(image).keys() == {"", "many", "large"}


# whatever the bytes are

VALID = tar(
    directory("etc"),
    file("etc/passwd", b"root:x:0:0::/:/bin/sh\n"),
    file("n" * 99 + "/" + "m" * 99, b"1" * 3000),
    symlink("l", "/etc"),
    hardlink("h", "etc/passwd"),
    file("x", b"2" * 700, pax={"SCHILY.xattr.user.a": b"b", "mtime": b"1.5"}),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["gzip", "zstd", "none"]),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(min_size=1, max_size=30)), min_size=1, max_size=5),
    st.one_of(st.none(), st.integers(0, 1 << 16)),
)
def test_whatever_the_bytes_are_there_is_an_image_or_an_error(
    tmp_path: Path,
    how: Literal["gzip", "zstd", "none"],
    is_blob: bool,
    changes: list[tuple[int, bytes]],
    cut: int | None,
) -> None:
    """Changed before it was compressed, or afterwards; the digests agree with what came of it."""

    def spoiled(content: bytes) -> bytes:
        for at, new in changes:
            at %= len(content)
            content = content[:at] + new + content[at + len(new) :]
        return content[: cut % len(content)] if cut is not None else content

    blob = spoiled(compress(VALID, how)) if is_blob else compress(spoiled(VALID), how)
    with tempfile.TemporaryDirectory(dir=tmp_path) as place:
        site = Site(store=f"{place}/store")
        diff_id = digest_of(VALID if is_blob and how != "none" else blob if how == "none" else spoiled(VALID))
        text = write_blob(Path(place, "layout"), blob, diff_id, "gzip")
        try:
            image = pull(ImageRef.parse(text), site=site).image
        except HpcctrError as error:
            assert type(error) in (ImageBroken, ConversionFailed)
            assert "converter" not in error.message
            assert files_of(site) == []
        else:
            assert subprocess.run(["unsquashfs", "-lln", image.path], capture_output=True).returncode == 0
