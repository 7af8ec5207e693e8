"""What every test gets; the fixtures themselves are in tests/support/fixtures.py."""

from __future__ import annotations

import os

pytest_plugins = ["tests.support.fixtures"]


def pytest_report_header() -> list[str]:
    """Say what this run can test."""
    return [f"hpcctr: uid {os.getuid()}, kernel {os.uname().release}, {os.cpu_count()} cpus"]
