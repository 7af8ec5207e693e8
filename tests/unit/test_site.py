"""The site file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcctr.errors import PolicyUnusable, SiteFileWrong
from hpcctr.site import Site


def _written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "site.toml"
    path.write_text(text)
    path.chmod(0o644)
    return str(path)


def test_every_key_has_a_default(tmp_path: Path) -> None:
    assert Site.load(_written(tmp_path, "")) == Site()


def test_keys_are_read(tmp_path: Path) -> None:
    site = Site.load(
        _written(
            tmp_path,
            'store = "/s"\nlinger-seconds = 3\ncarry = ["/scratch"]\n[containerd]\nsocket = "/c"\n'
            '[registry."r:5000"]\nplain-http = true\n[env]\nA = "b"\n',
        )
    )
    assert (site.store, site.linger_seconds, site.carry, site.containerd.socket) == ("/s", 3.0, ("/scratch",), "/c")
    assert site.registry["r:5000"].plain_http
    assert site.env == {"A": "b"}


@pytest.mark.parametrize(
    "text",
    [
        "store = 3",
        "stoer = '/x'",
        "store = 'relative'",
        "carry = ['/a/../b']",
        "carry = ['/']",
        "x = [",
        "\xff\xfe",
        "runtime = 'sh'",
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str) -> None:
    path = _written(tmp_path, "")
    Path(path).write_bytes(text.encode("latin-1"))
    with pytest.raises(SiteFileWrong, match="site.toml"):
        Site.load(path)


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(SiteFileWrong, match="no such file"):
        Site.load(str(tmp_path / "none.toml"))


@pytest.mark.root
@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_file_others_can_write_is_not_roots_word(tmp_path: Path, mode: int) -> None:
    path = _written(tmp_path, "")
    Path(path).chmod(mode)
    with pytest.raises(PolicyUnusable, match="only root"):
        Site.load(path, root_owned=True)


@pytest.mark.root
def test_a_file_of_another_owner_or_a_link_or_a_fifo_is_not_roots_word(tmp_path: Path) -> None:
    path = _written(tmp_path, "")
    os.chown(path, 1234, 0)
    with pytest.raises(PolicyUnusable):
        Site.load(path, root_owned=True)
    (tmp_path / "link").symlink_to(_written(tmp_path, ""))
    with pytest.raises(SiteFileWrong):
        Site.load(str(tmp_path / "link"), root_owned=True)
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(PolicyUnusable):
        Site.load(str(tmp_path / "fifo"), root_owned=True)
