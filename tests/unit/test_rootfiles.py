"""The way to a file of root's; reading such files is proved where they mean something: policy and profiles."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcctr.errors import PolicyUnusable
from hpcctr.rootfiles import require_only_roots_way

pytestmark = pytest.mark.root


def test_links_of_roots_lead_on_and_links_of_others_do_not(tmp_path: Path) -> None:
    real = tmp_path / "real/policy.d"
    real.mkdir(parents=True)
    (tmp_path / "link").symlink_to("sub/../real")
    (tmp_path / "sub").mkdir()
    require_only_roots_way(str(tmp_path / "link/policy.d"))
    os.chown(tmp_path / "real", 1234, 0)
    with pytest.raises(PolicyUnusable, match="real"):
        require_only_roots_way(str(tmp_path / "link/policy.d"))
    os.chown(tmp_path / "real", 0, 0)
    os.chown(tmp_path / "link", 1234, 0, follow_symlinks=False)
    with pytest.raises(PolicyUnusable, match="symbolic link of uid 1234"):
        require_only_roots_way(str(tmp_path / "link/policy.d"))


def test_a_circle_of_links_ends(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(PolicyUnusable, match="symbolic links"):
        require_only_roots_way(str(tmp_path / "a"))
