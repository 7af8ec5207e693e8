from __future__ import annotations

import random
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcctr.host import ldcache
from hpcctr.host.edits import CacheEntry
from hpcctr.host.elf import read
from hpcctr.host.ldcache import HostCache, listed, merged
from tests.support import elfs

HERE = read(shutil.which("true") or "/bin/true")
FLAGS = ldcache.flags_of(HERE) or 0
#: Prints for every name what ld.so takes for it.
ASK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <stdio.h>
int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        void *handle = dlopen(argv[i], RTLD_LAZY);
        struct link_map *map;
        if (handle && !dlinfo(handle, RTLD_DI_LINKMAP, &map)) printf("%s %s\\n", argv[i], map->l_name);
        else printf("%s -\\n", argv[i]);
        if (handle) dlclose(handle);
    }
    return 0;
}
"""


def entry(soname: str, path: str = "", flags: int = FLAGS) -> CacheEntry:
    return CacheEntry(soname=soname, path=path or f"/host/{soname}", flags=flags, origin="test")


class Root:
    """A root directory with this machine's glibc, and nothing else: what an image is to a loader."""

    def __init__(self, path: Path) -> None:
        self.path = path
        loader = Path(HERE.interpreter)
        ask = elfs.program(path / "ask", ASK)
        libc = next(Path("/lib").glob("*-linux-gnu/libc.so.6"))
        for source, target in ((loader, loader), (libc, Path("/lib/libc.so.6"))):
            self.within(target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source.resolve(), self.within(target))
        assert ask.exists()
        self.within("/etc").mkdir()
        self.within("/etc/ld.so.conf").write_text("/opt/image\n")

    def within(self, path: str | Path) -> Path:
        return self.path / str(path).lstrip("/")

    def library(self, path: str, soname: str = "") -> Path:
        place = self.within(path)
        return elfs.library(place, soname=soname or place.name)

    def ldconfig(self, *options: str) -> bytes:
        """The cache that the image's own ldconfig writes."""
        command = ["/sbin/ldconfig", "-X", *options, "-r", str(self.path)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        return self.within("/etc/ld.so.cache").read_bytes()

    def taken(self, cache: bytes, names: Sequence[str]) -> dict[str, str]:
        """What ld.so of the root takes for every name; ``-``: nothing."""
        self.within("/etc/ld.so.cache").write_bytes(cache)
        command = ["chroot", str(self.path), "/ask", *names]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        pairs = (line.partition(" ") for line in done.stdout.splitlines())
        return {name: path for name, _, path in pairs}


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path / "root")


FORMATS = ["new", "compat", "old"]


@pytest.mark.root
@pytest.mark.parametrize("form", FORMATS)
def test_ld_so_takes_the_nodes_library_first_and_the_images_own_still(root: Root, form: str) -> None:
    names = ["libz.so.1", "libz.so.9", "libz.so.10", "libz.so.1.2", "libzz.so", "lib9.so.1", "lib10.so.1", "liba-2.so"]
    for name in names:
        root.library(f"/opt/image/{name}")
    for name in ("libz.so.1", "libnew.so.1", "lib10.so.1"):
        root.library(f"/.hpcctr-host/lib/{name}")
    image = root.ldconfig("-c", form)
    own = root.taken(image, names)
    assert own == {name: f"/opt/image/{name}" for name in names}
    ours = [entry(name, f"/.hpcctr-host/lib/{name}") for name in ("libz.so.1", "libnew.so.1", "lib10.so.1")]
    found = root.taken(merged(image, ours), [*names, "libnew.so.1", "libabsent.so.1"])
    assert found == own | {one.soname: one.path for one in ours} | {"libabsent.so.1": "-"}


