"""Lines of the engine's."""

from __future__ import annotations

import pytest

from hpcctr.engine.log import log


def test_a_line_says_whose_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    log("no session can begin")
    assert capfd.readouterr() == ("", "hpcctr-engine: no session can begin\n")
