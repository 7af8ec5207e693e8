"""Trees of images with libraries, merged as a conversion merges them, and what is noted of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from hpcctr.image.layers import LayerMerge
from hpcctr.image.record import ImageFacts
from hpcctr.image.treestream import write_tree
from tests.support import elfs
from tests.support.oci import Member, directory, file, symlink, tar


@cache
def library(soname: str, *defines: str, body: str = "") -> bytes:
    """The bytes of a shared library."""
    with TemporaryDirectory() as place:
        return elfs.library(Path(place) / "lib", soname=soname, defines=defines, body=body).read_bytes()


def needing(soname: str, *needed: str, body: str = "") -> bytes:
    """The bytes of a library that is linked to others."""
    with TemporaryDirectory() as place:
        needs = {elfs.library(Path(place) / name, soname=name): () for name in needed}
        return elfs.library(Path(place) / "lib", soname=soname, needs=needs, body=body).read_bytes()


def holding(soname: str, *texts: str, needed: tuple[str, ...] = ()) -> bytes:
    """A library that has some texts among its data, each alone between zero bytes, and a function MPI_Init."""
    body = "int MPI_Init(void) { return 0; }\n"
    body += "".join(f'const char text{number}[] = "\\0" "{text}";\n' for number, text in enumerate(texts))
    return needing(soname, *needed, body=body)


def glibc(*versions: str) -> bytes:
    """A libc.so.6 that defines these."""
    return library("libc.so.6", *(versions or ("GLIBC_2.2.5", "GLIBC_2.36", "GLIBC_PRIVATE")))


def debian(*more: Member) -> list[Member]:
    """The members of a layer with a libc and its loader as Debian has them, and more."""
    lib = "usr/lib/x86_64-linux-gnu"
    return [
        directory("usr/lib"),
        directory(lib),
        symlink("lib", "usr/lib"),
        symlink("lib64", "usr/lib64"),
        file(f"{lib}/libc.so.6", glibc()),
        file(f"{lib}/ld-linux-x86-64.so.2", library("ld-linux-x86-64.so.2", "GLIBC_2.36")),
        directory("usr/lib64"),
        symlink("usr/lib64/ld-linux-x86-64.so.2", "/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"),
        *more,
    ]


def facts_of_layers(*layers: bytes, chunk: int = 10_000) -> ImageFacts:
    """What a conversion of these layers notes; what it writes is what it would have written anyway."""
    merge = LayerMerge()
    for number, layer in enumerate(layers):
        merge.apply(iter([layer]), f"layer {number + 1}")

    def again(number: int) -> Iterator[bytes]:
        return (layers[number][at : at + chunk] for at in range(0, len(layers[number]), chunk))

    found = write_tree(merge.tree, len(layers), again, lambda _: None, lambda done, total: None).facts
    assert found is not None
    return found


def facts_of_members(*layers: list[Member]) -> ImageFacts:
    """The same, of the members of each layer."""
    return facts_of_layers(*(tar(*members) for members in layers))