@pytest.mark.root
def test_an_image_without_a_cache_gets_one(root: Root) -> None:
    root.library("/.hpcctr-host/lib/libnew.so.1")
    cache = merged(b"", [entry("libnew.so.1", "/.hpcctr-host/lib/libnew.so.1")])
    assert root.taken(cache, ["libnew.so.1", "libc.so.6"]) == {
        "libnew.so.1": "/.hpcctr-host/lib/libnew.so.1",
        "libc.so.6": "/lib/libc.so.6",
    }


@pytest.mark.root
@pytest.mark.skipif(HERE.machine != "x86_64", reason="names levels of x86-64")
def test_variants_for_a_processors_level_stay_and_the_nodes_comes_before_them(root: Root) -> None:
    for name in ("libmath.so.3", "libdriver.so.1"):
        root.library(f"/opt/image/{name}")
        root.library(f"/opt/image/glibc-hwcaps/x86-64-v2/{name}")
    root.library("/.hpcctr-host/lib/libdriver.so.1")
    image = root.ldconfig()
    level = "/opt/image/glibc-hwcaps/x86-64-v2"
    assert root.taken(image, ["libmath.so.3"]) == {"libmath.so.3": f"{level}/libmath.so.3"}
    cache = merged(image, [entry("libdriver.so.1", "/.hpcctr-host/lib/libdriver.so.1")])
    assert root.taken(cache, ["libmath.so.3", "libdriver.so.1"]) == {
        "libmath.so.3": f"{level}/libmath.so.3",
        "libdriver.so.1": "/.hpcctr-host/lib/libdriver.so.1",
    }


@pytest.mark.root
@pytest.mark.parametrize("far", [(), ("3000000000",), ("1500000000", "2900000000")])
def test_ld_so_finds_every_one_of_many_odd_names(root: Root, far: tuple[str, ...]) -> None:
    """The order of entries is the loader's binary search: one that is wrong hides others. It counts in 32 bits, and of
    numbers that are too far apart only the near ones are left.
    """
    chance = random.Random(20240617)
    parts = ["lib", "a", "b", "x10", "9", "10", "09", "-", ".so", ".", "_", "+", "A", "Z", "z", "~", "1"]
    made = {"".join(chance.choice(parts) for _ in range(chance.randint(1, 7))) for _ in range(400)}
    made |= {f"lib{chance.choice(['', 'a', 'x10.'])}{number}.so.{last}" for number in far for last in range(9)}
    # Of names that differ in zeros before a number the loader takes either: they are one to it.
    names = sorted({tuple(map(str, ldcache._order(name.encode()))): name for name in made - {".", ".."}}.values())
    assert len(names) > 200
    first = root.library("/host/first")
    for name in names:
        root.within(f"/host/{name}").hardlink_to(first)
    found = root.taken(merged(b"", [entry(name) for name in names]), names)
    left = [name for name in names if len(far) < 2 or not any(number in name for number in far)]
    assert {name: path for name, path in found.items() if path != "-"} == {name: f"/host/{name}" for name in left}


@pytest.mark.root
@pytest.mark.parametrize("form", FORMATS)
def test_ldconfig_lists_what_was_merged(root: Root, form: str) -> None:
    for name in ("libone.so.1", "libtwo.so.2"):
        root.library(f"/opt/image/{name}")
    image = root.ldconfig("-c", form)
    cache = root.path / "merged"
    cache.write_bytes(merged(image, [entry("libtwo.so.2"), entry("libthree.so.3")]))
    done = subprocess.run(["/sbin/ldconfig", "-p", "-C", cache], check=True, capture_output=True, text=True, timeout=60)
    paths = [line.rpartition(" ")[2] for line in done.stdout.splitlines() if "=>" in line and "libc.so" not in line]
    assert paths == ["/host/libtwo.so.2", "/opt/image/libtwo.so.2", "/host/libthree.so.3", "/opt/image/libone.so.1"]


def test_merging_nothing_keeps_order_and_entries_of_this_machines_own_cache() -> None:
    own = Path(ldcache.PATH).read_bytes()
    assert ldcache._read(merged(own, [])) == ldcache._read(own)
    assert len(listed(own)) > 50


