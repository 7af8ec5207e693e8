"""Platforms: spellings, and which images a node can run."""

from __future__ import annotations

import pytest

from hpcctr.errors import UsageWrong
from hpcctr.image import platform as platforms
from hpcctr.image.record import Platform


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("amd64", "linux/amd64"),
        ("linux/x86_64", "linux/amd64"),
        ("linux/amd64/v1", "linux/amd64"),
        ("linux/amd64/v3", "linux/amd64/v3"),
        ("aarch64", "linux/arm64"),
        ("linux/arm64/v8", "linux/arm64"),
        ("linux/arm64/8", "linux/arm64"),
        ("linux/arm/v7", "linux/arm"),
        ("linux/arm/v6", "linux/arm/v6"),
        ("Linux/PPC64LE", "linux/ppc64le"),
    ],
)
def test_spellings_of_a_platform_are_one(text: str, normal: str) -> None:
    assert str(platforms.parse(text)) == normal


@pytest.mark.parametrize("text", ["", "windows/amd64", "linux/", "a/b/c/d", "linux/../x", "linux/a b"])
def test_what_is_no_platform_of_linux_is_refused(text: str) -> None:
    with pytest.raises(UsageWrong):
        platforms.parse(text)


@pytest.mark.parametrize(
    ("wanted", "acceptable"),
    [
        ("amd64", ["linux/amd64"]),
        ("linux/amd64/v3", ["linux/amd64/v3", "linux/amd64/v2", "linux/amd64"]),
        ("arm64", ["linux/arm64"]),
        ("linux/arm64/v9", ["linux/arm64/v9", "linux/arm64"]),
        ("linux/arm", ["linux/arm", "linux/arm/v6", "linux/arm/v5"]),
        ("riscv64", ["linux/riscv64"]),
        ("linux/riscv64/rva23u64", ["linux/riscv64/rva23u64", "linux/riscv64"]),
    ],
)
def test_a_processor_runs_what_asks_for_less(wanted: str, acceptable: list[str]) -> None:
    assert [str(platform) for platform in platforms.acceptable(platforms.parse(wanted))] == acceptable


def test_the_word_in_file_names_says_everything() -> None:
    for text in ("amd64", "linux/arm/v6", "linux/amd64/v3"):
        platform = platforms.parse(text)
        word = platforms.file_word(platform)
        assert "." not in word
        assert platforms.of_file_word(word) == platform


def test_this_node_has_a_platform() -> None:
    assert platforms.is_usable(platforms.of_this_node())


@pytest.mark.parametrize(
    "platform",
    [
        Platform(os="windows", architecture="amd64"),
        Platform(os="linux", architecture=""),
        Platform(os="linux", architecture="../x"),
        Platform(os="linux", architecture="amd64", variant="a.b"),
    ],
)
def test_an_images_claim_that_is_no_platform_is_not_usable(platform: Platform) -> None:
    assert not platforms.is_usable(platform)
