"""Mount points and files of the upper layer, over plain directories."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hpcctr.engine.upper import UpperLayer, outermost
from hpcctr.errors import TargetImpossible
from hpcctr.host.edits import HostEdits, LinkEdit, MountEdit
from hpcctr.request import Target
from hpcctr.spec.mounts import BindMount

ANCHOR = "/.hpcctr-anchor"


@dataclass(kw_only=True)
class Layers:
    """An image tree and the upper layer made over it."""

    image: Path
    upper: Path
    layer: UpperLayer

    def make(
        self, *targets: Target, etc: dict[str, bytes] | None = None, edits: HostEdits | None = None
    ) -> tuple[BindMount, ...]:
        return self.layer.make(
            targets=targets, etc=etc or {}, anchor=ANCHOR, edits=edits or HostEdits(), image_name="test"
        )

    def made(self) -> set[str]:
        """Everything in the upper layer, directories with a slash at the end."""
        return {
            str(path.relative_to(self.upper)) + ("/" if path.is_dir() else "") for path in self.upper.rglob("*")
        } - {".hpcctr-anchor", "proc/", "sys/", "dev/", "etc/"}


@pytest.fixture
def layers(tmp_path: Path) -> Iterator[Layers]:
    image, upper = tmp_path / "image", tmp_path / "upper"
    for path in ("usr/share", "etc/ssl", "home", "opt/deep/er"):
        (image / path).mkdir(parents=True)
    (image / "home").chmod(0o711)
    (image / "opt").chmod(0o1777)
    (image / "opt/deep").chmod(0o6755)
    (image / "usr/file").write_text("of the image")
    (image / "link").symlink_to("/usr")
    (image / "outside").symlink_to("../../../../../../tmp")
    upper.mkdir()
    descriptors = [os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (image, upper)]
    yield Layers(image=image, upper=upper, layer=UpperLayer(image=descriptors[0], upper=descriptors[1]))
    for descriptor in descriptors:
        os.close(descriptor)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_an_image_without_anything_gets_the_nodes_trees_and_an_etc(layers: Layers) -> None:
    for path in list(layers.image.iterdir()):
        os.rename(path, layers.image.parent / f"gone-{path.name}")
    layers.make(etc={"passwd": b"root\n"})
    assert sorted(path.name for path in layers.upper.iterdir()) == [".hpcctr-anchor", "dev", "etc", "proc", "sys"]
    assert (layers.upper / "etc/passwd").read_bytes() == b"root\n"
    assert _mode(layers.upper / "etc/passwd") == 0o644


def test_the_anchor_can_be_executed_but_never_run(layers: Layers) -> None:
    layers.make()
    anchor = layers.upper / ANCHOR[1:]
    assert (_mode(anchor), anchor.read_bytes()) == (0o755, b"")


def test_what_the_image_has_needs_no_mount_point(layers: Layers) -> None:
    layers.make(Target("d", b"/usr/share"), Target("f", b"/usr/file"), Target("d", b"/opt/deep/er"))
    assert layers.made() == set()


def test_what_is_missing_is_made_with_its_parents(layers: Layers) -> None:
    layers.make(Target("d", b"/scratch/a/b"), Target("f", b"/scratch/c/file"))
    assert layers.made() == {"scratch/", "scratch/a/", "scratch/a/b/", "scratch/c/", "scratch/c/file"}
    assert _mode(layers.upper / "scratch/a") == 0o755
    assert _mode(layers.upper / "scratch/c/file") == 0o644


def test_parents_the_image_has_keep_its_modes_without_set_id_bits(layers: Layers) -> None:
    layers.make(Target("d", b"/home/u"), Target("d", b"/opt/deep/x"))
    assert layers.made() == {"home/", "home/u/", "opt/", "opt/deep/", "opt/deep/x/"}
    assert _mode(layers.upper / "home") == 0o711
    assert _mode(layers.upper / "opt") == 0o1777
    assert _mode(layers.upper / "opt/deep") == 0o755


def test_modes_do_not_depend_on_the_engines_umask(layers: Layers) -> None:
    before = os.umask(0o077)
    try:
        layers.make(Target("d", b"/a/b"), Target("f", b"/a/f"), etc={"hosts": b""})
    finally:
        os.umask(before)
    assert [_mode(layers.upper / path) for path in ("a", "a/b", "a/f", "etc", "etc/hosts")] == [
        0o755,
        0o755,
        0o644,
        0o755,
        0o644,
    ]


def test_a_second_target_finds_what_the_first_one_made(layers: Layers) -> None:
    layers.make(Target("d", b"/home/u"), Target("d", b"/home/v"), Target("f", b"/home/w/f"))
    assert layers.made() == {"home/", "home/u/", "home/v/", "home/w/", "home/w/f"}


def test_generated_files_hide_the_images_and_can_be_targets(layers: Layers) -> None:
    (layers.image / "etc/passwd").symlink_to("/proc/1/environ")
    (layers.image / "etc/hosts").mkdir()
    layers.make(
        Target("f", b"/etc/passwd"),
        Target("d", b"/etc/ssl"),
        Target("d", b"/etc/x"),
        etc={"passwd": b"p", "hosts": b"h"},
    )
    assert layers.made() == {"etc/passwd", "etc/hosts", "etc/x/"}
    assert not (layers.upper / "etc/passwd").is_symlink()


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (Target("d", b"/link"), "link is a symbolic link in the image"),
        (Target("d", b"/link/share"), "link is a symbolic link in the image"),
        (Target("d", b"/outside/x"), "outside is a symbolic link in the image"),
        (Target("d", b"/usr/file"), "it is a file in the image, where a directory is to be mounted"),
        (Target("f", b"/usr/share"), "it is a directory in the image, where a file is to be mounted"),
        (Target("d", b"/usr/file/below"), "/usr/file is a file in the image"),
        (Target("d", b"/etc/passwd"), "it is a file in the image, where a directory is to be mounted"),
        (Target("d", b"/etc/passwd/x"), "/etc/passwd is a file in the image"),
        (Target("d", b"/.hpcctr-anchor/x"), "/.hpcctr-anchor is a file in the image"),
        (Target("d", b"/x" * 65), "it is more than 64 directories deep"),
    ],
)
def test_a_target_the_image_does_not_allow_names_path_reason_and_remedy(
    layers: Layers, target: Target, reason: str
) -> None:
    with pytest.raises(TargetImpossible) as raised:
        layers.make(target, etc={"passwd": b""})
    assert raised.value.message.startswith(f"mount target {target.path.decode()}: ")
    assert reason in raised.value.message
    assert raised.value.hint


def test_the_remedy_of_a_link_is_the_place_it_leads_to(layers: Layers) -> None:
    with pytest.raises(TargetImpossible) as raised:
        layers.make(Target("d", b"/link"))
    assert raised.value.hint == "name the place it leads to, /usr"


@pytest.mark.parametrize("name", ["proc", "sys", "dev", "etc"])
def test_an_image_whose_own_tree_is_a_link_is_refused(layers: Layers, name: str) -> None:
    if (layers.image / name).exists():
        os.rename(layers.image / name, layers.image / f"{name}.real")
    (layers.image / name).symlink_to("/usr")
    with pytest.raises(TargetImpossible, match=f"mount target /{name}: {name} is a symbolic link"):
        layers.make()


def test_names_of_others_are_shown_printable(layers: Layers) -> None:
    (layers.image / "li\nnk\x1b").symlink_to("/a\x1b[31m")
    with pytest.raises(TargetImpossible) as raised:
        layers.make(Target("d", b"/li\nnk\x1b/x"))
    assert raised.value.message.isprintable()
    assert raised.value.hint.isprintable()


def test_nothing_is_ever_written_outside_the_upper_layer(layers: Layers) -> None:
    def image_state() -> list[tuple[str, int, int]]:
        return sorted((str(path), path.lstat().st_mode, path.lstat().st_mtime_ns) for path in layers.image.rglob("*"))

    before = image_state()
    layers.make(Target("d", b"/home/u"), Target("f", b"/opt/deep/er/f"), etc={"passwd": b"x"})
    assert image_state() == before


def test_no_descriptor_stays_open_whatever_happens(layers: Layers) -> None:
    before = os.listdir("/proc/self/fd")
    layers.make(Target("d", b"/home/u/v"), etc={"passwd": b""})
    for path in (b"/link/x", b"/usr/file/x", b"/usr/file"):
        with pytest.raises(TargetImpossible):
            layers.layer._make_point(Target("d", path))
    assert os.listdir("/proc/self/fd") == before


def test_targets_below_another_target_are_left_to_the_callers_directory() -> None:
    targets = tuple(Target("d", path) for path in (b"/a", b"/a/b", b"/a/b/c", b"/ab", b"/b/c", b"/b/c/d"))
    assert [target.path for target in outermost(targets)] == [b"/a", b"/ab", b"/b/c"]


def test_a_callers_mount_point_in_a_directory_of_the_hosts_is_left_to_enter(layers: Layers) -> None:
    edits = HostEdits(mounts=(MountEdit(source="/usr/lib", target="/opt/x", kind="d", origin="profile"),))
    binds = layers.make(Target("d", b"/opt/x/sub"), Target("d", b"/opt/y"), edits=edits)
    assert [bind.target for bind in binds] == ["/opt/x"]
    assert layers.made() == {"opt/", "opt/x/", "opt/y/"}


def test_a_callers_mount_point_on_a_directory_of_the_hosts_is_the_callers(layers: Layers) -> None:
    edits = HostEdits(mounts=(MountEdit(source="/usr/lib", target="/opt/x", kind="d", origin="profile"),))
    assert layers.make(Target("d", b"/opt/x"), edits=edits) == ()
    assert layers.made() == {"opt/", "opt/x/"}


def test_a_callers_mount_point_through_a_link_of_a_features_is_refused(layers: Layers) -> None:
    edits = HostEdits(links=(LinkEdit(path="/opt/cuda", target="/usr", origin="profile"),))
    with pytest.raises(TargetImpossible, match="cuda is a symbolic link that a feature of the node has put there"):
        layers.make(Target("d", b"/opt/cuda/share"), edits=edits)


def test_a_callers_mount_point_in_the_place_of_a_features_link_is_the_callers(layers: Layers) -> None:
    edits = HostEdits(links=(LinkEdit(path="/opt/cuda", target="/usr", origin="profile"),))
    layers.make(Target("d", b"/opt/cuda"), edits=edits)
    assert layers.made() == {"opt/", "opt/cuda/"}