def test_the_cache_of_this_machine_names_what_ldconfig_names() -> None:
    done = subprocess.run(["/sbin/ldconfig", "-p"], check=True, capture_output=True, text=True, timeout=60)
    host = HostCache.load()
    found = dict(host.matching("libc.so.*"))
    assert (
        set(found) == {"libc.so.6"}
        and "libc.so.6 (libc6" in done.stdout
        and f"=> {found['libc.so.6']}\n" in done.stdout
    )
    assert host.find("libc.so.6") == found["libc.so.6"] and host.find("libabsent.so.1") is None
    assert host.find("libc.so.6", "s390x") is None


def test_a_node_without_a_cache_finds_nothing(tmp_path: Path) -> None:
    assert HostCache.load(str(tmp_path / "none")).matching("*") == ()
    broken = tmp_path / "broken"
    broken.write_bytes(b"glibc-ld.so.cache1.1" + b"\xff" * 100)
    assert HostCache.load(str(broken)).matching("*") == ()


def test_a_cache_that_changes_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    path.write_bytes(merged(b"", [entry("libone.so.1")]))
    assert HostCache.load(str(path)).find("libone.so.1") and HostCache.load(str(path)) is HostCache.load(str(path))
    new = tmp_path / "new"
    new.write_bytes(merged(b"", [entry("libtwo.so.1")]))
    new.rename(path)
    assert not HostCache.load(str(path)).find("libone.so.1") and HostCache.load(str(path)).find("libtwo.so.1")


def test_libraries_of_two_processors_stay_apart() -> None:
    cache = merged(
        b"", [entry("libx.so.1", "/lib32/libx.so.1", 0x0003), entry("libx.so.1", "/lib64/libx.so.1", 0x0303)]
    )
    assert [(one.path, one.flags) for one in listed(cache)] == [("/lib32/libx.so.1", 3), ("/lib64/libx.so.1", 0x303)]


@pytest.mark.parametrize(
    ("soname", "path"),
    [
        ("", "/x"),
        ("a/b", "/x"),
        ("libx\n.so", "/x"),
        ("lib\xe9.so", "/x"),
        ("x" * 256, "/x"),
        ("libx.so", "rel/libx.so"),
    ],
)
def test_what_no_loader_finds_is_not_written(soname: str, path: str) -> None:
    assert listed(merged(b"", [entry(soname, path)])) == ()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_hostile_cache_leaves_the_nodes_entries(data: st.DataObject) -> None:
    good = merged(b"", [entry(f"lib{number}.so.{number}") for number in range(20)])
    raw = bytearray(data.draw(st.sampled_from([good, b"ld.so-1.7.0\0" + struct.pack("=I", 0) + good, b""])))
    raw += data.draw(st.binary(max_size=40))
    for _ in range(data.draw(st.integers(0, 5))):
        at = data.draw(st.integers(0, max(0, len(raw) - 1)))
        raw[at : at + 4] = data.draw(st.binary(min_size=4, max_size=4))
    ours = [entry("libcuda.so.1", "/.hpcctr-host/lib/libcuda.so.1")]
    found = listed(merged(bytes(raw), ours))
    assert [one.path for one in found if one.soname == "libcuda.so.1"][0] == "/.hpcctr-host/lib/libcuda.so.1"
    orders = [ldcache._order(one.soname.encode()) for one in found]
    assert orders == sorted(orders, reverse=True)
    assert all(one.path.startswith("/") and "\0" not in one.path for one in found)


def test_a_cache_with_more_than_any_machine_has_counts_as_empty() -> None:
    huge = b"glibc-ld.so.cache1.1" + struct.pack("=IIIIIII", 700_000, 0, 0, 0, 0, 0, 0) + b"\0" * 24 * 700_000
    assert listed(merged(huge, [entry("libx.so.1")]))[0].soname == "libx.so.1"
    assert len(merged(huge, [])) < 200
